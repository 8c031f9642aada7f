"""What a work directory was begun with: a run there goes on with the same config and tokenizer, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from scl_jax.config import ConfigError, config_of_run, differences
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
        ConfigError: with all differences; options younger than the run count with their default.
    """
    before = config_before(workdir)
    changed = differences(_plain(before), _plain(config)) if before else []
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nContinue it with its own config, or choose another --workdir."
        )


def _plain(config: ConfigDict) -> dict:
    return json.loads(json.dumps(config.to_dict()))
