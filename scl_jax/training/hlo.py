"""What a compiled program does, read from its HLO text: matrix FLOPs, collectives, large results, all of one device.

`compiled.cost_analysis()` counts the body of a loop once. Here every computation counts as often as it runs: the body
of a `while` times its trip count, the constant that its condition compares the counter with (once where there is none).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}  # others: the digits in the name
NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant")  # they name another's memory

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def size(self) -> int:
        """Bytes of the result, without the padding of a tiled layout."""
        return sum(int(math.prod(shape) * _item_size(kind)) for kind, shape, _ in arrays(self.type))


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(element type, shape, layout) of every array in a type such as `(bf16[2,3]{1,0}, s32[])`."""
    return [
        (kind, tuple(int(size) for size in sizes.split(",") if size), layout or "")
        for kind, sizes, layout in _ARRAY.findall(type_text)
    ]


def _item_size(kind: str) -> float:
    if kind in BYTES:
        return BYTES[kind]
    digits = re.search(r"\d+", kind)  # f32, s8, u32, f8e4m3fn
    return int(digits[0]) / 8 if digits else 0.0  # a token holds nothing


class Program:
    """A compiled module, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[1], found[2])
                current[instruction.name] = instruction

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one call of the program."""
        runs: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations[name].values():
                inner = times * (self.trip_count(instruction) or 1) if instruction.opcode == "while" else times
                for called in _called(instruction):
                    if called in self.computations:
                        visit(called, inner)

        visit(self.entry, 1)
        return dict(runs)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where its condition is not `counter < constant`."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        for instruction in condition.values():
            if instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
                for operand in instruction.operands:
                    bound = condition.get(operand)
                    if bound is not None and bound.opcode == "constant" and bound.operands[:1]:
                        return int(bound.operands[0])
        return None

    def unbounded(self) -> list[str]:
        """What the loops of unknown trip count do; their bodies count once."""
        return [
            instruction.attribute(r'op_name="([^"]*)"') or instruction.name
            for _, instruction, _ in self._executed()
            if instruction.opcode == "while" and self.trip_count(instruction) is None
        ]

    def _executed(self) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        for name, times in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.values():
                yield computation, instruction, times

    def flops(self) -> float:
        """FLOPs of matrix products and convolutions in one call, on one device; of kernels what they say themselves."""
        total = 0.0
        for computation, instruction, times in self._executed():
            if instruction.opcode == "custom-call":
                total += times * int(instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"') or 0)
            elif instruction.opcode in ("convolution", "dot"):
                shapes = [arrays(computation[operand].type)[0][1] for operand in instruction.operands[:2]]
                count = _convolution_flops if instruction.opcode == "convolution" else _dot_flops
                total += times * count(instruction, *shapes)
        return total

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Kind → (how many run, bytes that one device sends), where rings do the work, in one call.

        A collective that the compiler spreads over several fusions, to overlap it with other work, keeps its channel
        and counts once. A TPU's reduce-scatter is a computation of that name: a sum of which every chip keeps its part.
        """
        seen: dict[str, tuple[str, int, int]] = {}
        instructions = ((name, x, times) for name, times in self.runs.items() for x in self.computations[name].values())
        for computation, instruction, times in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = instruction.attribute(r"channel_id=(\d+)") or instruction.name
            sent = _bytes_sent(kind, instruction)
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind, sent = "reduce-scatter", sent // 2
            if channel not in seen or seen[channel][1] * seen[channel][2] < times * sent:
                seen[channel] = (kind, times, sent)
        totals: dict[str, tuple[int, int]] = {}
        for kind, times, sent in seen.values():
            count, size = totals.get(kind, (0, 0))
            totals[kind] = (count + times, size + times * sent)
        return dict(sorted(totals.items(), key=lambda item: -item[1][1]))

    def cycles(self) -> dict[str, int]:
        """What computes → clock cycles of one call by the TPU compiler's own cost model, which knows no kernels.

        Neither does it count collectives and copies in the background.
        """
        totals: dict[str, int] = defaultdict(int)
        for name in self.runs.keys() - self._fused:
            for instruction in self.computations[name].values():
                estimate = instruction.attribute(r'"estimated_cycles":"(\d+)"')
                if estimate is not None:
                    origin = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
                    totals[origin] += self.runs[name] * int(estimate)
        return dict(totals)

    @cached_property
    def _fused(self) -> set[str]:
        """The computations inside of fusions."""
        instructions = (x for computation in self.computations.values() for x in computation.values())
        return {called for x in instructions if x.opcode == "fusion" for called in _called(x)}

    def largest(self, count: int) -> list[tuple[int, str, str]]:
        """(bytes, type, what computes it) of the largest results in the main memory; equal ones once."""
        found: dict[tuple[str, str], int] = {}
        for name in self.runs.keys() - self._fused:
            for instruction in self.computations[name].values():
                if instruction.opcode in NO_BUFFER or instruction.opcode.endswith(("-start", "-done")):
                    continue
                for kind, shape, layout in arrays(instruction.type):
                    if "S(" not in layout:  # S(1) is the small fast memory
                        label = f"{kind}[{','.join(map(str, shape))}]"
                        origin = instruction.attribute(r'op_name="([^"]*)"') or instruction.name
                        found[label, origin] = int(math.prod(shape) * _item_size(kind))
        ordered = sorted(((size, *key) for key, size in found.items()), reverse=True)
        return [next(x for x in ordered if x[1] == label) for label in dict.fromkeys(x[1] for x in ordered)][:count]


def _parse(name: str, rest: str) -> Instruction:
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands = tuple(part.strip().split(" ")[-1].lstrip("%") for part in rest[:end].split(",") if part.strip())
    return Instruction(name, kind, opcode.strip(), operands, rest[end + 1 :])


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """The place of the parenthesis that closes one opened just before `text`."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _called(instruction: Instruction) -> list[str]:
    called = _CALLED.findall(instruction.attributes)
    for several, one in _BRANCHES.findall(instruction.attributes):
        called += [name.strip().lstrip("%") for name in several.split(",")] if several else [one]
    return called


def _group_size(instruction: Instruction) -> int:
    """Devices in one group: `replica_groups=[8,4]<=[32]`, `{{0,1},{2,3}}` or `mesh['a'=8,'b'=4] {'b'}`.

    The last may name the order of devices in between: `mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'b'}`.

    Raises:
        ValueError: groups that are written in another way; counted as single devices they would send nothing.
    """
    compact = instruction.attribute(r"replica_groups=\[\d+,(\d+)\]")
    if compact:
        return int(compact)
    mesh = re.search(r"replica_groups=@?\w*\[([^\]]*)\](?:,\s*device_ids=\S+)?\s*\{([^}]*)\}", instruction.attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'b', or a part of it: 'b':(2)4
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    listed = instruction.attribute(r"replica_groups=\{\{([\d,]*)\}")
    if listed is None and re.search(r"replica_groups=(?!\{\})", instruction.attributes):
        raise ValueError(f"{instruction.name}: cannot read its groups of devices: {instruction.attributes[:200]}")
    return len(listed.split(",")) if listed else 1


def _bytes_sent(kind: str, instruction: Instruction) -> int:
    size, members = instruction.size, _group_size(instruction)
    if kind == "collective-permute":
        return size
    if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
        size = max((int(math.prod(shape) * _item_size(item)) for item, shape, _ in arrays(instruction.type)), default=0)
    share = (members - 1) / members if members > 1 else 0.0
    turns = {"all-reduce": 2 * share, "reduce-scatter": members * share}  # of the result; a ring reduces, then gathers
    return int(size * turns.get(kind, share))


def _dot_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    del right
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    inner = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * math.prod(arrays(instruction.type)[0][1]) * inner


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Only the products of real elements: a TPU writes batched matrix products as convolutions full of holes."""
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)") or ""
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    out = arrays(instruction.type)[0][1]
    total = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * right[right_labels.index("i")]
    for position, digit in enumerate(sorted(label for label in out_labels if label.isdigit())):
        sizes = (left[left_labels.index(digit)], right[right_labels.index(digit)], out[out_labels.index(digit)])
        total *= _real_pairs(instruction, position, *sizes)
    return total / int(instruction.attribute(r"batch_group_count=(\d+)") or 1)


def _real_pairs(instruction: Instruction, position: int, size: int, kernel: int, out: int) -> int:
    """Pairs of an output and a kernel place along one spatial axis that meet an element, not padding or a hole."""

    def option(name: str, default: str) -> str:
        text = instruction.attribute(rf"window=\{{[^}}]*\b{name}=([\d_x\-]+)")
        return text.split("x")[position] if text else default

    stride, dilation, kernel_dilation = (int(option(x, "1")) for x in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(option("pad", "0_0").split("_")[0])
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * kernel_dilation - low
    return int(((places >= 0) & (places % dilation == 0) & (places // dilation < size)).sum())
