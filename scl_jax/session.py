"""One run from its config: tokenizer, mesh, network, data and evaluation put together; then train or evaluate.

<workdir>/config.json  classes.json  skipped.jsonl  metrics.jsonl  results.json  checkpoints/  and report.py's files
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from scl_jax import build, remat
from scl_jax.bad_records import BadRecords
from scl_jax.begun import check_config, config_before, has_tokenizer, is_begun, other_classes, other_tokenizer
from scl_jax.config import ConfigError, active_streams, finalize
from scl_jax.config_check import check
from scl_jax.convert.initial import initial_parameters
from scl_jax.data.pipeline import train_dataset
from scl_jax.data.records import NOTHING, LeftOut, Records
from scl_jax.data.task_pipeline import class_names, task_dataset
from scl_jax.data.tokens import RUN_TOKENIZER, Tokenizer, load_run_tokenizer, load_tokenizer
from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.models import parameters
from scl_jax.preflight import evaluated_datasets, missing, tried, weighs
from scl_jax.report import Evaluation, evaluation_sets, leave, make_evaluation, said
from scl_jax.task_config import CLASSES, CLASSIFIERS
from scl_jax.training import sharding
from scl_jax.training.checkpoint import Checkpoints, abstract_state
from scl_jax.training.distributed import end_at_sigterm, meet
from scl_jax.training.inspection import Inspection
from scl_jax.training.logging import RunLog
from scl_jax.training.loop import Feed, Schedule, Window, train
from scl_jax.training.nonfinite import Guard, NonFiniteError, records
from scl_jax.training.records import write_json
from scl_jax.training.state import TrainState, init_state, plan_state
from scl_jax.training.workdir import held, located


class Session:
    """Everything of one run. Nothing is compiled and no work directory is touched before the config has been checked.

    mode: what it will do, "train", "evaluate" or "replay"; the data that this reads must be there.

    Raises:
        ConfigError: all options that cannot work, and all they name that is missing, with how to make it; or options
            that differ from those the work directory was begun with.
        WorkdirError: the work directory is no folder but an address.
    """

    def __init__(self, config: ConfigDict, workdir: Path | str, mode: str = "train"):
        self.workdir, problems = located(workdir), []
        named = config.data.tokenizer or f"{config.data.dir}/tokenizer"
        load = partial(load_run_tokenizer, self.workdir) if mode == "replay" else load_tokenizer
        tokenizer = tried(problems, lambda: load(named), None)
        self.classes = tried(problems, lambda: classes_of(config, mode), ())
        counted = config.train.epochs > 0 and mode != "evaluate"
        later = counted and config.data.bad_records == "skip"  # which records count takes a while
        examples = tried(problems, lambda: examples_of(config), 0) if counted and not later else 0
        vocab_size = tokenizer.vocab_size if tokenizer else 0
        answers = len(self.classes) if config.task == "vqa" else 0
        devices = jax.device_count()
        self.config = finalize(config, vocab_size or config.model.text.vocab_size or 1, answers, examples, devices)
        before = tried(problems, lambda: config_before(self.workdir), None)
        if before and self.config.train.epochs and mode == "evaluate":
            self.config.train.steps = before.train.steps  # counted when the run began
        problems += missing(self.config, mode, is_begun(self.workdir))
        if tokenizer:
            problems += tried(problems, lambda: other_tokenizer(tokenizer, self.config, self.workdir), [])
        problems += tried(problems, lambda: other_classes(self.classes, self.config, self.workdir), [])
        problems = list(dict.fromkeys(problems))
        check(self.config, vocab_size, devices, jax.process_count(), problems)
        assert tokenizer is not None  # else a problem
        self.tokenizer: Tokenizer = tokenizer
        self.bad_records = BadRecords(self.config, self.workdir)
        if later:
            examples = examples_of(config, self.bad_records.left_out("train"))
            self.config = finalize(config, vocab_size, answers, examples, devices)
        check_config(self.config, self.workdir)
        self.mesh = sharding.make_mesh(**self.config.mesh)
        self.task = build.task(self.config, self.tokenizer.vocab_size, self.tokenizer.mask_id)
        self.is_main = jax.process_index() == 0
        self.initial_notes: list[str] = []
        self._log: RunLog | None = None

    @cached_property
    def checkpoints(self) -> Checkpoints:
        t = self.config.train
        return Checkpoints(self.workdir / "checkpoints", t.keep_latest, t.keep_best, t.best_metric)

    def initial_state(self, complete: bool = False, fresh: bool = False) -> tuple[Any, Any, TrainState]:
        """(graph, optimizer, state), sharded: new, with what `config.init` names filled in.

        Where there is a checkpoint to restore, the state is shapes with shardings only: its numbers would be drawn in
        vain and lie beside the restored ones.

        complete: every head must come from there; fresh ones are no model to evaluate.
        fresh: a new state whatever checkpoints there are, to go through the run from its beginning.
        """
        new = fresh or self.checkpoints.latest() is None
        plan = (build.model_maker(self.config), build.optimizer_maker(self.config), self.mesh)
        with_ema = self.config.optimizer.ema > 0
        graph, tx, state = init_state(*plan, self.config.seed, with_ema) if new else plan_state(*plan, with_ema)
        meet("state is there", self.config.distributed.compile_timeout)
        if new:
            params, self.initial_notes = initial_parameters(self.config, state.params, complete, self.classes)
            ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # buffers of its own: both are donated
            state = dataclasses.replace(state, params=params, ema=ema)
        return graph, tx, state

    def say_initial(self, log: RunLog) -> None:
        """What step 0 starts from, line by line."""
        for line in self.initial_notes:
            log.say(line)

    def evaluation(self, graph: Any, split: str) -> Evaluation:
        """The evaluation of a split."""
        sets = evaluation_sets(self.config, split, self.tokenizer, self.mesh, self.bad_records.left_out(split))
        return make_evaluation(self.config, self.task, graph, self.mesh, sets, self.classes, self._show_progress)

    def _show_progress(self, what: str, done: int, total: int) -> None:
        if self._log is not None:
            self._log.progress(what, done, total)

    def open_log(self, resume_step: int | None) -> RunLog:
        """The log of this run; progress goes there, too."""
        o = self.config.log
        self._log = RunLog(
            self.workdir,
            self.config.train.steps,
            self.is_main,
            console=o.console,
            tensorboard=o.tensorboard,
            wandb_project=o.wandb_project,
            resume_step=resume_step,
        )
        return self._log

    def _look_at_records(self) -> None:
        """Everything that the run will read is looked at before it begins, where bad records may be left out."""
        before = config_before(self.workdir)
        if before is not None:
            self.bad_records.check_continued(before.data.bad_records)
        e = self.config.evaluate
        for split in ("train", e.final_split, *((e.split,) if e.every or weighs(self.config) else ())):
            self.bad_records.left_out(split)

    def _say_left_out(self, log: RunLog) -> None:
        if self.is_main:
            self.bad_records.write()
        for note in self.bad_records.notes:
            log.say(note)

    def training_data(self) -> Any:
        """The endless batches of this process: items with a caption in pre-training, else every text with its item."""
        make = train_dataset if self.config.task == "pretrain" else task_dataset
        return make(
            self.config.data,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            rows_of=partial(sharding.process_rows, self.mesh),
            left_out=self.bad_records.left_out("train"),
        )

    def train(self) -> bool:
        """Trains from the start or the newest checkpoint, then evaluates; False when SIGTERM ended it early.

        Raises:
            WorkdirError: the work directory is in use, or cannot be written.
            CheckpointError: a checkpoint could not be written, or none can be read.
            NonFiniteError: too many steps in a row were not finite.
        """
        with held(self.workdir, self.is_main):
            return self._train()

    def _train(self) -> bool:
        config = self.config
        self._look_at_records()
        data = self.training_data()  # before the state: missing shards should be said at once
        finished = (self.checkpoints.latest() or 0) >= config.train.steps
        config = self.config = self._with_remat(finished)
        graph, tx, state = self.initial_state()
        iterator = iter(data)
        evaluation = self.evaluation(graph, config.evaluate.split) if config.evaluate.every else None
        state, begun, progress = self._continued(state, iterator)
        if finished and int(state.step) < config.train.steps:  # its last checkpoint was damaged
            config = self.config = self._with_remat()
            graph, tx, _ = self.initial_state()
        with self.open_log(begun or 0) as log:
            log.save_config(config)
            self._say_left_out(log)
            if self.is_main:
                self._leave_vocabularies(begun is not None)
            count = parameters.count(state.params)
            begin = f"continuing from step {begun}" if begun is not None else "starting"
            for note in self.checkpoints.notes:
                log.say(note)
            log.say(f"{begin}: {count / 1e6:.1f} M parameters, {self.mesh.devices.size} device(s)")
            self.say_initial(log)
            try:
                state, complete = train(
                    self.task,
                    self.jit_step(graph, tx, state),
                    state,
                    iterator,
                    self.mesh,
                    self.schedule(),
                    self.checkpoints,
                    log,
                    lambda state: evaluation(averaged(state))[0] if evaluation else {},
                    Window(progress["window"]),
                    self.guard(log, progress.get("skipped_in_row", 0)),
                    config.distributed.compile_timeout,
                )
            except NonFiniteError as error:
                self.checkpoints.wait()
                if error.objectives:
                    raise
                raise NonFiniteError(f"{error} {self._blame(graph, error)}", (), error.record) from error
            if complete:
                end_at_sigterm()
                step = self.chosen_step()
                if step not in (None, int(state.step)):
                    state = abstract_state(state)  # lets its numbers go before others come
                    state, _ = self.checkpoints.restore(state, step)
                self.report(log, graph, state)
            else:
                log.say(f"stopped by a signal; the same command continues from step {int(state.step)}")
        return complete

    def _leave_vocabularies(self, begun: bool) -> None:
        """What makes the run useful wherever it lies; a begun run keeps its own tokenizer."""
        if not begun or not has_tokenizer(self.workdir):
            self.tokenizer.save(self.workdir / RUN_TOKENIZER)
        if self.classes:
            write_json(self.workdir / "classes.json", list(self.classes))

    def _with_remat(self, finished: bool = False) -> ConfigDict:
        """The config with a policy for `model.remat`, which may be "auto"; takes a compilation or two where it is.

        finished: no step is left, so that nothing is compiled and the policy stays what it was.
        """
        before = config_before(self.workdir)
        if finished and before and self.config.model.remat == "auto":
            return remat.with_policy(self.config, before.model.remat)

        def say(line: str) -> None:
            if self.is_main and self.config.log.console:
                print(line, flush=True)  # the log opens when it is known which step it continues from

        found = remat.resolve(self.config, self.task, active_streams(self.config), self.mesh, say)
        return remat.with_policy(found, remat.agreed(found.model.remat, self.config.distributed.compile_timeout))

    def _continued(self, state: TrainState, iterator: Any) -> tuple[TrainState, int | None, dict[str, Any]]:
        """(state, its step or None, progress) from the newest checkpoint, if any, and the iterator set to its place."""
        if self.checkpoints.latest() is None:
            return state, None, {"window": {}}
        state, progress = self.checkpoints.restore(abstract_state(state))
        iterator.set_state(progress["data"])
        return state, int(state.step), progress

    def guard(self, log: RunLog, in_row: int) -> Guard:
        """What looks after steps that are not finite; a checkpoint is kept before the last one that has a record."""
        folder, limit = self.workdir / "nonfinite", self.config.train.max_nonfinite_in_row
        for step in records(folder)[-1:]:
            self.checkpoints.keep_before(step)
        return Guard(folder, limit, self.config.seed, log.say, self.is_main, in_row, self.checkpoints.keep_before)

    def inspection(self, graph: Any) -> Inspection:
        """What takes a step of this run apart by objective."""
        m, t = self.config.model, self.config.train
        dropout = m.dropout > 0 or m.attention_dropout > 0
        seed = self.config.seed
        return Inspection(self.task, graph, self.mesh, seed=seed, accumulate=t.accumulate, dropout=dropout)

    def _blame(self, graph: Any, error: NonFiniteError) -> str:
        """The objectives whose gradient is not finite in the step that ended a run, whose state has not moved since."""
        iterator = iter(self.training_data())
        iterator.set_state(error.record["data"])
        batch = Feed(iterator, self.mesh).take().batch
        state = dataclasses.replace(error.state, step=jnp.asarray(error.record["step"] - 1, jnp.int32))
        bad = [finding for finding in self.inspection(graph)(state, batch) if not finding.finite]
        found = "; ".join(f"of {finding.objective}, first {finding.first}" for finding in bad)
        return f"The gradient that is not finite is that {found or 'of no objective alone'}."

    def evaluate(self) -> None:
        """Evaluates the chosen checkpoint, or without one `config.init.checkpoint`, on the final split.

        Raises:
            FileNotFoundError: there is neither; no folder is made then.
        """
        end_at_sigterm()
        if not self.workdir.exists():  # else another process may hold it, which goes first
            self._check_evaluated()
        with held(self.workdir, self.is_main):
            self._check_evaluated()
            self._evaluate()

    def _check_evaluated(self) -> None:
        if not is_begun(self.workdir) and not self.config.init.checkpoint:
            raise FileNotFoundError(
                f"no checkpoint in {self.workdir}: give the work directory of a run, or weights by init.checkpoint"
            )

    def _evaluate(self) -> None:
        graph, _, state = self.initial_state(complete=True)
        if self.checkpoints.latest() is not None or not self.config.init.checkpoint:
            state, _ = self.checkpoints.restore(abstract_state(state), self.chosen_step())
        self.bad_records.left_out(self.config.evaluate.final_split)
        with self.open_log(None) as log:
            self.say_initial(log)
            self._say_left_out(log)
            self.report(log, graph, state)

    def schedule(self) -> Schedule:
        t, e = self.config.train, self.config.evaluate
        last = e.every > 0 and e.best
        return Schedule(t.steps, self.config.log.every, t.checkpoint_every, e.every, tuple(t.profile_steps), last)

    def jit_step(self, graph: Any, tx: Any, state: TrainState) -> Any:
        """The jitted step of this run; its state is donated and keeps its layout."""
        return build.train_step(self.config, self.task, graph, tx, state, self.mesh)

    def report(self, log: RunLog, graph: Any, state: TrainState) -> None:
        """The final evaluation: results.json, the table, pictures and predictions."""
        split = self.config.evaluate.final_split
        evaluation = self.evaluation(graph, split)
        if isinstance(evaluation, PretrainingEvaluation) and weighs(self.config):
            held_out = self.evaluation(graph, self.config.evaluate.split)
            assert isinstance(held_out, PretrainingEvaluation)
            evaluation.fix_weights(averaged(state), held_out)
        results, findings = evaluation(averaged(state))
        for line in said(results):
            log.say(line)
        log.results({"step": int(state.step), **results})
        if self.is_main:
            for file in leave(self.workdir, self.config, split, evaluation.sets, findings):
                log.say(f"predictions: {file}")

    def chosen_step(self) -> int | None:
        """The checkpoint that counts at the end: the best by `train.best_metric` where asked for, else the newest."""
        best = self.checkpoints.best() if self.config.evaluate.best else None
        return self.checkpoints.latest() if best is None else best


def averaged(state: TrainState) -> parameters.Params:
    """The running average of the parameters where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema


def examples_of(config: ConfigDict, left_out: Mapping[str, LeftOut] = NOTHING) -> int:
    """The training examples of an epoch, where `train.epochs` asks: items in pre-training, texts in fine-tuning."""
    if not config.train.epochs or config.debug:
        return 0
    count = 0
    for name in active_streams(config):
        records = Records(config.data[name].datasets, "train", config.data.dir, left_out.get(name, NOTHING))
        count += len(records) if config.task == "pretrain" else sum(records.text_counts())
    return count


def classes_of(config: ConfigDict, mode: str = "train") -> tuple[str, ...]:
    """The answers or labels that the classifier of the config's task tells apart; none for other tasks.

    mode: "evaluate" asks the data that are evaluated, else those of training are asked.

    Raises:
        ConfigError: the data sets have none, or others than the task.
        FileNotFoundError: a data set is not prepared.
    """
    if config.task not in CLASSIFIERS:
        return ()
    streams = active_streams(config)
    if mode == "evaluate":
        split, names = config.evaluate.final_split, [n for s in streams for n in evaluated_datasets(config, s)]
    else:
        split, names = "train", [name for stream in streams for name in config.data[stream].datasets if name]
    if not names:
        return ()  # `check` says so
    found = class_names(names, config.data.dir, split)
    wanted = CLASSES.get(config.task)
    if not found or wanted not in (None, found):
        classes = f"the classes {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else "no classes"
        needs = f"the classes {', '.join(wanted)}" if wanted else "answers"
        raise ConfigError(f"{', '.join(names)}: has {classes}, but task {config.task} needs a data set with {needs}")
    if config.task == "vqa" and config.model.answers not in (0, len(found)):
        raise ConfigError(
            f"model.answers is {config.model.answers}, but {', '.join(names)} has {len(found)} answers; "
            "set 0 to take those of the data set"
        )
    return found
