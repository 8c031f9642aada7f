"""What users call: a trained model that takes pictures, clips and texts as they come.

Wherever several images and texts are paired, lists must be equally long, or one of them a single one, which is then
paired with all. Lists hold images or clips, not both. A single pair gives a single result, a list a list or an array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from scl_jax.convert.checkpoints import checksum
from scl_jax.inference import media as pictures
from scl_jax.inference import texts as words
from scl_jax.inference.media import Media, MediaError
from scl_jax.inference.network import Network
from scl_jax.inference.texts import AttentionMap, TextError
from scl_jax.inference.weights import Weights, read_weights
from scl_jax.models import parameters

ENTAILMENT = ("contradiction", "neutral", "entailment")  # the classes of SNLI-VE, in the order of METER's labels
MEDIA_FIRST, TEXT_FIRST = " (media first, then text)", " (text first, then media)"
BATCH_SIZES = (1, 8, 64)  # each is compiled once, when it is first met


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One answer of `Model.rank`."""

    index: int  # in the list of items
    score: float  # what the answers are ordered by; compare it within one query only
    similarity: float  # cosine in the contrastive space
    match: float | None  # probability of the matching head; None where another head, or none, was asked


def load(
    path_or_hub_name: str,
    *,
    tokenizer: str = "",
    step: int | None = None,
    dtype: str = "",
    heads: int = 0,
    vision_heads: int = 0,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Model:
    """A trained model from a work directory, a converted or exported folder, a PyTorch file, or the hub.

    Args:
        path_or_hub_name: a path, or `owner/name` on the Hugging Face hub.
        tokenizer: a folder or hub name; empty: the checkpoint's own.
        step: of a work directory's checkpoint; None: the newest.
        dtype: of activations, "float32" or "bfloat16"; empty: as trained, float32 for PyTorch weights.
        heads, vision_heads: of attention, for bare PyTorch files; 0: width / 64.
        batch_sizes: the batches that inputs run in, padded where there are fewer; the largest bounds memory.

    Raises:
        FileNotFoundError: there is no such checkpoint or tokenizer; ValueError: it, or an argument, is no use.
            Both say why.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={batch_sizes!r}: one or more numbers from 1 on are expected")
    weights = read_weights(
        path_or_hub_name, tokenizer=tokenizer, step=step, dtype=dtype, heads=heads, vision_heads=vision_heads
    )
    return Model(weights, batch_sizes)


class Model:
    """A trained model; `load` makes one. Nothing is trained, and the same input always gives the same output."""

    def __init__(self, weights: Weights, batch_sizes: Sequence[int] = BATCH_SIZES):
        self.name, self.heads = weights.name, weights.heads
        self.tokenizer, self.text_length = weights.tokenizer, weights.text_length
        self.image_size, self.video_size = weights.image_size, weights.video_size
        self.video_frames, self.answers = weights.video_frames, weights.answers
        graph, _ = parameters.abstract(weights.make)
        params = jax.tree.map(jnp.asarray, parameters.unflatten(weights.flat))
        self.network = Network(graph, params, weights.heads, tuple(sorted(batch_sizes)))
        # tells whose features are comparable: those of one contrastive head above the same heads of attention
        contrastive = {k: v for k, v in weights.flat.items() if k.startswith("contrastive.")}
        self.fingerprint = checksum(contrastive | {"heads": np.asarray(weights.attention_heads, np.int32)})
        self.temperature = float(weights.flat.get("contrastive.temperature", np.float32(1.0)))

    # ---- features ----

    def encode_images(self, images: Media | Sequence[Media]) -> Float[np.ndarray, "B E"]:
        """Unit vectors of images in the contrastive space, float32."""
        self.network.need("contrastive", "encode_images")
        return self._features(pictures.as_list(images)[0], are_clips=False)

    def encode_videos(self, videos: Media | Sequence[Media]) -> Float[np.ndarray, "B E"]:
        """Unit vectors of clips; the model sees `video_frames` frames, evenly spaced from the first to the last."""
        self.network.need("contrastive", "encode_videos")
        return self._features(pictures.as_list(videos)[0], are_clips=True)

    def encode_media(self, media: Media | Sequence[Media]) -> Float[np.ndarray, "B E"]:
        """Unit vectors of images or of clips, whichever these are."""
        self.network.need("contrastive", "encode_media")
        items = pictures.as_list(media)[0]
        return self._features(items, self._are_clips(items))

    def encode_texts(self, texts: str | Sequence[str]) -> Float[np.ndarray, "B E"]:
        """Unit vectors of texts; a text longer than `text_length` tokens is cut, with a warning."""
        self.network.need("contrastive", "encode_texts")
        parts = [
            self.network("texts", tokens["token_ids"], tokens["token_mask"], outputs=1)[0]
            for tokens in self._tokenized(words.as_texts(texts)[0])
        ]
        return np.concatenate(parts)

    def similarity(
        self, media: Media | Sequence[Media], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "media texts"]:
        """Cosines of every image or clip with every text."""
        self.network.need("contrastive", "similarity")
        return self.encode_media(media) @ self.encode_texts(texts).T

    # ---- pairs ----

    def match(self, media: Media | Sequence[Media], texts: str | Sequence[str]) -> float | Float[np.ndarray, " B"]:
        """The probability, by the matching head, that a text describes an image or clip, pair by pair."""
        self.network.need("matching", "match")
        odds, single = self._pairs("match", media, texts)
        chance = _sigmoid(odds)
        return float(chance[0]) if single else chance

    def rank(
        self,
        query: str | Media,
        items: Sequence[str] | Sequence[Media],
        k: int = 10,
        *,
        rerank: int = 128,
        query_is_text: bool | None = None,
    ) -> list[Ranked]:
        """The k items that fit a query best: texts for an image or clip, or images or clips for a text.

        Cosines choose `rerank` candidates. The rank head of a model fine-tuned for retrieval orders these by its score
        alone, whose zero is arbitrary, so that it tells no probability. Else log P(pair) + cosine / temperature does,
        with the matching head; evaluation may choose another weight of log P (`evaluate.matching_weights`). Without
        either head, cosines decide.

        Args:
            query: a string is a text when the items are images; where the items are strings too (paths, or texts?),
                it is taken for a text, and the items for paths, unless `query_is_text` is False.
        """
        self.network.need("contrastive", "rank")
        check_count(k)
        is_text = isinstance(query, str) if query_is_text is None else query_is_text
        if len(items) == 0:
            raise ValueError("rank: there are no items to choose from")
        pair: tuple[Any, Any] = (list(items), query) if is_text else (query, list(items))
        features, visual = self._seen(pair[0])
        found = (features @ self.encode_texts(pair[1]).T).reshape(-1)
        order = np.argsort(-found, kind="stable")
        head = next((name for name in ("rank", "matching") if name in self.heads), None)
        if head is None or rerank < 1:
            return [Ranked(int(i), float(found[i]), float(found[i]), None) for i in order[:k]]
        chosen = order[: max(rerank, k)]
        candidates = [items[i] for i in chosen]
        pair = (candidates, query) if is_text else (query, candidates)
        if visual is not None and is_text:
            visual = visual[chosen]
        matches: list[float | None] = [None] * len(chosen)
        if head == "rank":
            scores, _ = self._pairs("rank", *pair, visual)
        else:
            odds, _ = self._pairs("match", *pair, visual)
            scores, matches = found[chosen] / self.temperature - np.logaddexp(0.0, -odds), _sigmoid(odds).tolist()
        best = np.argsort(-scores, kind="stable")[:k]
        return [Ranked(int(chosen[i]), float(scores[i]), float(found[chosen[i]]), matches[i]) for i in best]

    def fill_mask(self, text: str, media: Media, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each `<mask>` of a text about an image or clip: the k likeliest tokens and their probabilities.

        Raises:
            TextError: there is no `<mask>` among the tokens that the model reads.
        """
        self.network.need("masked_language", "fill_mask")
        check_count(k)
        (tokens,) = self._tokenized(words.as_texts(text, TEXT_FIRST)[0])
        positions = np.flatnonzero(tokens["token_ids"][0] == self.tokenizer.mask_id)
        if positions.size == 0:
            raise TextError(f"no <mask> among the first {self.text_length} tokens: write one, as in 'a <mask> dog'")
        arrays = [np.repeat(array, positions.size, axis=0) for array in self._encoded_pair(tokens, media)]
        frames = self._frames(self._are_clips([media]))
        (chances,) = self.network("fill", *arrays, positions.astype(np.int32), frames=frames)
        special = [getattr(self.tokenizer, f"{name}_id") for name in ("bos", "pad", "eos", "unk", "mask")]
        chances[:, special] = 0.0
        chances = chances[:, : self.tokenizer.vocab_size]  # the table may be padded
        best = np.argsort(-chances, axis=1, kind="stable")[:, :k]
        return [
            [(self.tokenizer.decode([token]), float(row[token])) for token in ids]
            for row, ids in zip(chances, best, strict=True)
        ]

    def answer(self, image: Media, question: str, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest answers to a question about an image, each with its own probability (METHOD section 7).

        Without the list that fine-tuning leaves beside its checkpoint (classes.json) they are called "answer 17".
        """
        self.network.need("vqa", "answer")
        check_count(k)
        chances = self._pairs("answer", image, question)[0][0]
        known = self.answers if len(self.answers) == len(chances) else ()
        best = np.argsort(-chances, kind="stable")[:k]
        return [(known[i] if known else f"answer {i}", float(chances[i])) for i in best]

    def entails(self, image: Media, statement: str) -> dict[str, float]:
        """The probabilities that an image contradicts, is neutral to, or entails a statement."""
        self.network.need("entailment", "entails")
        chances = self._pairs("entail", image, statement)[0][0]
        return {name: float(chance) for name, chance in zip(ENTAILMENT, chances, strict=True)}

    def compare(self, image_a: Media, image_b: Media, statement: str) -> float:
        """The probability that a statement is true of two images, the left one first."""
        self.network.need("nlvr2", "compare")
        (tokens,) = self._tokenized(words.as_texts(statement, MEDIA_FIRST)[0])
        text, mask, first = self._encoded_pair(tokens, image_a)
        are_clips = self._are_clips([image_a])
        if are_clips != self._are_clips([image_b]):
            raise MediaError("compare takes two images or two clips, not one of each")
        second = self._visual([image_b], are_clips)
        return float(self.network("compare", text, mask, first, second, frames=self._frames(are_clips))[0][0])

    def attention_map(self, media: Media, text: str) -> AttentionMap:
        """Where a text, and each of its words, looks in an image or clip; `plots_attention` draws it."""
        (tokens,) = self._tokenized(words.as_texts(text, MEDIA_FIRST)[0])
        pixels = self._pixels([media], self._are_clips([media]))
        frames = pixels.shape[1]
        (visual,) = self.network("media", pixels)[1:]
        weights = self.network("attend", *self._encoded_text(tokens), visual, frames=frames)[0][0]  # (L, F·P)
        side = round((weights.shape[1] // frames) ** 0.5)
        kept = int(tokens["token_mask"][0].sum())
        return AttentionMap(
            text=text,
            frames=pixels[0],
            tokens=weights.reshape(-1, frames, side, side)[:kept],
            offsets=tokens["offsets"][0][:kept],
            word_ids=tokens["word_ids"][0][:kept],
        )

    # ---- what they share ----

    def _are_clips(self, media: Sequence[Media]) -> bool:
        """Whether these are clips, not images.

        Raises:
            MediaError: images and clips are mixed.
        """
        clips = [pictures.is_clip(one) for one in media]
        if any(clips) and not all(clips):
            raise MediaError("images and clips in one list: give them apart")
        return clips[0]

    def _frames(self, are_clips: bool) -> int:
        """How many frames the model sees of each."""
        return self.video_frames if are_clips else 1

    def _pixels(self, media: Sequence[Media], are_clips: bool) -> np.ndarray:
        if are_clips:
            return pictures.load_pixels(media, self.video_frames, self.video_size)
        return pictures.load_pixels(media, None, self.image_size)

    def _slices(self, count: int) -> Iterator[slice]:
        step = self.network.batch_sizes[-1]
        return (slice(start, start + step) for start in range(0, count, step))

    def _features(self, media: Sequence[Media], are_clips: bool) -> np.ndarray:
        parts = [
            self.network("media", self._pixels(media[part], are_clips), outputs=1) for part in self._slices(len(media))
        ]
        return np.concatenate([features for (features,) in parts])

    def _visual(self, media: Sequence[Media], are_clips: bool) -> np.ndarray:
        return self.network("media", self._pixels(media, are_clips))[1]

    def _seen(self, media: Media | Sequence[Media]) -> tuple[np.ndarray, np.ndarray | None]:
        """Features of images or clips, and their visual tokens where they are one batch: more could fill the memory."""
        items = pictures.as_list(media)[0]
        are_clips = self._are_clips(items)
        if len(items) > self.network.batch_sizes[-1]:
            return self._features(items, are_clips), None
        features, tokens = self.network("media", self._pixels(items, are_clips))
        return features, tokens

    def _tokenized(self, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        return (words.tokenize(self.tokenizer, texts[part], self.text_length) for part in self._slices(len(texts)))

    def _encoded_text(self, tokens: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return self.network("texts", tokens["token_ids"], tokens["token_mask"])[1], tokens["token_mask"]

    def _encoded_pair(self, tokens: dict[str, np.ndarray], media: Media) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return *self._encoded_text(tokens), self._visual([media], self._are_clips([media]))

    def _pairs(
        self, name: str, media: Media | Sequence[Media], texts: str | Sequence[str], visual: np.ndarray | None = None
    ) -> tuple[np.ndarray, bool]:
        """What the compiled function `name` gives for every pair, and whether it was a single one.

        Args:
            visual: the tokens of the media, where they have been encoded before.
        """
        items, one_item = pictures.as_list(media)
        lines, one_text = words.as_texts(texts, MEDIA_FIRST)
        if not one_item and not one_text and len(items) != len(lines):
            raise ValueError(f"{len(items)} images or clips and {len(lines)} texts cannot be paired")
        are_clips, count = self._are_clips(items), max(len(items), len(lines))

        def tokens_of(part: slice) -> np.ndarray:
            return self._visual(items[part], are_clips) if visual is None else visual[part]

        shared_item = tokens_of(slice(None)) if one_item else None
        shared_text = self._encoded_text(next(self._tokenized(lines))) if one_text else None
        parts = []
        for part in self._slices(count):
            rows = len(range(count)[part])
            seen = tokens_of(part) if shared_item is None else np.repeat(shared_item, rows, axis=0)
            if shared_text is None:
                text, mask = self._encoded_text(next(self._tokenized(lines[part])))
            else:
                text, mask = (np.repeat(array, rows, axis=0) for array in shared_text)
            parts.append(self.network(name, text, mask, seen, frames=self._frames(are_clips))[0])
        return np.concatenate(parts), one_item and one_text


def check_count(k: int) -> None:
    """Raises ValueError for a number of answers below one, which would count from the end of a list."""
    if k < 1:
        raise ValueError(f"k={k}: at least one answer is asked for")


def _sigmoid(odds: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -odds))
