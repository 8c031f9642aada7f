"""The page says what went wrong and stays; nothing is fetched from elsewhere; strangers' words are escaped."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
import warnings

import pytest
from tiny_model import PRETRAINING, free_port, write_run

import scl_jax
from scl_jax.demo import html
from scl_jax.demo.service import Service, Sight


@pytest.fixture(scope="module")
def demo():
    """`scl_jax.demo.page`, read here: its package takes seconds, which a worker without these tests can spare."""
    from scl_jax.demo import page

    return page


@pytest.fixture(scope="module")
def address(demo, tmp_path_factory):
    model = scl_jax.load(str(write_run(tmp_path_factory.mktemp("page"), PRETRAINING)))
    blocks = demo.page(Service([model], largest_upload=0.5))
    yield demo.launch(blocks, "127.0.0.1", free_port(), 0.5, block=False)
    blocks.close()


def test_errors_become_a_message_and_empty_outputs(demo):
    def answer(text):
        raise ValueError(f"{text} is no picture")

    said, *outputs = demo.kindly(answer, ("", None), "<script>.png")
    assert 'role="alert"' in said and "&lt;script&gt;.png is no picture." in said
    assert outputs == ["", None]


def test_warnings_become_a_note(demo):
    def answer():
        warnings.warn("the model reads 16 tokens: cut after 'star'", stacklevel=1)
        return ("done",)

    said, output = demo.kindly(answer, ("",))
    assert "The model reads 16 tokens" in said and output == "done"
    assert demo.kindly(lambda: ("done",), ("",)) == ("", "done")


def test_bugs_are_not_hidden(demo):
    with pytest.raises(ZeroDivisionError):
        demo.kindly(lambda: (1 / 0,), ("",))


def test_words_of_strangers_are_escaped():
    assert "<b>" not in html.bars([("<b>", 0.5)], "<b>")
    assert "<i>x" not in html.header(["<i>x"], ["<i>x"])
    shown = html.scores(Sight(0.25, -0.5, []))
    assert "25.0 %" in shown and "-0.500" in shown and html.scores(Sight(None, None, [])) == '<div class="cards"></div>'


def test_the_page_is_served_to_this_machine_and_fetches_nothing(address):
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        policy, body = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=[\"'](https?://[^\"']+)", body)
    assert [url for url in loaded if not url.startswith(address)] == []
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_uploads_beyond_the_limit_are_refused(address):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(2**20) + b"\r\n--x--"
    )
    request = urllib.request.Request(
        f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(request)


def test_tabs_without_a_head_say_so_from_the_start(address):
    body = urllib.request.urlopen(f"{address}config").read().decode()
    assert "needs a checkpoint with the head" in body and "start the demo with --folder" in body.lower()
