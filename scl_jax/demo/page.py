"""The page: a picture beside the tabs that tell about it, put together with Gradio.

Nothing leaves this machine: no statistics, no shared link, no fonts or scripts from elsewhere (a content security
policy has the browser refuse them). Uploads lie in a folder of this process, and are deleted with it or after an hour.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import gradio.themes
from starlette.middleware import Middleware

from scl_jax.demo import html
from scl_jax.demo.service import MOST_ANSWERS, NO_FOLDER, Service
from scl_jax.inference.texts import MOST_CHARACTERS

STYLE = Path(__file__).with_name("style.css")
_EXAMPLES = 8
_WAITING = 32  # requests; who comes after them is asked to try again
_KEPT = 3600  # seconds that uploads lie on the disk
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' ws: wss:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


class _Policy:
    """Adds the content security policy to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, with_policy)


def page(service: Service) -> gr.Blocks:
    """The page of a service."""
    heads = list(dict.fromkeys(head for model in service.models for head in model.heads))
    with gr.Blocks(title="scl_jax", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as blocks:
        gr.HTML(html.header(service.names, heads), elem_id="header")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=2, min_width=300, elem_id="left"):
                picture = _picture(service)
                examples = _examples(service)
            with gr.Column(scale=3, min_width=300, elem_id="right"), gr.Tabs():
                with gr.Tab("Search", id="search"):
                    _search_tab(service, picture)
                with gr.Tab("Match & attention", id="look"):
                    _look_tab(service, picture)
                with gr.Tab("Ask", id="ask"):
                    _ask_tab(service, picture)
                with gr.Tab("Fill in", id="fill"):
                    _fill_tab(service, picture)
        if examples is not None:
            names = [hit.name for hit in service.examples(_EXAMPLES)]
            _open_on_select(service, examples, gr.State(names), picture)
    blocks.queue(max_size=_WAITING, default_concurrency_limit=1)
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int, largest_upload: float, *, block: bool = True) -> str:
    """Serves the page; returns its address at once unless `block`.

    Raises:
        OSError: the port is taken.
    """
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=not block,
        max_file_size=int(largest_upload * 2**20),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        theme=_theme(),
        css_paths=STYLE,
        app_kwargs={"middleware": [Middleware(_Policy)], "docs_url": None, "redoc_url": None},  # type: ignore[arg-type]
    )
    return address


def _theme() -> gradio.themes.Base:
    """Fonts of the system: none is fetched."""
    return gradio.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(body_background_fill="#f6f7fa", block_border_width="1px", block_shadow="none")


def _picture(service: Service) -> gr.Image:
    """The upload. Its file is handed on as it came, so that it is the service that looks into it and says why not."""
    picture = gr.Image(
        label=f"Picture (at most {service.largest_upload:g} MiB)",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        elem_id="picture",
        height=320,
    )
    picture.preprocess = lambda payload: payload.path if payload is not None else None  # type: ignore[method-assign]
    return picture


def _examples(service: Service) -> gr.Gallery | None:
    hits = service.examples(_EXAMPLES)
    if not hits:
        return None
    gr.HTML("<h3>Or choose one of the folder</h3>")
    return gr.Gallery(
        [hit.picture for hit in hits],
        label="Pictures of the folder",
        show_label=False,
        container=False,
        columns=4,
        allow_preview=False,
        object_fit="cover",
        height="auto",
        elem_id="examples",
        buttons=[],
    )


def _search_tab(service: Service, picture: gr.Image) -> None:
    text = _textbox("What are you looking for?", "a red star")
    count = gr.Slider(1, MOST_ANSWERS, 6, step=1, label="How many")
    button = gr.Button("Search", variant="primary", elem_id="search-button")
    said = gr.HTML(_missing(service, "contrastive") or _no_folder(service), elem_id="search-said")
    heading = gr.HTML(elem_id="found-heading")
    found = gr.Gallery(
        label="Found pictures",
        show_label=False,
        container=False,
        columns=3,
        allow_preview=False,
        object_fit="contain",
        height="auto",
        visible=False,
        elem_id="found",
        buttons=[],
    )
    names = gr.State([])

    def answer(text: str, count: float) -> tuple[str, Any, list[str]]:
        hits = service.search(text, int(count))
        shown = [(hit.picture, f"{hit.similarity:.3f} · {hit.name}") for hit in hits]
        title = "<h3>The most similar first; choose one to look at it</h3>"
        return title, gr.update(value=shown, visible=True), [hit.name for hit in hits]

    outputs = [heading, found, names]
    _on(text, button, answer, [text, count], said, outputs, ("", gr.update(visible=False), []))
    _open_on_select(service, found, names, picture)


