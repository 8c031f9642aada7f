"""What a work directory was begun with: a run goes on with the same config, tokenizer and answers, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from scl_jax.config import ConfigError, config_of_run, differences
from scl_jax.convert.inputs import why_other_classes
from scl_jax.convert.sources import locate
from scl_jax.data.tokens import RUN_TOKENIZER, Tokenizer, load_tokenizer
from scl_jax.training.checkpoint import steps_in


def is_begun(workdir: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return bool(steps_in(workdir / "checkpoints"))


def config_before(workdir: Path) -> ConfigDict | None:
    """The config that a work directory was begun with; None where there is nothing to continue."""
    return config_of_run(workdir) if is_begun(workdir) and (workdir / "config.json").exists() else None


def check_config(config: ConfigDict, workdir: Path) -> None:
    """A work directory that holds a checkpoint can only be continued with the same config.

    Raises:
        ConfigError: with all differences; options younger than the run count with their default. Or nothing says which
            config it was begun with, so that another one's shapes would be taken for damage of its checkpoints.
    """
    if is_begun(workdir) and not (workdir / "config.json").exists():
        raise ConfigError(
            f"{workdir} holds checkpoints, but no config.json says of which config: put it back (a run begun with the "
            "same command in another --workdir writes the same one), or choose another --workdir"
        )
    before = config_before(workdir)
    if before and has_tokenizer(workdir):
        before.data.tokenizer = config.data.tokenizer  # may lie elsewhere: `other_tokenizer` looks into it
    changed = differences(_plain(before), _plain(config)) if before else []
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nContinue it with its own config, or choose another --workdir."
        )


def has_tokenizer(workdir: Path) -> bool:
    """Whether a run has its copy."""
    return (workdir / RUN_TOKENIZER / "tokenizer.json").is_file()


def other_tokenizer(tokenizer: Tokenizer, config: ConfigDict, workdir: Path) -> list[str]:
    """A problem where the embeddings that training or evaluation starts from belong to another tokenizer.

    They are those of the begun run, else those of `init.checkpoint`, unless `init.text` brings others.

    Raises:
        ValueError: that tokenizer cannot be read.
    """
    if is_begun(workdir):
        source = workdir
    elif config.init.checkpoint and not config.init.text:
        try:
            source = locate(config.init.checkpoint)
        except FileNotFoundError:  # `preflight.missing` says so
            return []
    else:
        return []
    for own in (source / RUN_TOKENIZER, source):  # of a run; of a converted or exported folder
        if (own / "tokenizer.json").is_file():
            same = tokenizer.same_as(load_tokenizer(own))
            return [] if same else [_OTHER.format(named=tokenizer.folder, source=source, own=own)]
    return []


def other_classes(classes: tuple[str, ...], config: ConfigDict, workdir: Path) -> list[str]:
    """A problem where the head of a begun run tells other answers apart than the data, or in another order.

    Raises:
        ValueError: its list of them cannot be read.
    """
    before = config_before(workdir)
    if not classes or not before or before.task != config.task:  # `check_config` tells of another task
        return []
    reason = why_other_classes(workdir, classes)
    return [reason] if reason else []


_OTHER = (
    "data.tokenizer: {named} is another tokenizer than that of {source}, so that words would get embeddings of others; "
    "take its own, --config.data.tokenizer={own}"
)


def _plain(config: ConfigDict) -> dict:
    return json.loads(json.dumps(config.to_dict()))
