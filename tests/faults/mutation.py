"""Mutations of bytes: what a bad disk, a broken transfer or a hostile hand does to a file."""

from __future__ import annotations

import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO

_NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
_MOST_CHANGES = 6
_HEADER = 96  # bytes, where a change does most


def mutate(seeds: Sequence[bytes], dice: random.Random) -> bytes:
    """One of the seeds with a few changes, one after the other."""
    data = bytearray(dice.choice(seeds))
    for _ in range(dice.randint(1, _MOST_CHANGES)):
        if not data:
            break
        dice.choice(_CHANGES)(data, dice, seeds)
    return bytes(data)


def _place(data: bytearray, dice: random.Random) -> int:
    return dice.randrange(min(len(data), _HEADER) if dice.random() < 0.4 else len(data))


def _flip(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    data[_place(data, dice)] ^= 1 << dice.randrange(8)


def _set(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    data[_place(data, dice)] = dice.choice((0, 255, dice.randrange(256)))


def _number(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    form = dice.choice((">H", "<H", ">I", "<I", ">Q", "<Q"))
    value = struct.pack(form, dice.choice(_NUMBERS) % 256 ** struct.calcsize(form))
    start = _place(data, dice)
    data[start : start + len(value)] = value


def _cut(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    del data[dice.randrange(len(data)) :]


def _remove(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    start = _place(data, dice)
    del data[start : start + dice.randint(1, 64)]


def _repeat(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    start = _place(data, dice)
    data[start:start] = data[start : start + dice.randint(1, 256)] * dice.choice((1, 1, 2, 9))


def _insert(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    start = _place(data, dice)
    data[start:start] = dice.randbytes(dice.randint(1, 32))


def _blank(data: bytearray, dice: random.Random, _: Sequence[bytes]) -> None:
    start = _place(data, dice)
    end = min(len(data), start + dice.randint(1, 512))
    data[start:end] = bytes(end - start)


def _splice(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    other = dice.choice(seeds)
    start, cut = _place(data, dice), dice.randrange(len(other) + 1)
    data[start:] = other[cut:]


_CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    *(_flip, _flip, _set, _set, _number, _number),
    *(_cut, _remove, _repeat, _insert, _blank, _splice),
)


# ---- checksums, without which a change is noticed at once and nothing behind them is tried ----


def with_png_checksums(data: bytes) -> bytes:
    """The chunks of a PNG file with checksums that are right."""
    fixed, place = bytearray(data), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(fixed)


def with_zip_checksums(data: bytes, changed: Callable[[str, bytes], bytes]) -> bytes:
    """A zip file whose entries are what `changed` makes of them, with checksums that are right."""
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, changed(name, old.read(name)))
    return target.getvalue()
