"""SCL in PyTorch: runs and fine-tunes the exported weights, and computes the pre-training losses.

    model = SCL.from_folder("exported").eval()
    text, vision = model.encode_text(token_ids, token_mask), model.encode_vision(pixels)
    is_match = model.matching_logits(model.fuse(text, vision)).softmax(-1)[:, 1]

The names in the state_dict are those of the authors' checkpoints. An image is a video of one frame: there is one path,
with pixels (B, F, H, W, 3), either raw bytes (uint8) or floats already normalised with CLIP's mean and deviation.
A new module is in training mode (dropout): call `.eval()` for inference.

Axes: B batch, F frames, H W pixels, P patches of a frame, K kept patches, N vision tokens in all, L text tokens,
D width, C contrastive width, V vocabulary, T texts of an image. Vision tokens: the [CLS] of every frame first, then
the patches frame by frame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from scl_jax.convert.torch_config import SCLConfig
from scl_jax.convert.torch_encoders import BertLayer, TextTransformer, VisionTransformer

COMPLETION_TEMPERATURE = 0.03
WEIGHTS = {  # of the pre-training objectives in the total loss
    "contrastive": 0.5,
    "matching": 1.0,
    "masked_language": 1.0,
    "global_vision": 1.0,
    "global_text": 1.0,
    "local_vision": 0.2,
    "local_text": 0.2,
}
DROPPED = {  # names of a reference checkpoint (full match) that have no place here, and why
    r"vision_transformer\.(mask_token|decoder_.*)": "masked-autoencoder decoder, unused by SCL",
    r"text_transformer\.pooler\..*": "RoBERTa's pooler: the fusion encoder has its own",
    r"text_transformer\.embeddings\.position_ids": "a buffer of constants",
}


class Text(NamedTuple):
    """An encoded text; `mask` is True at every token that is not padding."""

    tokens: Float[Tensor, "B L D"]
    mask: Bool[Tensor, "B L"]


class Vision(NamedTuple):
    """An encoded image or clip: [CLS] of each of the `frames`, then patches."""

    tokens: Float[Tensor, "B N D"]
    frames: int


class Fused(NamedTuple):
    """Both streams after the fusion encoder; `joint` is pooled text and pooled vision side by side."""

    text: Float[Tensor, "B L D"]
    vision: Float[Tensor, "B N D"]
    joint: Float[Tensor, "B 2*D"]
    frames: int


class Views(NamedTuple):
    """What the pre-training objectives look at besides the clean pair; all masks are explicit."""

    matching_pixels: Shaped[Tensor, "B F H W 3"]  # the pair's own where `is_pair`, else those of another pair
    is_pair: Int[Tensor, " B"]
    language_ids: Int[Tensor, "B L"]  # corrected 80/10/10 by the caller
    language_labels: Int[Tensor, "B L"]  # the original token where masked, -100 elsewhere
    kept: Int[Tensor, "B K"]  # patches that the dropped view keeps, the same ones in every frame
    replaced: Bool[Tensor, "B P"] | None  # patches that the mask vector replaces; None without local_vision
    completion_ids: Int[Tensor, "B L"]  # with <mask> at `completion_mask`
    completion_mask: Bool[Tensor, "B L"]


class SCL(nn.Module):
    """Vision, text and fusion encoder with the heads that `config.with_heads` names."""

    cl_temp: nn.Parameter  # these only when their head is there
    vision_proj: nn.Sequential
    language_proj: nn.Sequential
    itm_score: nn.ModuleDict
    mlm_score: MaskedLanguageHead
    vqa_classifier: nn.Sequential
    nlvr2_classifier: nn.Sequential
    snli_classifier: nn.Sequential
    rank_output: nn.Linear

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.vision_transformer = nn.ModuleDict({"visual": VisionTransformer(config)})
        self.text_transformer = TextTransformer(config)
        self.cross_modal_text_transform = nn.Linear(width, width)
        self.cross_modal_image_transform = nn.Linear(config.vision_width, width)
        self.token_type_embeddings = nn.Embedding(config.token_types, width)  # 0 text, 1 vision, 2 second image
        layers = [[BertLayer(config, eps=1e-12, cross=True) for _ in range(config.fusion_layers)] for _ in range(2)]
        self.cross_modal_text_layers, self.cross_modal_image_layers = map(nn.ModuleList, layers)
        self.cross_modal_text_pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.cross_modal_image_pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        for head in config.with_heads:
            for name, part in _head_parts(head, config).items():
                setattr(self, name, part)
        self.apply(_initialise)

    @classmethod
    def from_folder(cls, folder: str | Path) -> SCL:
        """The model in an exported folder: `config.json` and `model.safetensors`; every name must be there and used."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: give a folder written by scl_jax.convert")
        model = cls(SCLConfig.from_dict(json.loads((folder / "config.json").read_text())))
        load(model, safetensors.torch.load_file(folder / "model.safetensors"))
        return model

    def encode_image(
        self,
        pixels: Shaped[Tensor, "B F H W 3"],
        kept: Int[Tensor, "B K"] | None = None,
        replaced: Bool[Tensor, "B P"] | None = None,
    ) -> Vision:
        """Encodes images or clips; only the `kept` patches of each frame, or the mask vector at `replaced` ones."""
        return Vision(self.vision_transformer["visual"](pixels, kept, replaced), pixels.shape[1])

    def encode_text(self, token_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Text:
        """Encodes texts, <s> first, padded with id 1 where `mask` is False."""
        return Text(self.text_transformer(token_ids, mask.bool()), mask.bool())

    def fuse(self, text: Text, vision: Vision, vision_type: int = 1) -> Fused:
        """Runs the fusion encoder on rows that belong together; `vision_type` is 2 for the second image of a pair."""
        types = self.token_type_embeddings.weight
        x = self.cross_modal_text_transform(text.tokens) + types[0]
        y = self.cross_modal_image_transform(vision.tokens) + types[vision_type]
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x, y = text_layer(x, text.mask, y, None), image_layer(y, None, x, text.mask)  # the other's previous output
        pooled_text = self.cross_modal_text_pooler["dense"](x[:, 0]).tanh()
        pooled_vision = self.cross_modal_image_pooler["dense"](y[:, : vision.frames].mean(1)).tanh()
        return Fused(x, y, torch.cat([pooled_text, pooled_vision], 1), vision.frames)

    def project_text(self, text: Text) -> Float[Tensor, "B C"]:
        """Contrastive vectors of texts, not normalised; no fusion is needed."""
        return self.language_proj(self.cross_modal_text_transform(text.tokens[:, 0]))

    def project_image(self, vision: Vision) -> Float[Tensor, "B C"]:
        """Contrastive vectors of images or clips, not normalised."""
        return self.vision_proj(self.cross_modal_image_transform(vision.tokens[:, : vision.frames].mean(1)))

    def matching_logits(self, fused: Fused) -> Float[Tensor, "B 2"]:
        """Column 1: text and vision belong together."""
        return self.itm_score["fc"](fused.joint)

    def language_logits(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Scores of the vocabulary for fused text tokens, all of `fused.text` or chosen rows."""
        return self.mlm_score(hidden)

    def answer_logits(self, fused: Fused) -> Float[Tensor, "B answers"]:
        """Visual question answering."""
        return self.vqa_classifier(fused.joint)

    def entailment_logits(self, fused: Fused) -> Float[Tensor, "B 3"]:
        """SNLI-VE; the order of classes is that of the data the head was trained on."""
        return self.snli_classifier(fused.joint)

    def statement_logits(self, text: Text, left: Vision, right: Vision) -> Float[Tensor, "B 2"]:
        """NLVR2: is the statement true of both images; they need a third row of token types."""
        joints = [self.fuse(text, left, 1).joint, self.fuse(text, right, 2).joint]
        return self.nlvr2_classifier(torch.cat(joints, 1))

    def rank_scores(self, fused: Fused) -> Float[Tensor, " B"]:
        """How well text and vision belong together, of the retrieval head."""
        return self.rank_output(fused.joint)[:, 0]


class MaskedLanguageHead(nn.Module):
    """BERT's head; the decoder is not tied to the word embeddings."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        layers = {"dense": nn.Linear(config.width, config.width), "LayerNorm": nn.LayerNorm(config.width, eps=1e-12)}
        self.transform = nn.ModuleDict(layers)
        self.decoder = nn.Linear(config.width, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))) + self.bias


