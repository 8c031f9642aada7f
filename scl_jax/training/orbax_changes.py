"""What we change in Orbax 0.12, and why; `apply()` once, before a checkpoint is written or read."""

from __future__ import annotations

import copy
import functools
import logging
import time
from types import SimpleNamespace
from typing import Any

from orbax.checkpoint._src.futures import future, signaling_client
from orbax.checkpoint._src.serialization import tensorstore_utils

# said at every save between two evaluations, where the state alone is read, and where nothing is to be written
_HARMLESS = ("did not provide metrics", "Metadata file does not exist", "read_only=True", "directory is read only")


@functools.cache
def apply() -> None:
    """Applies all changes, once."""
    _count_deadlines_on_a_steady_clock()
    _ask_tensorstore_less()
    logging.getLogger("absl").addFilter(lambda record: not any(words in record.getMessage() for words in _HARMLESS))


def _count_deadlines_on_a_steady_clock() -> None:
    """Orbax counts its deadlines on the wall clock, so that one that is set forward would end a save: not on ours."""
    for module in (future, signaling_client):
        module.time = SimpleNamespace(**(vars(time) | {"time": time.monotonic}))  # type: ignore[attr-defined]


def _ask_tensorstore_less() -> None:
    """TensorStore (up to 0.1.86, at least) never frees what it returns as JSON, and Orbax asks for much at every save.

    The same description of the folder for each array is asked for once a folder, and how many bytes went to the disk,
    which only a log says, never: 50 blocks of Python's memory stay of a save of 200 arrays instead of 850.
    """
    describe = tensorstore_utils._build_ocdbt_kvstore_tspec
    of_folder = functools.lru_cache(maxsize=8)(functools.partial(describe, name=None))

    def described(directory: str, name: str | None = None, **options: Any) -> dict[str, Any]:
        spec = copy.deepcopy(of_folder(directory, **options))  # callers add to it
        return spec if name is None else spec | {"path": name}

    tensorstore_utils._build_ocdbt_kvstore_tspec = described
    tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0
