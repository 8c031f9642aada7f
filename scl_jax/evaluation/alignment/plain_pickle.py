"""Plain data of a pickle: dictionaries, lists, strings, numbers, NumPy arrays and torch tensors. Nothing is run.

A pickle is a program that names globals and calls them. Here arrays and dtypes are rebuilt by this file, which looks at
every argument; a tensor's bytes are read by `torch.load(weights_only=True)`; any other global is refused by its name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

_LARGEST = 2**28  # bytes of one annotation file


class PickleError(ValueError):
    """A pickle that is broken or does more than hold data."""


def read_pickle(path: Path | str) -> Any:
    """The data in a pickle file.

    Raises:
        PickleError: it names a global that is no plain data, or is broken; nothing of it was run.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST:
        raise PickleError(f"{path}: {path.stat().st_size} bytes are too many for annotations of one image")
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # the unpickler makes room for every slot up to the largest
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(data):
                raise PickleError(f"it asks for {argument} memory slots")
        return _finish(_Unpickler(data).load())
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise PickleError(f"{path}: a broken pickle ({type(error).__name__}: {error})") from error


class _DType:
    """A dtype in the making: `numpy.dtype("b1", False, True)`, then its state with the byte order."""

    def __init__(self, name: object, *_: object) -> None:
        self.dtype = np.dtype(name) if isinstance(name, str) and len(name) <= 8 else None
        if self.dtype is None or self.dtype.kind not in "biuf":
            raise PickleError(f"an array of type {name!r}: numbers and truth values are expected")

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") and self.dtype is not None:
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in the making: an empty one, then its state (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleError("an array without its five parts")
        self.array = _from_bytes(state[4], state[2], state[1], "F" if state[3] else "C").array

    @classmethod
    def of(cls, array: np.ndarray) -> _Array:
        made = cls()
        made.array = array
        return made


class _Function:
    """A function of ours in a pickle, which can call it but not change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise PickleError("it tries to change a function")


def _from_bytes(data: object, dtype: object, shape: object, order: object = "C") -> _Array:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or not isinstance(shape, tuple):
        raise PickleError("an array that is not described by bytes, a type and a shape")
    if not all(type(side) is int and side >= 0 for side in shape) or order not in ("C", "F"):
        raise PickleError(f"an array of shape {shape}")
    if dtype.dtype is None or math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise PickleError(f"an array of shape {shape} with {len(data)} bytes")
    flat = np.frombuffer(bytes(data), dtype.dtype)
    return _Array.of(flat.reshape(shape, order="F" if order == "F" else "C"))


def _scalar(dtype: object, data: object) -> object:
    array = _from_bytes(data, dtype, ()).array
    return None if array is None else array.item()


def _latin(text: object, encoding: object) -> bytes:
    """`_codecs.encode`, with which protocol 2 spells bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError("bytes spelt in an unknown way")
    return text.encode("latin1")


def _storage(data: object) -> object:
    """The storage of a tensor, which torch pickles as a file within the pickle."""
    try:
        import torch
    except ImportError as error:
        raise PickleError("it holds torch tensors, which only torch reads: pip install 'scl_jax[torch]'") from error
    if not isinstance(data, bytes):
        raise PickleError("a tensor without bytes")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Array:
    import torch

    if not isinstance(storage, torch.storage.TypedStorage):
        raise PickleError("a tensor without a storage")
    whole = torch.empty(0, dtype=storage.dtype).set_(cast(Any, storage))
    layout: Any = (shape, strides, offset)  # torch refuses what lies outside the storage
    return _Array.of(torch.as_strided(whole, *layout).numpy())


_GLOBALS: dict[str, Callable[..., object]] = {
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_bytes for core in ("core", "_core")},
    "numpy.ndarray": lambda *_: None,
    "numpy.dtype": _DType,
    "_codecs.encode": _latin,
    "collections.OrderedDict": lambda *items: dict(*items),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
}


class _Unpickler(pickle.Unpickler):
    """Gives a pickle the functions above and nothing else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")

    def find_class(self, module: str, name: str) -> object:
        """What the pickle gets instead of the global."""
        if f"{module}.{name}" not in _GLOBALS:
            raise PickleError(f"refused: it names {module}.{name}, which is no plain data; nothing was run")
        return _Function(_GLOBALS[f"{module}.{name}"])

    def persistent_load(self, pid: object) -> object:
        raise PickleError("it refers to something outside the file")


def _finish(value: Any, depth: int = 0) -> Any:
    """The data with the arrays in the making replaced by arrays."""
    if depth > 32:
        raise PickleError("its data is nested too deeply")
    if isinstance(value, _Array):
        if value.array is None:
            raise PickleError("an array without content")
        return value.array
    if isinstance(value, dict):
        return {_finish(key, depth + 1): _finish(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finish(item, depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise PickleError(f"it holds a {type(value).__name__}, which is no plain data")
