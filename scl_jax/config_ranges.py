"""What every single option may be, by dotted name: a range, a choice or a kind. `config_check.py` looks at pairs.

A test walks over all options and finds each here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

LARGEST = 2**31 - 1  # of whole numbers: they become 32-bit ones on the device


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, without the ends where these are open."""

    low: float = -LARGEST
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    hint: str = ""

    def problem(self, name: str, value: Any) -> str:
        """What is wrong with a value; empty: nothing."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"{name} is {value!r}; it must be a number"
        high = min(self.high, LARGEST) if isinstance(value, int) else self.high
        above = value > self.low if self.open_low else value >= self.low
        below = value < high if self.open_high else value <= high
        if math.isfinite(value) and above and below:
            return ""
        return f"{name} is {value!r}; {self.hint or self._rule(high)}"

    def _rule(self, high: float) -> str:
        if math.isinf(high) or high == LARGEST:
            most = f" and at most {LARGEST}" if high == LARGEST and self.high != LARGEST else ""
            return "it must be positive" if self.open_low else f"it must be at least {self.low:g}{most}"
        ends = [" (excluded)" if is_open else "" for is_open in (self.open_low, self.open_high)]
        return f"it must lie between {self.low:g}{ends[0]} and {high:g}{ends[1]}"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def problem(self, name: str, value: Any) -> str:
        """What is wrong with a value; empty: nothing."""
        listed = f"{', '.join(self.words[:-1])} or {self.words[-1]}"
        return "" if value in self.words else f"{name} is {value!r}; choose {listed}"


@dataclass(frozen=True)
class Values:
    """A tuple: `count` values (None: one or more) that each suit `each`, and together `together`."""

    each: Any
    count: int | None
    rule: str
    together: Callable[[Any], bool] = lambda _: True

    def problem(self, name: str, value: Any) -> str:
        """What is wrong with a value; empty: nothing."""
        sound = isinstance(value, tuple | list) and (len(value) == self.count if self.count else len(value) > 0)
        if sound and not any(self.each.problem(name, x) for x in value) and self.together(value):
            return ""
        return f"{name} is {value!r}; {self.rule}"


@dataclass(frozen=True)
class Kind:
    """Any value of a type."""

    kind: type
    what: str

    def problem(self, name: str, value: Any) -> str:
        """What is wrong with a value; empty: nothing."""
        return "" if isinstance(value, self.kind) else f"{name} is {value!r}; it must be {self.what}"


TEXT, SWITCH = Kind(str, "a text"), Kind(bool, "True or False")
POSITIVE, COUNT, NOT_NEGATIVE = Range(0, open_low=True), Range(1), Range(0)
SHARE, RATIO, DECAY = Range(0, 1), Range(0, 1, open_low=True, open_high=True), Range(0, 1, open_high=True)
NAMES = Values(TEXT, None, "it must be names of data sets, such as ('toy_world/images',)")

# a pattern of dotted names → what they may be; the first that matches counts
RULES: tuple[tuple[str, Any], ...] = (
    (r"task|init\.\w+|data\.(dir|tokenizer)|evaluate\.(final_)?split|train\.best_metric|log\.wandb_project", TEXT),
    (r"compilation_cache", TEXT),
    (r"debug|reference_behaviour\.\w+|evaluate\.(equal_captions|all_pairs|best)|log\.(tensorboard|console)", SWITCH),
    (r"seed", NOT_NEGATIVE),
    (r"model\.remat", Choice(("auto", "none", "dots", "full"))),
    (r"model\.dtype", Choice(("float32", "bfloat16"))),
    (r"model\.attention", Choice(("auto", "xla", "by_head", "mosaic", "fused", "cudnn"))),
    (r"model\.(answers|unroll)", NOT_NEGATIVE),
    (r"model\.(attention_)?dropout", DECAY),
    (r"model\.(initial_temperature|initializer_range)", POSITIVE),
    (r"model\.(\w+\.)?\w+", COUNT),  # sizes
    (r"objectives\.\w+\.(weight|start|ramp)", NOT_NEGATIVE),
    (r"objectives\.\w+\.(temperature|temperature_min|temperature_max)", POSITIVE),
    (r"objectives\.matching\.hard_negatives", SHARE),
    (r"objectives\.(\w+\.\w+|text_mask)_ratio", RATIO),
    (r"objectives\.group_size", COUNT),
    (r"retrieval\.(hard_negatives|contrastive_weight)", NOT_NEGATIVE),
    (r"retrieval\.(others|group_size)", COUNT),
    (r"data\.text_length", Range(3, hint="it must be at least 3 (<s>, a token, </s>)")),
    (r"data\.prefetch", NOT_NEGATIVE),
    (r"data\.threads", COUNT),
    (r"data\.bad_records", Choice(("fail", "skip"))),
    (r"data\.max_skipped_share", Range(0, 1, open_high=True, hint="it is a share from 0 to below 1")),
    (r"data\.\w+\.(evaluation_)?datasets", NAMES),
    (r"data\.\w+\.share", Range(0, hint="it is a share of the steps; 0 switches the stream off")),
    (r"data\.\w+\.(batch_size|frames|image_size)", COUNT),
    (r"data\.\w+\.resize", Choice(("bicubic", "fast"))),
    (r"data\.\w+\.flip", Choice(("never", "unless_sided", "always"))),
    (
        r"data\.\w+\.crop_scale",
        Values(
            Range(0, 1, open_low=True), 2, "use (least, most) of the area, 0 < least ≤ most ≤ 1", lambda v: v[0] <= v[1]
        ),
    ),
    (
        r"data\.\w+\.rand_augment",
        Values(
            NOT_NEGATIVE, 2, "use (operations, magnitude from 0 to 30)", lambda v: isinstance(v[0], int) and v[1] <= 30
        ),
    ),
    (r"optimizer\.decay", Choice(("linear", "cosine", "constant"))),
    (r"optimizer\.(b1|b2)", DECAY),
    (r"optimizer\.eps", POSITIVE),
    (r"optimizer\.warmup", Range(0, hint="it is a share of the steps, or a number of steps when above 1")),
    (r"optimizer\.ema", Range(0, 1, open_high=True, hint="it is a decay from 0 (off) to below 1")),
    (r"optimizer\.\w+", NOT_NEGATIVE),
    (r"mesh\.\w+", Range(hint="it must be a number of devices, or -1: all that the others leave")),
    (r"distributed\.\w+", Range(1, hint="it must be at least a second")),
    (r"train\.(epochs|keep_best)", NOT_NEGATIVE),
    (r"train\.accumulate", Range(1, hint="1 means no accumulation")),
    (r"train\.keep_latest", Range(1, hint="the newest checkpoint must be kept")),
    (r"train\.(steps|checkpoint_every|max_nonfinite_in_row)|log\.every", COUNT),
    (
        r"train\.profile_steps",
        Values(
            NOT_NEGATIVE, 2, "use (first, last) step, first < last; (0, 0): none", lambda v: v[0] < v[1] or not any(v)
        ),
    ),
    (r"evaluate\.every", Range(0, hint="0 means only at the end")),
    (r"evaluate\.(max_items|rerank)", NOT_NEGATIVE),
    (r"evaluate\.batch_size", COUNT),
    (r"evaluate\.matching_weights", Values(NOT_NEGATIVE, None, "use weights from 0 on, such as (1.0,)")),
)


def options_of(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from options_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def rule_of(name: str) -> Any:
    """What an option may be.

    Raises:
        KeyError: an option without a rule.
    """
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule
    raise KeyError(f"no rule in config_ranges.py says what {name} may be")


def out_of_range(config: ConfigDict) -> dict[str, str]:
    """The options whose value cannot be right whatever the others are, with what is wrong."""
    found = {name: rule_of(name).problem(name, value) for name, value in options_of(config)}
    return {name: problem for name, problem in found.items() if problem}
