"""The pre-training step as a competent PyTorch user writes it: what ours is compared with.

Every objective makes its own passes, as in the authors' code: 6 images, 6 texts and 5 fused pairs a sample. RoBERTa is
Hugging Face's, the rest torch.nn; attention is `scaled_dot_product_attention`; AdamW is fused; bfloat16 by autocast.
Sizes come from a config of scl_jax, so that both sides train the same network on the same shapes; of scl_jax nothing
else is used.

Axes: B batch, F frames, H W pixels, P patches of a frame, N tokens, L text tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COMPLETION_TEMPERATURE = 0.03


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """(B, Q, D), (B, K, D), (B, K, D) → (B, Q, D)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return x.transpose(1, 2).flatten(2)


class VisionBlock(nn.Module):
    """CLIP's block; over several frames, patches attend to their frame and every [CLS] to everything."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.heads = heads

    def attention(self, x: Tensor) -> Tensor:
        b, f, _, _ = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # (B, F, N, D)
        if f == 1:
            return attend(query[:, 0], key[:, 0], value[:, 0], self.heads, None, 0.0)[:, None]
        cls = attend(query[:, :, 0], key.flatten(1, 2), value.flatten(1, 2), self.heads, None, 0.0)
        patches = attend(query[:, :, 1:].flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), self.heads, None, 0.0)
        return torch.cat([cls[:, :, None], patches.unflatten(0, (b, f))], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(self.norm_1(x)))
        y = self.up(self.norm_2(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


class Vision(nn.Module):
    """(B, F, H, W, 3) bytes → (B, F + F·P, D), the [CLS] tokens first."""

    def __init__(self, c: Any):
        super().__init__()
        patches = (c.image_size // c.patch_size) ** 2
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.cls, self.mask = (nn.Parameter(torch.randn(c.width) * 0.02) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(patches + 1, c.width) * 0.02)
        self.frames = nn.Parameter(torch.randn(c.max_frames, c.width) * 0.02)
        self.norm_pre, self.norm_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(VisionBlock(c.width, c.heads, c.mlp_width) for _ in range(c.layers))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255)

    def forward(self, pixels: Tensor, kept: Tensor | None = None, replaced: Tensor | None = None) -> Tensor:
        b, f = pixels.shape[:2]
        x = (pixels.flatten(0, 1).permute(0, 3, 1, 2).float() - self.mean) / self.std
        x = self.patches(x).flatten(2).transpose(1, 2).unflatten(0, (b, f))  # (B, F, P, D)
        if replaced is not None:
            x = torch.where(replaced[:, None, :, None], self.mask.to(x.dtype), x)
        x = x + self.positions[1:]
        if kept is not None:
            x = x.gather(2, kept[:, None, :, None].expand(-1, f, -1, x.shape[-1]))
        cls = (self.cls + self.positions[0]).expand(b, f, 1, -1)
        x = torch.cat([cls.to(x.dtype), x], dim=2) + self.frames[:f, None]
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm_post(x)
        return torch.cat([x[:, :, 0], x[:, :, 1:].flatten(1, 2)], dim=1)


class FusionLayer(nn.Module):
    """One stream of co-attention: self-attention, attention to the other stream, feed-forward, all post-norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.qkv, self.query, self.key_value = (nn.Linear(width, parts * width) for parts in (3, 1, 2))
        self.self_out, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-12) for _ in range(3))
        self.heads, self.rate = heads, dropout

    def forward(self, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        rate = self.rate if self.training else 0.0

        def add(norm: nn.Module, x: Tensor, update: Tensor) -> Tensor:
            return norm(x + F.dropout(update, self.rate, self.training))

        own = attend(*self.qkv(x).chunk(3, dim=-1), self.heads, mask, rate)
        x = add(self.norms[0], x, self.self_out(own))
        crossed = attend(self.query(x), *self.key_value(other).chunk(2, dim=-1), self.heads, other_mask, rate)
        x = add(self.norms[1], x, self.cross_out(crossed))
        return add(self.norms[2], x, self.down(F.gelu(self.up(x))))


def projection(width: int, out: int) -> nn.Sequential:
    """The contrastive head of one modality."""
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, out))


