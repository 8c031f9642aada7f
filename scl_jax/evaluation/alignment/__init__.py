"""ALIGN-BENCH: does a text look at what it names? (METHOD section 7)

A is the cross-attention of the last text fusion layer from text tokens to image patches, the maximum over heads. It is
not normalised again, and what goes to the visual [CLS] is left out. For a set of tokens A is the sum of their rows, so
sub-words of a word and words of a phrase are summed. With R a region on the grid of patches

    score(A, R) = sum over patches of A · R / sum over patches of A

global  A of the text's [CLS]; R the union of all regions. A region whose box covers more than 90 % of the image is left
        out for boxes. An image of which no box is left has no global score for boxes.
local   for each phrase: A of its tokens, R the union of its own regions, whatever they cover; the mean over the phrases
        of an image. A phrase that is not in the caption, or of which the model reads nothing, is left out
        and named.

Both are taken for boxes (filled, corners rounded towards zero as the authors do) and for pixel masks; then the mean
over images. R is the union as a mask of zeros and ones in pixels, resized to the grid as torch's bicubic interpolation
does it (align_corners=False, a = -0.75, no antialiasing) and not clipped: what the authors' torchvision computes. Of a
clip, the frames that the model sees count, all together. `uniform` is the score of attention that is spread evenly.

The authors' script leaves regions of more than 90 % out of the pixel masks' union as well: `drop_large_masks` does so.
"""

from scl_jax.evaluation.alignment.files import align_bench, toy_examples
from scl_jax.evaluation.alignment.plain_pickle import PickleError, read_pickle
from scl_jax.evaluation.alignment.scores import (
    Attention,
    Example,
    Phrase,
    Region,
    attention_share,
    resize_mask,
    score_example,
    summarize,
)

__all__ = [
    "Attention",
    "Example",
    "Phrase",
    "PickleError",
    "Region",
    "align_bench",
    "attention_share",
    "read_pickle",
    "resize_mask",
    "score_example",
    "summarize",
    "toy_examples",
]