def _classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    norm = nn.LayerNorm(hidden, eps=1e-5)
    return nn.Sequential(nn.Linear(width, hidden), norm, nn.GELU(), nn.Linear(hidden, classes))


def _head_parts(head: str, config: SCLConfig) -> dict[str, nn.Module | nn.Parameter]:
    """What a head of `with_heads` consists of, under the reference's names."""
    width, joint = config.width, 2 * config.width
    match head:
        case "contrastive":
            return {
                "cl_temp": nn.Parameter(torch.tensor(config.initial_temperature)),
                "vision_proj": _classifier(width, width, config.projection_width),
                "language_proj": _classifier(width, width, config.projection_width),
            }
        case "matching":
            return {"itm_score": nn.ModuleDict({"fc": nn.Linear(joint, 2)})}
        case "masked_language":
            return {"mlm_score": MaskedLanguageHead(config)}
        case "vqa":
            return {"vqa_classifier": _classifier(joint, joint, config.answers)}
        case "nlvr2":
            return {"nlvr2_classifier": _classifier(2 * joint, joint, 2)}
        case "entailment":
            return {"snli_classifier": _classifier(joint, joint, 3)}
        case "rank":
            return {"rank_output": nn.Linear(joint, 1)}
    raise ValueError(f"unknown head {head!r}")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def load(model: SCL, tensors: Mapping[str, np.ndarray | Tensor]) -> dict[str, str]:
    """Copies a checkpoint into the model and returns the names that `DROPPED` leaves out, each with its reason.

    Raises:
        ValueError: any other name that is missing, left over, or of another shape; the message lists all of them.
    """
    reasons = {name: why for name in tensors for rule, why in DROPPED.items() if re.fullmatch(rule, name)}
    state = {name: _as_tensor(tensors[name]) for name in tensors if name not in reasons}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit this model: {error}") from error
    return reasons


