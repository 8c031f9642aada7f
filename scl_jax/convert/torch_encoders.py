"""The PyTorch side's encoders: CLIP's ViT over frames, RoBERTa, and the layers of the fusion encoder.

`torch_model.py` joins them into the model. Attribute names follow the authors' checkpoints, so that a state_dict has
exactly their names; LayerNorm epsilons differ on purpose (CLIP and RoBERTa 1e-5, fusion 1e-12).

Axes: B batch, F frames, H W pixels, P patches of a frame, K kept patches, M = 1 + P tokens of a frame, N vision tokens
in all, L text tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from scl_jax.convert.torch_config import SCLConfig

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of sRGB in 0 … 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_ID = 1  # RoBERTa's


class VisionBlock(nn.Module):
    """A pre-LN block of CLIP with QuickGELU."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.attn = nn.MultiheadAttention(width, config.vision_heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        layers = {
            "c_fc": nn.Linear(width, config.vision_mlp_width),
            "c_proj": nn.Linear(config.vision_mlp_width, width),
        }
        self.mlp = nn.ModuleDict(layers)

    def forward(self, x: Float[Tensor, "B N D"], blocked: Bool[Tensor, "N N"] | None) -> Float[Tensor, "B N D"]:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=blocked, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class VisionTransformer(nn.Module):
    """CLIP's ViT over frames: patches see their own frame, the [CLS] of every frame sees all tokens."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((config.image_size // patch) ** 2 + 1, width))
        self.temporal_embed = nn.Parameter(torch.zeros(1, config.max_frames, width)) if config.max_frames else None
        self.visual_mask_token = nn.Parameter(torch.empty(1, width)) if config.mask_vector else None
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.vision_layers)])
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        for parameter in (self.class_embedding, self.positional_embedding, self.visual_mask_token):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)

    def embed(
        self,
        pixels: Shaped[Tensor, "B F H W 3"],
        kept: Int[Tensor, "B K"] | None = None,
        replaced: Bool[Tensor, "B P"] | None = None,
    ) -> Float[Tensor, "B F M D"]:
        """[CLS] and patches of each frame before `ln_pre`; M = 1 + P, or 1 + K in the order of `kept`."""
        batch, frames = pixels.shape[:2]
        if pixels.dtype == torch.uint8:
            mean, std = (pixels.new_tensor(values, dtype=torch.float32) for values in (PIXEL_MEAN, PIXEL_STD))
            pixels = (pixels / 255 - mean) / std
        patches = self.conv1(pixels.flatten(0, 1).movedim(-1, 1).to(self.conv1.weight.dtype))  # (B·F, D, H/16, W/16)
        patches = patches.flatten(2).mT.unflatten(0, (batch, frames))  # (B, F, P, D)
        if len(self.positional_embedding) != patches.shape[2] + 1:
            have, want = patches.shape[2], len(self.positional_embedding) - 1
            raise ValueError(
                f"a frame has {have} patches, the position embedding {want}: resize the pixels or the rows"
            )
        if replaced is not None:
            if self.visual_mask_token is None:
                raise ValueError("these weights have no visual_mask_token (video weights): patches cannot be replaced")
            patches = torch.where(replaced[:, None, :, None], self.visual_mask_token.to(patches.dtype), patches)
        patches = patches + self.positional_embedding[1:]
        if kept is not None:
            patches = patches.take_along_dim(kept[:, None, :, None].long(), dim=2)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(batch, frames, 1, -1)
        x = torch.cat([cls.to(patches.dtype), patches], 2)
        if self.temporal_embed is None:
            return x
        if frames > self.temporal_embed.shape[1]:
            raise ValueError(f"{frames} frames, but these weights have {self.temporal_embed.shape[1]} temporal rows")
        return x + self.temporal_embed[:, :frames, None]

    def forward(
        self,
        pixels: Shaped[Tensor, "B F H W 3"],
        kept: Int[Tensor, "B K"] | None = None,
        replaced: Bool[Tensor, "B P"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        x = self.embed(pixels, kept, replaced)
        frames, per_frame = x.shape[1:3]
        blocked = None  # with one frame everything sees everything
        if frames > 1:
            frame = torch.arange(frames, device=x.device).repeat_interleave(per_frame)
            is_cls = (torch.arange(per_frame, device=x.device) == 0).repeat(frames)
            blocked = (frame[:, None] != frame[None]) & ~is_cls[:, None]
        x = self.ln_pre(x.flatten(1, 2))
        for block in self.transformer["resblocks"].children():
            x = block(x, blocked)
        x = self.ln_post(x).unflatten(1, (frames, per_frame))
        return torch.cat([x[:, :, 0], x[:, :, 1:].flatten(1, 2)], 1)


class Attention(nn.Module):
    """BERT's attention with its output layer: add & LayerNorm afterwards."""

    def __init__(self, config: SCLConfig, eps: float) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        linears = {name: nn.Linear(config.width, config.width) for name in ("query", "key", "value")}
        self.self = nn.ModuleDict(linears)
        output = {"dense": nn.Linear(config.width, config.width), "LayerNorm": nn.LayerNorm(config.width, eps=eps)}
        self.output = nn.ModuleDict(output)

    def forward(
        self, x: Float[Tensor, "B Q D"], source: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B Q D"]:
        query = self.self["query"](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q, D/heads)
        key, value = (
            self.self[name](source).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("key", "value")
        )
        dropout = self.dropout.p if self.training else 0.0
        visible = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        y = self.dropout(self.output["dense"](y.transpose(1, 2).flatten(2)))
        return self.output["LayerNorm"](x + y)


class BertLayer(nn.Module):
    """A post-LN layer: self-attention, cross-attention (fusion only), feed-forward with erf GELU."""

    def __init__(self, config: SCLConfig, eps: float, cross: bool) -> None:
        super().__init__()
        self.attention = Attention(config, eps)
        self.crossattention = Attention(config, eps) if cross else None
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.mlp_width)})
        output = {"dense": nn.Linear(config.mlp_width, config.width), "LayerNorm": nn.LayerNorm(config.width, eps=eps)}
        self.output = nn.ModuleDict(output)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        mask: Bool[Tensor, "B Q"] | None,
        other: Float[Tensor, "B S D"] | None = None,
        other_mask: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B Q D"]:
        x = self.attention(x, x, mask)
        if self.crossattention is not None:
            x = self.crossattention(x, other, other_mask)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + self.dropout(y))