class Baseline(nn.Module):
    """The network, and its loss with the reference's separate passes; `model` is `config.model`."""

    def __init__(self, model: Any, group_size: int):
        super().__init__()
        text, fusion, width = model.text, model.fusion, model.fusion.width
        self.vision = Vision(model.vision)
        self.text = RobertaModel(
            RobertaConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=text.mlp_width,
                max_position_embeddings=text.max_positions,
                hidden_dropout_prob=model.dropout,
                attention_probs_dropout_prob=model.attention_dropout,
                type_vocab_size=1,
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )
        self.text_transform, self.image_transform = nn.Linear(text.width, width), nn.Linear(model.vision.width, width)
        self.types = nn.Embedding(2, width)
        streams = [
            [FusionLayer(width, fusion.heads, fusion.mlp_width, model.dropout) for _ in range(fusion.layers)]
            for _ in range(2)
        ]
        self.text_layers, self.image_layers = map(nn.ModuleList, streams)
        self.text_pooler, self.image_pooler = nn.Linear(width, width), nn.Linear(width, width)
        self.project_text, self.project_image = (projection(width, model.projection_width) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor(model.initial_temperature))
        self.matching = nn.Linear(2 * width, 2)
        self.language = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.decoder = nn.Linear(width, text.vocab_size)
        self.mask_id, self.group_size = text.vocab_size - 1, group_size

    def compile_layers(self) -> None:
        """torch.compile layer by layer: all layers of a kind share their programs, one a shape of input."""
        layers = [self.vision.blocks, self.text.encoder.layer, self.text_layers, self.image_layers]
        for layer in (layer for kind in layers for layer in kind):
            layer.compile(dynamic=False)

    def encode_image(self, pixels: Tensor, **masking: Tensor) -> Tensor:
        return self.image_transform(self.vision(pixels, **masking))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_transform(self.text(ids, attention_mask=mask).last_hidden_state)

    def fuse(self, text: Tensor, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, y, key_mask = text + self.types.weight[0], image + self.types.weight[1], mask[:, None, None, :].bool()
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            x, y = text_layer(x, key_mask, y, None), image_layer(y, None, x, key_mask)
        return x, y

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the seven losses; `draws` holds this step's masks (`draw`)."""
        frames = pixels.shape[1]
        text, image = self.encode_text(ids, mask), self.encode_image(pixels)
        contrast = info_nce(
            self.project_text(text[:, 0]), self.project_image(image[:, :frames].mean(1)), self.temperature
        )

        x, y = self.fuse(self.encode_text(ids, mask), self.encode_image(pixels[draws["partner"]]), mask)
        pooled = torch.cat([self.text_pooler(x[:, 0]).tanh(), self.image_pooler(y[:, :frames].mean(1)).tanh()], dim=-1)
        matching = F.cross_entropy(self.matching(pooled).float(), draws["is_pair"])

        masked = ids.masked_fill(draws["language"], self.mask_id)
        x, _ = self.fuse(self.encode_text(masked, mask), self.encode_image(pixels), mask)
        labels = ids.masked_fill(~draws["language"], -100)
        language = F.cross_entropy(self.decoder(self.language(x)).flatten(0, 1).float(), labels.flatten())

        hidden = ids.masked_fill(draws["completion"], self.mask_id)
        full_x, full_y = self.fuse(self.encode_text(hidden, mask), self.encode_image(pixels), mask)
        dropped_x, dropped_y = self.fuse(
            self.encode_text(ids, mask), self.encode_image(pixels, kept=draws["kept"]), mask
        )
        completed, target = dropped_y[:, :frames].transpose(0, 1), full_y[:, :frames].detach().transpose(0, 1)
        global_vision = info_nce(completed, target, COMPLETION_TEMPERATURE)
        global_text = info_nce(full_x[:, 0], dropped_x[:, 0].detach(), COMPLETION_TEMPERATURE)

        replaced = self.encode_image(pixels, replaced=draws["replaced"])
        _, replaced_y = self.fuse(self.encode_text(ids, mask), replaced, mask)
        patches = (y[:, frames:].unflatten(1, (frames, -1)) for y in (replaced_y, full_y))
        local_vision = self.local(*patches, draws["replaced_slots"])
        local_text = self.local(full_x[:, None], dropped_x[:, None], draws["completion_slots"])
        return 0.5 * contrast + matching + language + global_vision + global_text + 0.2 * (local_vision + local_text)

    def local(self, anchors: Tensor, targets: Tensor, slots: Tensor) -> Tensor:
        """InfoNCE among the masked tokens of a frame of each group: (B, F, N, D) at positions (B, S)."""
        b, f, _, d = anchors.shape
        index = slots[:, None, :, None].expand(-1, f, -1, d)
        groups = b // min(self.group_size, b)

        def grouped(x: Tensor) -> Tensor:  # (B, F, N, D) → (G·F, B/G·S, D)
            return x.gather(2, index).unflatten(0, (groups, -1)).transpose(1, 2).reshape(groups * f, -1, d)

        return info_nce(grouped(anchors), grouped(targets.detach()), COMPLETION_TEMPERATURE)


def info_nce(anchors: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
    """Both directions summed, in float32; (…, B, D), a leading axis holds groups."""
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, targets = (F.normalize(x.float(), dim=-1).view(-1, *x.shape[-2:]) for x in (anchors, targets))
        logits = anchors @ targets.mT / temperature
        labels = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)


def draw(ids: Tensor, patches: int) -> dict[str, Tensor]:
    """The masks of one step, drawn on the device: positions, and the same as booleans where those are needed."""
    b, length = ids.shape

    def positions(total: int, count: int) -> Tensor:
        return torch.rand(b, total, device=ids.device).argsort(dim=1)[:, :count]

    def marked(slots: Tensor, total: int) -> Tensor:
        return torch.zeros(b, total, dtype=torch.bool, device=ids.device).scatter_(1, slots, True)

    words = length - 2
    completion, language = positions(words, int(words * 0.4) + 1) + 1, positions(words, round(words * 0.15)) + 1
    replaced = positions(patches, int(patches * 0.3))
    is_pair = (torch.arange(b, device=ids.device) % 2 == 0).long()
    rows = torch.arange(b, device=ids.device)
    return {
        "kept": positions(patches, int(patches * (1 - 0.8))),
        "replaced": marked(replaced, patches),
        "replaced_slots": replaced,
        "completion": marked(completion, length),
        "completion_slots": completion,
        "language": marked(language, length),
        "is_pair": is_pair,
        "partner": torch.where(is_pair.bool(), rows, (rows + 1) % b),
    }


class Training:
    """The baseline's training step on one device; `compiled` runs its layers through torch.compile.

    `arrays` holds pixels uint8 (B, F, H, W, 3), token_ids and token_mask (B, L), as numpy arrays.
    """

    def __init__(self, config: Any, stream: str, arrays: dict[str, Any], device: str, dtype: str, compiled: bool):
        torch.manual_seed(0)
        self.device, self.autocast = device, dtype == "bfloat16"
        self.rows = len(arrays["pixels"])
        if device == "cuda" and not self.autocast:
            torch.set_float32_matmul_precision("high")  # TF32, as XLA does by default
        model = Baseline(config.model, config.objectives.group_size).to(device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=2e-5, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # a layer sees whole and masked images, texts, pairs
            model.compile_layers()
        self.loss: Callable[..., Tensor] = model
        self.pixels = torch.from_numpy(arrays["pixels"]).to(device)
        self.ids = torch.from_numpy(arrays["token_ids"]).long().to(device)
        self.mask = torch.from_numpy(arrays["token_mask"]).long().to(device)
        self.patches = (config.data[stream].image_size // config.model.vision.patch_size) ** 2
        self.parameters = sum(p.numel() for p in model.parameters())

    def run(self) -> dict[str, float]:
        """One step; returns the loss once the device has finished."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.pixels, self.ids, self.mask, draw(self.ids, self.patches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return {"loss/total": loss.item()}
