"""Small pieces of HTML for what the page answers; whatever comes from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from scl_jax.demo.service import Sight


def header(names: Sequence[str], heads: Sequence[str]) -> str:
    """What this page is, and from which checkpoints it answers."""
    chips = "".join(f'<span class="chip">{escape(head.replace("_", " "))}</span>' for head in heads)
    return (
        '<h1>scl_jax</h1><p class="lead">Search pictures, and see where words look.</p>'
        f'<p class="faint">{escape(", ".join(names))} {chips}</p>'
    )


def notice(message: str, kind: str = "error") -> str:
    """A box with a message; `kind` is error or note."""
    title = {"error": "That did not work", "note": "Note"}[kind]
    is_word = message.partition(" ")[0].isalpha()  # the name of a file stays as it is
    text = (message[:1].upper() + message[1:] if is_word else message).rstrip(".") + "."
    return f'<div class="notice {kind}" role="alert"><b>{title}</b><span>{escape(text)}</span></div>'


def bars(rows: Sequence[tuple[str, float]], title: str = "") -> str:
    """A bar for every probability."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    lines = "".join(
        f'<div class="bar"><span class="name">{escape(name.strip() or name)}</span>'
        f'<span class="track"><i style="width:{100 * min(max(value, 0.0), 1.0):.1f}%"></i></span>'
        f'<span class="value">{100 * value:.1f} %</span></div>'
        for name, value in rows
    )
    return f'<div class="bars">{heading}{lines}</div>'


def scores(sight: Sight) -> str:
    """The match and the similarity of a picture and a text, as far as the model tells them."""
    cards = []
    if sight.match is not None:
        cards.append(_card("Match", f"{100 * sight.match:.1f} %", "probability of the matching head", sight.match))
    if sight.similarity is not None:
        place = (sight.similarity + 1) / 2
        cards.append(_card("Similarity", f"{sight.similarity:.3f}", "cosine, from −1 to 1", place))
    return f'<div class="cards">{"".join(cards)}</div>'


def maps(sight: Sight) -> str:
    """The picture under the attention of the whole text and of each word."""
    figures = "".join(
        f'<figure><img src="{_data(picture)}" alt="where {escape(word, quote=True)} looks">'
        f"<figcaption>{escape(word)}</figcaption></figure>"
        for picture, word in sight.maps
    )
    note = '<p class="faint">Each map on its own scale: bright is its strongest patch.</p>'
    return f'<h3>Where the text, and each word, looks</h3><div class="maps">{figures}</div>{note}'


def _data(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _card(name: str, value: str, meaning: str, share: float) -> str:
    return (
        f'<div class="card"><span class="name">{name}</span><b>{value}</b>'
        f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span><span class="faint">{meaning}</span></div>'
    )