class TextTransformer(nn.Module):
    """RoBERTa without its pooler."""

    def __init__(self, config: SCLConfig) -> None:
        super().__init__()
        tables = {
            "word_embeddings": nn.Embedding(config.vocab_size, config.width),
            "position_embeddings": nn.Embedding(config.max_positions, config.width),
            "token_type_embeddings": nn.Embedding(1, config.width),
            "LayerNorm": nn.LayerNorm(config.width, eps=1e-5),
        }
        self.embeddings = nn.ModuleDict(tables)
        layers = nn.ModuleList([BertLayer(config, eps=1e-5, cross=False) for _ in range(config.text_layers)])
        self.encoder = nn.ModuleDict({"layer": layers})
        self.dropout = nn.Dropout(config.dropout)

    def embed(self, token_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Word, position and segment rows, normalised; a pad token gets position 1, the others count from 2."""
        real = token_ids != PAD_ID
        positions = real.long().cumsum(1) * real + PAD_ID
        table = self.embeddings
        x = table["word_embeddings"](token_ids) + table["position_embeddings"](positions)
        x = x + table["token_type_embeddings"](torch.zeros_like(token_ids))
        return self.dropout(table["LayerNorm"](x))

    def forward(self, token_ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        x = self.embed(token_ids)
        for layer in self.encoder["layer"].children():
            x = layer(x, mask)
        return x