def _as_tensor(value: np.ndarray | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    copied = np.array(value, order="C")  # a view of a mapped file cannot be written to, which torch warns of
    if copied.dtype.name == "bfloat16":  # torch does not know NumPy's
        return torch.from_numpy(copied.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copied)


def cosines(rows: Float[Tensor, "R C"], columns: Float[Tensor, "S C"]) -> Float[Tensor, "R S"]:
    """Cosine similarities, never in half precision: they are divided by small temperatures."""
    with torch.autocast(rows.device.type, enabled=False):
        return _unit(rows) @ _unit(columns).T


def _unit(x: Float[Tensor, "*shape C"], dim: int = -1) -> Float[Tensor, "*shape C"]:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=dim, eps=1e-8)


def info_nce(similarities: Float[Tensor, "B B"], temperature: float | Tensor) -> Float[Tensor, ""]:
    """The sum of both directions; row i belongs to column i."""
    logits = similarities / temperature
    target = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def global_vision_loss(
    predicted: Float[Tensor, "B F D"],
    target: Float[Tensor, "B F D"],
    temperature: float = COMPLETION_TEMPERATURE,
    norm_over_frames: bool = False,
) -> Float[Tensor, ""]:
    """Global completion of fused [CLS]: InfoNCE over the batch for each frame, averaged.

    With `norm_over_frames` as the reference computes it for clips: the frame axis is normalised instead of the vectors,
    so that similarities are no cosines. Images, clips of one frame, are not touched by it.
    """
    dim = 1 if norm_over_frames and predicted.shape[1] > 1 else 2
    predicted, target = _unit(predicted, dim).movedim(1, 0), _unit(target.detach(), dim).movedim(1, 0)
    with torch.autocast(predicted.device.type, enabled=False):
        return torch.stack([info_nce(x @ y.T, temperature) for x, y in zip(predicted, target, strict=True)]).mean()


def local_loss(
    predicted: Float[Tensor, "B S D"],
    target: Float[Tensor, "B S D"],
    mask: Bool[Tensor, "B S"],
    temperature: float = COMPLETION_TEMPERATURE,
    group: int = 16,
) -> Float[Tensor, ""]:
    """Local completion: InfoNCE among all masked tokens of `group` consecutive samples, averaged over the tokens."""
    total, count = predicted.new_zeros(()), mask.sum().clamp(min=1)
    for x, y, chosen in zip(predicted.split(group), target.detach().split(group), mask.split(group), strict=True):
        if chosen.any():
            total = total + chosen.sum() * info_nce(cosines(x[chosen], y[chosen]), temperature)
    return total / count


