"""What a run says while it runs, and what it leaves in its work directory. Only the first process writes.

    metrics.jsonl     one JSON object a line: `step` and numbers; the same file whether or not the run was interrupted
    speed.jsonl       the numbers that depend on the clock (`speed/…`), which no two runs share
    tensorboard/      both, for TensorBoard
    config.json       the resolved config
    tokenizer/        a copy of the tokenizer, so that the run can be used wherever it lies
    environment.json  git revision, versions, devices, command
    results.json      the final evaluation
    wandb_run.json    what Weights & Biases calls this run, where asked for

Names: `loss/<objective>` and `loss/total`, `accuracy/<objective>`, `learning_rate`, `speed/examples_per_second`,
`speed/data_wait` (share of the time, 0 to 1, that the device waited for a batch, at most) and `speed/mfu`,
`skipped_updates` (how many since the last line). A stream may come between: `loss/videos/contrastive`.
Evaluations keep the names of results.json: `matching/accuracy`, `retrieval/text_to_image/recall@1`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from scl_jax.training.nonfinite import SKIPPED
from scl_jax.training.records import JsonLines, write_json
from scl_jax.training.tensorboard import EventFile

Metrics = Mapping[str, Any]  # name → number: Python, NumPy or a JAX scalar

SPEED = "speed/"
WANDB_RUN = "wandb_run.json"
PERCENTAGES = (
    "accuracy",
    "recall",
    "vqa/score",
    "vqa/video/score",
    "/majority",
    "/in_vocabulary",
    "speed/data_wait",
    "speed/mfu",
)  # shown in per cent where a name holds one of these


class RunLog:
    """The log of one run: console, metrics files, TensorBoard and, if asked for, Weights & Biases.

    Args:
        workdir: made when missing.
        total_steps: of the whole run, for the progress bar.
        is_main: whether this process writes; on the others every method does nothing.
        console: a live display on a terminal, one plain line a log interval elsewhere; False: silence.
        tensorboard: write event files.
        wandb_project: a Weights & Biases project; empty: none.
        resume_step: the step that training continues from (0: from the start); what was logged after it is dropped, to
            be written again. None: keep everything, as an evaluation does.

    Raises:
        ValueError: the work directory cannot be written, or wandb is asked for and not installed.
    """

    def __init__(
        self,
        workdir: Path | str,
        total_steps: int,
        is_main: bool = True,
        *,
        console: bool = True,
        tensorboard: bool = True,
        wandb_project: str = "",
        resume_step: int | None = None,
    ):
        self.workdir = Path(workdir)
        self._is_main = is_main
        self._display = None
        self._events = None
        self._wandb = None
        if not is_main:
            return
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._metrics = JsonLines(self.workdir / "metrics.jsonl")
            self._speed = JsonLines(self.workdir / "speed.jsonl")
        except OSError as error:
            raise ValueError(
                f"cannot write to the work directory {workdir} ({error}): choose another --workdir"
            ) from error
        if resume_step is not None:
            self.truncate_after(resume_step)
        if tensorboard:
            self._events = EventFile(self.workdir / "tensorboard", resume_step)
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, self.workdir)
        if console:
            self._display = _Display(total_steps, resume_step or 0)

    def truncate_after(self, step: int) -> None:
        """Drops what was logged after `step`, so that a restarted run leaves the file of an undisturbed one."""
        if self._is_main:
            self._metrics.truncate_after(step)
            self._speed.truncate_after(step)

    def save_config(self, config: ConfigDict) -> None:
        """Writes config.json and environment.json."""
        if self._is_main:
            write_json(self.workdir / "config.json", config.to_dict())
            write_json(self.workdir / "environment.json", describe_environment())
            if self._wandb is not None:
                self._wandb.config.update(config.to_dict(), allow_val_change=True)

    def write(self, step: int, metrics: Metrics) -> None:
        """Logs the numbers of a step everywhere, and shows them."""
        if not self._is_main:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        speed = {name: value for name, value in numbers.items() if name.startswith(SPEED)}
        lasting = {name: value for name, value in numbers.items() if name not in speed}
        for file, part in ((self._metrics, lasting), (self._speed, speed)):
            if part:
                file.append({"step": step, **part})
        if self._events is not None:
            self._events.write(step, numbers)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if self._display is not None:
            self._display.write(step, numbers)

    def status(self, step: int, metrics: Metrics | None = None) -> None:
        """Moves the progress bar, and shows these numbers without keeping them; cheap enough for every step."""
        if self._display is not None:
            self._display.status(step, {name: _number(value) for name, value in (metrics or {}).items()})

    def progress(self, what: str, done: int, total: int) -> None:
        """A second bar below that of the steps, such as "evaluation: pairs"; it goes when all is done."""
        if self._display is not None:
            self._display.progress(what, done, total)

    def say(self, message: str) -> None:
        """Prints one line above the live display, such as "resumed from step 400"."""
        if self._display is not None:
            self._display.console.print(message, soft_wrap=True, markup=False, highlight=False)

    def results(self, results: Metrics) -> None:
        """Writes results.json, ends the live display, and prints a table: the outcome, so also with the console off."""
        if self._is_main:
            numbers = {name: _number(value) for name, value in results.items()}
            write_results(self.workdir, {name: x for name, x in numbers.items() if not name.startswith(SPEED)})
            if self._display is not None:
                self._display.close()
            Console().print(results_table(numbers))

    def close(self) -> None:
        """Ends the display and closes the files; once is enough, twice does no harm."""
        if not self._is_main:
            return
        if self._display is not None:
            self._display.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        self._metrics.close()
        self._speed.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise  # else the first error tells more


def write_results(workdir: Path | str, results: Metrics) -> Path:
    """Writes `<workdir>/results.json` in one motion: flat names and numbers."""
    path = Path(workdir) / "results.json"
    write_json(path, {name: _number(value) for name, value in results.items()})
    return path


def results_table(results: Metrics) -> Table:
    """A table of results for `rich`: one row a metric, one block a first part of the name; recall and accuracy in %."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold", pad_edge=False)
    table.add_column("results", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    previous = None
    for name, value in results.items():
        block = name.partition("/")[0]
        if previous is not None and block != previous:
            table.add_section()
        table.add_row(name, format_number(name, value))
        previous = block
    return table


def format_number(name: str, value: float) -> str:
    """A number as people read it: shares in per cent, small rates with an exponent, counts whole."""
    if any(part in name for part in PERCENTAGES):
        return f"{100 * value:.1f} %"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"


def describe_environment() -> dict[str, Any]:
    """Where a run happens: git revision, versions, devices, the command."""
    versions = {package: importlib.metadata.version(package) for package in ("jax", "flax", "optax", "grain")}
    return {
        "git_revision": _git("rev-parse", "HEAD") or "unknown",
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        **versions,
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def _git(*arguments: str) -> str:
    """The output of a git command about this source tree, empty when it is no repository or git is missing."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _start_wandb(project: str, workdir: Path):
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(f"log.wandb_project={project!r} needs wandb: pip install wandb, or leave it empty") from error
    # a restart continues its own curves; not those of another run in a folder of this name, whose later steps W&B keeps
    file = workdir / WANDB_RUN
    if not file.exists():
        write_json(file, {"id": uuid.uuid4().hex[:16]})
    name = json.loads(file.read_text())["id"]
    return wandb.init(project=project, dir=str(workdir), name=workdir.name, id=name, resume="allow")


def _number(value: Any) -> float | int:
    number = value if isinstance(value, int | float) else value.item()
    return int(number) if isinstance(number, bool) else number


class _Display:
    """The console: a live bar and table on a terminal, a plain line a log interval where there is none."""

    def __init__(self, total_steps: int, step: int):
        self.console = Console()
        self._total = total_steps
        self._numbers: dict[str, float] = {}
        self._live = None
        self._second: TaskID | None = None  # the bar of an evaluation
        if self.console.is_terminal:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(40), MofNCompleteColumn(), TextColumn("·"))
            times = (TimeElapsedColumn(), TextColumn("elapsed ·"), TimeRemainingColumn(), TextColumn("to go"))
            self._progress = Progress(*columns, *times, console=self.console)
            self._task = self._progress.add_task("step", total=total_steps, completed=step)
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=2)
            self._live.start()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        numbers = {name: x for name, x in numbers.items() if is_headline(name) and (x or name != SKIPPED)}
        self.status(step, numbers)
        if self._live is None:
            line = f"step {step:{len(str(self._total))}d}/{self._total}  {plain_line(numbers)}"
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def status(self, step: int, numbers: dict[str, float]) -> None:
        self._numbers |= numbers
        if self._live is not None:
            self._progress.update(self._task, completed=step)

    def progress(self, what: str, done: int, total: int) -> None:
        if self._live is None:
            return
        if self._second is None:
            self._second = self._progress.add_task("")
        self._progress.update(self._second, description=what, completed=done, total=total)
        if done >= total:
            self._progress.remove_task(self._second)
            self._second = None

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> Group:
        losses = {name: value for name, value in self._numbers.items() if name.startswith("loss/")}
        others = {name: value for name, value in self._numbers.items() if not name.startswith("loss/")}
        both = Table.grid(padding=(0, 4))
        both.add_row(_column("loss", losses), _column("", others))
        return Group(Text(""), self._progress, Text(""), both)


def _column(title: str, numbers: dict[str, float]) -> Table:
    table = Table(box=None, show_header=bool(title), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(title)
    table.add_column("", justify="right")
    for name, value in numbers.items():
        style = "bold" if name == "loss/total" else ""
        table.add_row(short_name(name, keep_first=not title), format_number(name, value), style=style)
    return table


def is_headline(name: str) -> bool:
    """Whether the console shows this metric: of retrieval only recall@1 and the mean; the files hold everything."""
    if name.startswith("retrieval/"):
        return name.endswith(("recall@1", "mean_recall")) and "/contrastive/" not in name
    return not name.startswith("weight/")


def plain_line(numbers: Mapping[str, float]) -> str:
    """The numbers on one line, a name's first part said once: `loss total 3.1, contrastive 1.2 · speed mfu 31.0 %`."""
    groups: dict[str, list[str]] = {}
    for name, value in numbers.items():
        group, _, rest = name.rpartition("/")
        groups.setdefault(group, []).append(f"{rest.replace('_', ' ')} {format_number(name, value)}")
    return " · ".join(f"{group.replace('_', ' ')} {', '.join(parts)}".strip() for group, parts in groups.items())


def short_name(name: str, keep_first: bool = True) -> str:
    """A metric's name for people: `speed/data_wait` → "data wait", `loss/contrastive` → "loss contrastive"."""
    parts = name.removeprefix(SPEED).split("/")
    return " ".join(parts if keep_first else parts[1:]).replace("_", " ")
