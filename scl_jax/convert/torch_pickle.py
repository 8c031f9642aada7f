"""Tensors of a torch pickle without running it: a restricted unpickler that imports nothing.

A pickle is a program that names globals (`module.name`) and calls them. The rule for each global:

1. what rebuilds tensors, and dictionaries, is replaced by code of this file that checks every argument;
2. metadata that Lightning and plain torch checkpoints are known to hold (`argparse.Namespace`, callbacks, configuration
   containers, NumPy scalars, …) becomes an inert placeholder: in the packages of `_METADATA` the names with a capital
   letter (classes), and the few lower-case ones in `_INERT`. Never imported, never run, its content thrown away;
3. the classes of a TorchScript archive (`__torch__.…`) become plain holders of their attributes; its code is not read;
4. everything else (`os.system`, `builtins.eval`, `torch.hub.load`, classes of somebody's project) is refused by name.

Rule 4 is a courtesy, for such a file would run code elsewhere; safety rests on nothing ever being imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np


class TorchFileError(ValueError):
    """A file that cannot be read as weights, or will not be; the message says which, why, and what to do."""


DTYPES = {  # torch's names
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint64": np.dtype("<u8"),
    "bool": np.dtype("?"),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "UntypedStorage": "uint8",
    "BoolStorage": "bool",
}
_METADATA = re.compile(
    r"(argparse|collections|pathlib|datetime|torch|torchmetrics|numpy|pytorch_lightning|lightning|lightning_fabric"
    r"|omegaconf|sacred|yacs|easydict|ml_collections|transformers)(\.\w+)*"
)
_CLASS_NAME = re.compile(r"_?[A-Z]\w*")
_INERT = re.compile(  # protocol 2 uses the names of Python 2
    r"(builtins|__builtin__)\.(object|set|frozenset|list|dict|tuple|int|long|float|complex|bool|str|unicode|bytes|bytearray"
    r"|slice|range|xrange)|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|_codecs\.encode"
    r"|(copyreg|copy_reg)\._reconstructor|collections\.deque|torch\.device|torch\.jit\._pickle\.\w+"
)


class Storage(NamedTuple):
    """The bytes of a torch storage and the type of its elements."""

    data: np.ndarray  # uint8, usually mapped from the file
    dtype: np.dtype


class Inert:
    """Stands for metadata: takes whatever the pickle gives it and keeps none of it."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None:
        """The pickle fills a list-like object."""

    def extend(self, values: object) -> None:
        """The pickle fills a list-like object."""


class ScriptObject(Inert):
    """A module of a TorchScript archive: its attributes, parameters and sub-modules among them."""

    state: dict[object, object] | None = None

    def __setstate__(self, state: object) -> None:
        self.state = dict(state) if isinstance(state, dict) else None


class Dictionary(dict):
    """`OrderedDict` and `defaultdict`; attributes that a pickle adds to it are ignored."""

    def __setstate__(self, state: object) -> None: ...


class _Function:
    """A callable of ours in a pickle, which can call it but not change it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)

    def __setstate__(self, state: object) -> None:
        raise TorchFileError("it tries to change a function")


class _ElementType(_Function):
    """A storage class such as `torch.FloatStorage`, or a dtype: an argument, never called."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        super().__init__(lambda *args: Inert())
        self.dtype = DTYPES[dtype]


def view(storage: object, offset: object, shape: object, strides: object, *_: object) -> np.ndarray:
    """The elements of a tensor as a read-only view of its storage; `offset` and `strides` count elements.

    Raises:
        TorchFileError: what a tensor cannot be: outside its storage, overlapping itself, or of negative size or stride.
    """
    shape, strides = tuple(_sequence(shape)), tuple(_sequence(strides))
    if not isinstance(storage, Storage) or not all(type(number) is int for number in (offset, *shape, *strides)):
        raise TorchFileError("a tensor is not described by a storage and whole numbers")
    start = cast(int, offset)
    if len(shape) != len(strides) or len(shape) > 32 or min(start, *shape, *strides, 0) < 0:
        raise TorchFileError(f"a tensor has shape {shape}, strides {strides} and offset {start}")
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    reach = 0  # of the last element; dimensions from the fastest to the slowest
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= reach:
            raise TorchFileError(f"a tensor of shape {shape} overlaps itself (strides {strides})")
        reach += (size - 1) * stride
    width, available = storage.dtype.itemsize, len(storage.data)
    if (start + reach + 1) * width > available:
        raise TorchFileError(f"a tensor of shape {shape} at {start} lies outside its storage of {available} bytes")
    array = np.ndarray(shape, storage.dtype, storage.data, start * width, tuple(stride * width for stride in strides))
    array.flags.writeable = False
    return array