def local_vision_loss(
    predicted: Float[Tensor, "B F*P D"],
    target: Float[Tensor, "B F*P D"],
    replaced: Bool[Tensor, "B P"],
    temperature: float = COMPLETION_TEMPERATURE,
    group: int = 16,
) -> Float[Tensor, ""]:
    """Local completion of the replaced patches, averaged over frames.

    Every frame index is a set of its own: neighbouring frames show nearly the same patches and are no negatives.
    """
    frames = [x.unflatten(1, (-1, replaced.shape[1])).unbind(1) for x in (predicted, target)]
    return torch.stack([local_loss(x, y, replaced, temperature, group) for x, y in zip(*frames, strict=True)]).mean()


def pretraining_losses(
    model: SCL,
    pixels: Shaped[Tensor, "B F H W 3"],
    token_ids: Int[Tensor, "B L"],
    token_mask: Bool[Tensor, "B L"],
    views: Views,
    weights: Mapping[str, float] = WEIGHTS,
    temperature: float = COMPLETION_TEMPERATURE,
    video_completion_norm_over_frames: bool = False,
) -> dict[str, Float[Tensor, ""]]:
    """Each objective in `weights`, unweighted, and their weighted sum `total`; every view is encoded once."""
    vision, text = model.encode_image(pixels), model.encode_text(token_ids, token_mask)
    completion_text = model.encode_text(views.completion_ids, token_mask)
    frames, losses = pixels.shape[1], {}
    if "contrastive" in weights:
        similarities = cosines(model.project_text(text), model.project_image(vision))
        losses["contrastive"] = info_nce(similarities, model.cl_temp)
    if "matching" in weights:
        fused = model.fuse(text, model.encode_image(views.matching_pixels))
        losses["matching"] = F.cross_entropy(model.matching_logits(fused), views.is_pair.long())
    if "masked_language" in weights:
        fused = model.fuse(model.encode_text(views.language_ids, token_mask), vision)
        masked = views.language_labels >= 0
        logits = model.language_logits(fused.text[masked])
        losses["masked_language"] = F.cross_entropy(logits, views.language_labels[masked].long())
    completing = model.fuse(completion_text, vision)  # full image, masked text
    dropped = model.fuse(text, model.encode_image(pixels, kept=views.kept))
    if "global_vision" in weights:
        predicted, target = dropped.vision[:, :frames], completing.vision[:, :frames]
        losses["global_vision"] = global_vision_loss(predicted, target, temperature, video_completion_norm_over_frames)
    if "global_text" in weights:
        similarities = cosines(completing.text[:, 0], dropped.text[:, 0].detach())
        losses["global_text"] = info_nce(similarities, temperature)
    if "local_vision" in weights:
        if views.replaced is None:
            raise ValueError("local_vision needs views.replaced: give it, or leave local_vision out of the weights")
        replaced = model.fuse(text, model.encode_image(pixels, replaced=views.replaced))
        predicted, target = replaced.vision[:, frames:], completing.vision[:, frames:]
        losses["local_vision"] = local_vision_loss(predicted, target, views.replaced, temperature)
    if "local_text" in weights:
        losses["local_text"] = local_loss(completing.text, dropped.text, views.completion_mask, temperature)
    losses["total"] = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    return losses


def answer_loss(logits: Float[Tensor, "B answers"], scores: Float[Tensor, "B answers"]) -> Float[Tensor, ""]:
    """Visual question answering: binary cross entropy with soft scores, summed over answers, mean over the batch."""
    return F.binary_cross_entropy_with_logits(logits, scores) * scores.shape[1]


def retrieval_losses(
    model: SCL, vision: Vision, texts: Text, first_image_only: bool = False
) -> dict[str, Float[Tensor, ""]]:
    """Ranking and contrastive loss of B images with T texts each, the true one first; `texts` has B·T rows.

    The contrastive loss is InfoNCE between the images and their true texts. With `first_image_only` as the reference
    computes it: one direction, the batch's first image against all B·T texts.
    """
    batch = len(vision.tokens)
    per_image = len(texts.tokens) // batch
    repeated = Vision(vision.tokens.repeat_interleave(per_image, 0), vision.frames)
    scores = model.rank_scores(model.fuse(texts, repeated)).view(batch, per_image)
    first = torch.zeros(batch, dtype=torch.long, device=scores.device)
    images, words = model.project_image(vision), model.project_text(texts)
    if first_image_only:
        contrastive = F.cross_entropy(cosines(images[:1], words) / model.cl_temp, first[:1])
    else:
        contrastive = info_nce(cosines(words[::per_image], images), model.cl_temp)
    return {"rank": F.cross_entropy(scores, first), "contrastive": contrastive}
