"""Vision encoder: CLIP's ViT for images and videos alike (METHOD section 1). An image is a video of one frame.

Views of the same samples that keep different numbers of patches go through the blocks side by side: joined along the
axis of tokens, which all but attention does not look at, so that products with weights are few and large, and so that
each weight has one gradient. Not with kernels for attention: these take whole arrays, and cutting them out would copy.

Axes: B batch, V views of one shape, F frames, P patches of a frame, N = P + 1 tokens of a frame ([CLS] first),
T = Σ V·F·N tokens of all views of a sample, D width, S kept patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from scl_jax.models.attention import Projection, attend, merge_heads, takes_parts
from scl_jax.models.layers import FeedForward, Precision, gather_tokens, quick_gelu, spread
from scl_jax.models.stack import Stack

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision encoder; `image_size` (pixels) is the position table's, `max_frames` counts temporal rows."""

    width: int = 768
    layers: int = 11
    heads: int = 12
    mlp_width: int = 3072
    patch_size: int = 16
    image_size: int = 288
    max_frames: int = 8
    remat: str = "none"
    unroll: int = 1  # layers a turn of the loop over layers
    attention: str = "xla"  # see `attend`
    epsilon: float = 1e-5  # CLIP's


def normalize_patches(patches: UInt8[Array, "*S patch"] | Float[Array, "*S patch"], dtype) -> Float[Array, "*S patch"]:
    """Bytes to CLIP's zero mean and unit deviation, computed in at least float32; floats pass as they are.

    The last axis repeats red, green, blue.
    """
    if jnp.issubdtype(patches.dtype, jnp.floating):
        return patches.astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, std = (jnp.tile(jnp.asarray(x, wide), patches.shape[-1] // 3) for x in (CLIP_MEAN, CLIP_STD))
    return ((patches.astype(wide) / 255.0 - mean) / std).astype(dtype)


def patchify(
    pixels: UInt8[Array, "B F height width 3"] | Float[Array, "B F height width 3"], size: int
) -> UInt8[Array, "B F P patch"] | Float[Array, "B F P patch"]:
    """Non-overlapping square patches, row by row; each patch flattened as (row, column, channel)."""
    b, f, height, width, channels = pixels.shape
    if height % size or width % size:
        raise ValueError(f"images of {height}×{width} pixels do not divide into patches of {size}×{size}")
    x = pixels.reshape(b, f, height // size, size, width // size, size, channels)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)  # (B, F, rows, columns, size, size, 3)
    return x.reshape(b, f, (height // size) * (width // size), size * size * channels)


def bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of a 1-D bicubic resize as torch does it: align_corners=False, a = -0.75, no antialiasing.

    `jax.image.resize` uses a = -0.5 and is off by 0.3 on CLIP's position embeddings.
    """
    a = -0.75
    source = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(source).astype(int)
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        distance = np.abs(source - (left + offset))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(left + offset, 0, old - 1)), weight)
    return matrix


def resize_positions(table: Float[Array, "old D"], grid: int) -> Float[Array, "new D"]:
    """Position rows ([CLS] first) for a `grid` × `grid` image; the [CLS] row is copied (METHOD section 7)."""
    old = round((table.shape[0] - 1) ** 0.5)
    if old == grid:
        return table
    matrix = jnp.asarray(bicubic_matrix(old, grid), jnp.promote_types(table.dtype, jnp.float32))
    cube = table[1:].reshape(old, old, -1)
    patches = jnp.einsum("ri,cj,ijd->rcd", matrix, matrix, cube, precision="highest")
    return jnp.concatenate([table[:1], patches.reshape(grid * grid, -1).astype(table.dtype)])


@dataclasses.dataclass(frozen=True)
class ImageViews:
    """Views of one shape, those of a sample next to each other; masking as in `VisionEncoder.embed`."""

    pixels: UInt8[Array, "B·V F height width 3"] | Float[Array, "B·V F height width 3"]
    keep: Int[Array, "B·V S"] | None = None
    replaced: Bool[Array, "B·V P"] | None = None
    count: int = 1  # V

    def embed(self, encoder: VisionEncoder) -> Float[Array, "B V F N D"]:
        """Their embeddings, view by view."""
        x = encoder.embed(self.pixels, self.keep, self.replaced)
        return x.reshape(-1, self.count, *x.shape[1:])


Shapes = Sequence[tuple[int, ...]]  # (V, F, N) of the views that lie side by side


def side_by_side(views: Sequence[Float[Array, "B _ F _ D"]]) -> Float[Array, "B T D"]:
    """Views of the same samples, joined along the axis of tokens."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in views], axis=1)


def take_apart(x: Float[Array, "B T *D"], shapes: Shapes) -> list[Float[Array, "B _ F _ *D"]]:
    """Undoes `side_by_side`."""
    parts = jax.lax.split(x, [math.prod(shape) for shape in shapes], axis=1)
    return [part.reshape(x.shape[0], *shape, *x.shape[2:]) for part, shape in zip(parts, shapes, strict=True)]


class FrameAttention(nnx.Module):
    """A patch attends to its own frame; the [CLS] of every frame attends to all tokens of all frames of its view."""

    def __init__(self, config: VisionConfig, precision: Precision, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        out_init = nnx.initializers.normal(config.width**-0.5 * (2 * config.layers) ** -0.5)
        self.qkv = Projection(config.width, 3, config.heads, init, precision, rngs, config.attention)
        self.out = precision.linear(config.width, config.width, out_init, rngs)
        self.implementation = config.attention

    def __call__(self, x: Float[Array, "B T D"], shapes: Shapes) -> Float[Array, "B T D"]:
        apart = zip(*(take_apart(y, shapes) for y in self.qkv(x)), strict=True)
        return self.out(merge_heads(jnp.concatenate([self.read(*view) for view in apart], axis=1)))

    def read(
        self, query: Float[Array, "B V F N H d"], key: Float[Array, "B V F N H d"], value: Float[Array, "B V F N H d"]
    ) -> Float[Array, "B M H d"]:
        """Attention within views of one shape; M = V·F·N."""
        b, v, f, n, *head = query.shape

        def by_frame(x):  # (B, V, F, …) → (B·V·F, …)
            return x.reshape(b * v * f, *x.shape[3:])

        def by_view(x):  # (B, V, F, N, H, d) → (B·V, F·N, H, d)
            return x.reshape(b * v, f * n, *head)

        def within(query):  # of a frame
            return attend(by_frame(query), by_frame(key), by_frame(value), implementation=self.implementation)

        if f == 1:  # [CLS] sees what the patches see: one call
            return within(query).reshape(b, v * n, *head)
        # (B·V, F, H, d); a few queries gain nothing from a kernel for GPUs
        few = "mosaic" if self.implementation == "mosaic" else "xla"
        cls = attend(query[..., 0, :, :].reshape(b * v, f, *head), by_view(key), by_view(value), implementation=few)
        patches = within(query[..., 1:, :, :]).reshape(b, v, f, n - 1, *head)
        y = jnp.concatenate([cls.reshape(b, v, f, 1, *head), patches], axis=3)
        return y.reshape(b, v * f * n, *head)


class VisionBlock(nnx.Module):
    """CLIP's pre-LN block."""

    def __init__(self, config: VisionConfig, precision: Precision, rngs: nnx.Rngs):
        c = config
        self.norm_1 = precision.norm(c.width, c.epsilon, rngs)
        self.attention = FrameAttention(c, precision, rngs)
        self.norm_2 = precision.norm(c.width, c.epsilon, rngs)
        self.mlp = FeedForward(
            c.width,
            c.mlp_width,
            quick_gelu,
            precision,
            rngs,
            up_init=nnx.initializers.normal((2 * c.width) ** -0.5),
            down_init=nnx.initializers.normal(c.width**-0.5 * (2 * c.layers) ** -0.5),
        )

    def __call__(self, x: Float[Array, "B T D"], shapes: Shapes) -> Float[Array, "B T D"]:
        x = x + self.attention(self.norm_1(x), shapes)
        return x + self.mlp(self.norm_2(x))


class VisionEncoder(nnx.Module):
    """(B, F, height, width, 3) → (B, F + F·P, D): the F [CLS] tokens first, then all patches, frame by frame."""

    def __init__(self, config: VisionConfig, precision: Precision, rngs: nnx.Rngs):
        c = config
        if c.image_size % c.patch_size:
            raise ValueError(f"image_size {c.image_size} does not divide by patch_size {c.patch_size}")
        tokens = (c.image_size // c.patch_size) ** 2 + 1
        small = nnx.initializers.normal(c.width**-0.5)

        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(small(rngs.params(), shape, precision.param_dtype))

        self.patch_embedding = precision.linear(3 * c.patch_size**2, c.width, small, rngs, use_bias=False)
        self.class_embedding = parameter(c.width)
        self.mask_embedding = parameter(c.width)
        self.position_embedding = parameter(tokens, c.width)
        self.temporal_embedding = parameter(c.max_frames, c.width)
        self.norm_pre = precision.norm(c.width, c.epsilon, rngs)
        self.blocks = Stack(lambda rngs: VisionBlock(c, precision, rngs), c.layers, c.remat, rngs, c.unroll)
        self.norm_post = precision.norm(c.width, c.epsilon, rngs)
        self.patch_size = c.patch_size
        self.joins_views = takes_parts(c.attention)
        self.dtype = precision.dtype

    def embed(
        self,
        pixels: UInt8[Array, "B F height width 3"] | Float[Array, "B F height width 3"],
        keep: Int[Array, "B S"] | None = None,
        replaced: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B F N D"]:
        """Patch, position and temporal embeddings, before `norm_pre`.

        Args:
            keep: patches to encode, the same in every frame (drop masking); all without it.
            replaced: patches whose embedding becomes the learned mask vector (replace masking).

        Raises:
            ValueError: pixels that do not divide into patches, or more frames than temporal rows.
        """
        b, f, height, width, _ = pixels.shape
        rows = self.temporal_embedding.shape[0]
        if f > rows:
            raise ValueError(
                f"a clip of {f} frames, but the temporal embedding has {rows} rows (model.vision.max_frames)"
            )
        if height != width:
            raise ValueError(f"images must be square, these are {height}×{width} pixels")
        patches = patchify(pixels, self.patch_size)  # (B, F, P, 3·size²), still bytes: a quarter of the traffic
        # rows are cast after they are spread over the batch, so that gradients are summed in the type of parameters
        table = resize_positions(self.position_embedding[...], height // self.patch_size)
        positions = table[None, 1:]  # (1, P, D)
        if keep is not None:
            patches = gather_tokens(patches, jnp.broadcast_to(keep[:, None], (b, f, keep.shape[1])))
            positions = table[1:][keep]  # (B, S, D)
        x = self.patch_embedding(normalize_patches(patches, self.dtype))
        if replaced is not None:
            x = jnp.where(replaced[:, None, :, None], spread(self.mask_embedding[...], x.shape, x.dtype), x)
        cls = spread(self.class_embedding[...] + table[0], (b, f, 1, table.shape[1]), x.dtype)
        x = jnp.concatenate([cls, x + spread(positions[:, None], x.shape, x.dtype)], axis=2)
        return x + spread(self.temporal_embedding[...][:f, None], x.shape, x.dtype)

    def __call__(
        self,
        pixels: UInt8[Array, "B F height width 3"] | Float[Array, "B F height width 3"],
        keep: Int[Array, "B S"] | None = None,
        replaced: Bool[Array, "B P"] | None = None,
    ) -> Float[Array, "B tokens D"]:
        """Encodes frames; arguments as in `embed`. `tokens` = F + F·P, with S for P under drop masking."""
        x = self.embed(pixels, keep, replaced)
        b, f, n, d = x.shape
        return class_tokens_first(self.encode(x.reshape(b, f * n, d), [(1, f, n)]).reshape(x.shape))

    def encode(self, x: Float[Array, "B T D"], shapes: Shapes) -> Float[Array, "B T D"]:
        """The blocks, with the norms before and behind them, on embedded views side by side."""
        return self.norm_post(self.blocks(self.norm_pre(x), lambda block, x, _: block(x, shapes)))


def class_tokens_first(x: Float[Array, "B F N D"]) -> Float[Array, "B tokens D"]:
    """(B, F, N, D) → the F [CLS] tokens, then all patches, frame by frame: (B, F + F·P, D)."""
    b, f, n, d = x.shape
    return jnp.concatenate([x[:, :, 0], x[:, :, 1:].reshape(b, f * (n - 1), d)], axis=1)