def _sequence(value: object) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _parameter(tensor: object, *ignored: object) -> object:
    return tensor


def _view_as(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    kind: object,
    *_: object,
) -> np.ndarray:
    """A tensor of a type that has no storage class of its own."""
    if not isinstance(storage, Storage) or not isinstance(kind, _ElementType):
        raise TorchFileError("a tensor is not described by a storage and a type")
    return view(storage._replace(dtype=kind.dtype), offset, shape, strides)


def _from_type(rebuild: object, _type: object, args: object, _state: object) -> object:
    """A subclass of Tensor is rebuilt as a plain one."""
    if not isinstance(rebuild, _Function):
        raise TorchFileError("a tensor is rebuilt by something that is no function of torch")
    return rebuild(*_sequence(args))


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": view,
    "torch._utils._rebuild_tensor_v2": view,
    "torch._utils._rebuild_tensor_v3": _view_as,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": lambda *items: Dictionary(*items),
    "collections.defaultdict": lambda *factory: Dictionary(),
}


class _Unpickler(pickle.Unpickler):
    """Follows the rule at the top of this file; `load_storage` finds the bytes of a storage by its key."""

    def __init__(self, data: bytes, load_storage: Callable[[str], np.ndarray]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.load_storage = load_storage

    def find_class(self, module: str, name: str) -> object:
        """What the pickle gets instead of the global; a new object each time, so that it cannot leave traces."""
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _Function(_FUNCTIONS[full])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _ElementType(_STORAGES[name])
        if module == "torch" and name in DTYPES:
            return _ElementType(name)
        if full.startswith("__torch__."):
            return type("ScriptObject", (ScriptObject,), {})
        if (_METADATA.fullmatch(module) and _CLASS_NAME.fullmatch(name)) or _INERT.fullmatch(full):
            return type("Inert", (Inert,), {})
        raise TorchFileError(
            f"refused: its pickle names {full}, which could run code or is unknown; nothing was run. Ask for a "
            "safetensors file, or save the bare state_dict where you trust the file"
        )

    def persistent_load(self, pid: object) -> Storage:
        """A storage, named ("storage", type, key, device, number of elements)."""
        match pid:
            case ("storage", _ElementType() as kind, str(key), _, int(count), *_):
                data = self.load_storage(key)
                # a storage may be declared smaller than its bytes, not larger
                if not 0 <= count * kind.dtype.itemsize <= len(data):
                    raise TorchFileError(f"storage {key!r} has {len(data)} bytes, not {count} {kind.dtype} elements")
                return Storage(data[: count * kind.dtype.itemsize], kind.dtype)
        raise TorchFileError("its pickle refers to something that is no storage")


def unpickle(data: bytes, load_storage: Callable[[str], np.ndarray]) -> Any:
    """The content of a torch pickle with tensors as NumPy views and metadata as placeholders.

    Args:
        data: the pickle.
        load_storage: the bytes (uint8) of the storage with this key.

    Raises:
        TorchFileError: refused by the rule above, or broken.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # the unpickler makes room for every slot up to the largest
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= cast(int, argument) <= len(data):
                raise TorchFileError(f"its pickle asks for {argument} memory slots")
        return _Unpickler(data, load_storage).load()
    except TorchFileError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise TorchFileError(f"its pickle is broken ({type(error).__name__}: {error})") from error