def _look_tab(service: Service, picture: gr.Image) -> None:
    text = _textbox("What could the picture show?", "a red star")
    button = gr.Button("Look", variant="primary", elem_id="look-button")
    said = gr.HTML(elem_id="look-said")
    seen = gr.HTML(elem_id="seen")

    def answer(file: str | None, text: str) -> tuple[str]:
        sight = service.look(file, text)
        return (html.scores(sight) + html.maps(sight),)

    _on(text, button, answer, [picture, text], said, [seen], ("",))


def _ask_tab(service: Service, picture: gr.Image) -> None:
    text = _textbox("Your question", "what colour is the star?")
    button = gr.Button("Ask", variant="primary", elem_id="ask-button")
    said = gr.HTML(_missing(service, "vqa"), elem_id="ask-said")
    answers = gr.HTML(elem_id="answers")

    def answer(file: str | None, question: str) -> tuple[str]:
        return (html.bars(service.answer(file, question)),)

    _on(text, button, answer, [picture, text], said, [answers], ("",))


def _fill_tab(service: Service, picture: gr.Image) -> None:
    text = _textbox("A text with <mask> for each hidden word", "a <mask> star")
    button = gr.Button("Fill in", variant="primary", elem_id="fill-button")
    said = gr.HTML(_missing(service, "masked_language"), elem_id="fill-said")
    words = gr.HTML(elem_id="words")

    def answer(file: str | None, text: str) -> tuple[str]:
        filled = service.fill(file, text)
        many = len(filled) > 1
        return ("".join(html.bars(rows, f"<mask> {i + 1}" if many else "") for i, rows in enumerate(filled)),)

    _on(text, button, answer, [picture, text], said, [words], ("",))


def _textbox(label: str, placeholder: str) -> gr.Textbox:
    return gr.Textbox(label=label, placeholder=placeholder, max_length=MOST_CHARACTERS, lines=1, max_lines=4)


def _missing(service: Service, head: str) -> str:
    """What a tab says from the start where no checkpoint can serve it; empty where one can."""
    try:
        service.with_head(head)
    except ValueError as error:
        return html.notice(str(error), "note")
    return ""


def _no_folder(service: Service) -> str:
    return "" if service.index is not None else html.notice(NO_FOLDER, "note")


def kindly(answer: Callable[..., tuple[Any, ...]], empty: tuple[Any, ...], *given: Any) -> tuple[Any, ...]:
    """Calls; what the user did wrong becomes a message and `empty` outputs, warnings a note above the outputs."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        try:
            outputs = answer(*given)
        except (ValueError, OSError) as error:
            return html.notice(str(error)), *empty
    said = "; ".join(dict.fromkeys(str(note.message) for note in notes if note.category is UserWarning))
    return (html.notice(said, "note") if said else ""), *outputs


def _on(
    text: gr.Textbox,
    button: gr.Button,
    answer: Callable[..., tuple[Any, ...]],
    inputs: list[Any],
    said: gr.HTML,
    outputs: list[Any],
    empty: tuple[Any, ...],
) -> None:
    """One model call at a time, whichever tab it comes from."""
    gr.on(
        [button.click, text.submit],
        partial(kindly, answer, empty),
        inputs,
        [said, *outputs],
        show_progress="minimal",
        show_progress_on=[text],
        concurrency_id="model",
        concurrency_limit=1,
        api_visibility="private",
    )


def _open_on_select(service: Service, gallery: gr.Gallery, names: gr.State, picture: gr.Image) -> None:
    """Choosing a picture of a gallery puts it in the place of the upload."""

    def choose(names: list[str], event: gr.SelectData) -> Any:
        try:
            return service.picture_of(names[event.index])
        except (ValueError, OSError, IndexError) as error:
            gr.Warning(f"{error}")
            return gr.skip()

    gallery.select(choose, [names], [picture], show_progress="hidden", api_visibility="private")
