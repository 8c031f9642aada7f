"""The command line of the benchmarks.

    python -m scl_jax.benchmark step --config=configs/pretrain_image.py --batch=2 --config.model.dtype=float32
    python -m scl_jax.benchmark input
    python -m scl_jax.benchmark pipeline --config=configs/quickstart.py --seconds=10
    python -m scl_jax.benchmark retrieval --config=configs/quickstart.py --items=1000 --json=retrieval.json

Without --config it is configs/pretrain_image.py. Every option of a config can be overridden, as in training; media and
tokens are random, so nothing need be prepared, except for `pipeline`, which reads the shards of the config.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import app, flags

from scl_jax.config_flag import CONFIG as _CONFIG
from scl_jax.config_flag import parse

COMMANDS = ("step", "input", "pipeline", "retrieval")

_DEFAULT = "--config=configs/pretrain_image.py"
_STREAM = flags.DEFINE_enum("stream", "images", ["images", "videos"], "Which of the config's streams.")
_BATCH = flags.DEFINE_integer("batch", 0, "Samples of a step, or of an evaluation batch; 0: the config's.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "step: how many steps are timed; the median counts.")
_WARMUP = flags.DEFINE_integer("warmup", 2, "step: steps before these.")
_PROFILE = flags.DEFINE_boolean("profile", True, "step: also the time of every named scope.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "input: on every stage; pipeline: in all.")
_ITEMS = flags.DEFINE_integer("items", 1000, "retrieval: images or clips of the gallery.")
_RERANK = flags.DEFINE_integer("rerank", 16, "retrieval: candidates of a query that are re-scored.")
_JSON = flags.DEFINE_string("json", "", "Where the results go as JSON; empty: nowhere.")


def run(command: str) -> dict[str, Any]:
    """The results of one command."""
    config = _CONFIG.value
    if command == "input":
        from scl_jax.benchmark import input as input_benchmark

        return input_benchmark.measure(config.data, _SECONDS.value)
    if command == "pipeline":
        from scl_jax.benchmark import pipeline

        return pipeline.measure(config, _SECONDS.value)
    from scl_jax.host_memory import keep_freed

    keep_freed()  # as in a run
    if command == "retrieval":
        from scl_jax.benchmark import retrieval

        batch_size = _BATCH.value or config.evaluate.batch_size
        return retrieval.measure(config, _STREAM.value, _ITEMS.value, batch_size, _RERANK.value)
    from scl_jax.benchmark import step

    return step.measure(config, _STREAM.value, _BATCH.value, _REPEATS.value, _WARMUP.value, _PROFILE.value)


def with_config(arguments: list[str]) -> list[str]:
    """The command line, with the config that is timed where none is named."""
    named = any(argument.lstrip("-").partition("=")[0] == "config" for argument in arguments[1:])
    return arguments if named else [arguments[0], _DEFAULT, *arguments[1:]]


def main(argv: list[str]) -> None:
    """Runs a command, prints its table and writes its JSON."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"give one command: {', '.join(COMMANDS)}")
    from scl_jax.benchmark import report  # after the flags, so that --help is instant

    try:
        results = run(argv[1])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    report.write(_JSON.value, results)
    scopes = results.pop("seconds_by_scope", {})
    report.show(f"{argv[1]}, load average {report.machine()['load_average']:.1f}", results)
    if scopes:
        whole = sum(scopes.values())
        rows = {name: f"{1e3 * s:.2f} ms  {100 * s / whole:.1f} %" for name, s in list(scopes.items())[:20]}
        report.show("device time of a step by scope", rows)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda arguments: parse(with_config(arguments)))
