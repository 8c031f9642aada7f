"""One run from its config: tokenizer, mesh, network, data and evaluation put together; then train or evaluate.

<workdir>/config.json  metrics.jsonl  results.json  checkpoints/  loss_curves.png  retrieval_images.png …
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from scl_jax import build, plots
from scl_jax.config import ConfigError, active_streams, check, differences, finalize
from scl_jax.convert.initial import initial_parameters
from scl_jax.data.pipeline import EvaluationSet, evaluation_set, train_dataset
from scl_jax.data.tokens import Tokenizer, load_tokenizer
from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.evaluation.ranking import Ranking
from scl_jax.models import parameters
from scl_jax.partition import on_mesh
from scl_jax.training import sharding
from scl_jax.training.checkpoint import Checkpoints, abstract_state
from scl_jax.training.logging import RunLog
from scl_jax.training.loop import Schedule, Window, train
from scl_jax.training.state import TrainState, init_state, state_shardings
from scl_jax.training.step import make_step


class Session:
    """Everything of one run. Nothing is compiled and no work directory is touched before the config has been checked.

    Raises:
        ConfigError: options that cannot work, or that differ from those the work directory was begun with.
        FileNotFoundError: shards or the tokenizer are missing; the message says how to make them.
    """

    def __init__(self, config: ConfigDict, workdir: Path | str):
        self.workdir = Path(workdir)
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer or f"{config.data.dir}/tokenizer")
        self.config = finalize(config, self.tokenizer.vocab_size)
        check(self.config, self.tokenizer.vocab_size, jax.device_count(), jax.process_count())
        self._check_workdir()
        self.mesh = sharding.make_mesh(**self.config.mesh)
        self.task = build.pretraining(self.config, self.tokenizer.vocab_size, self.tokenizer.mask_id)
        self.is_main = jax.process_index() == 0
        self.initial_notes: list[str] = []

    def _check_workdir(self) -> None:
        """A work directory that holds a checkpoint can only be continued with the same config."""
        file = self.workdir / "config.json"
        if not file.exists() or not any(self.workdir.glob("checkpoints/[0-9]*")):
            return
        changed = differences(json.loads(file.read_text()), json.loads(json.dumps(self.config.to_dict())))
        if changed:
            raise ConfigError(
                f"{self.workdir} holds a run with another config:\n  "
                + "\n  ".join(changed)
                + "\nContinue it with its own config, or choose another --workdir."
            )

    @cached_property
    def checkpoints(self) -> Checkpoints:
        t = self.config.train
        return Checkpoints(self.workdir / "checkpoints", t.keep_latest, t.keep_best, t.best_metric)

    def initial_state(self) -> tuple[Any, Any, TrainState]:
        """(graph, optimizer, fresh state), sharded; what `config.init` names is filled in unless a run is continued."""
        maker, optimizer = build.model_maker(self.config), build.optimizer_maker(self.config)
        graph, tx, state = init_state(maker, optimizer, self.mesh, self.config.seed, self.config.optimizer.ema > 0)
        if self.checkpoints.latest() is None:
            params, self.initial_notes = initial_parameters(self.config, state.params)
            ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # buffers of its own: both are donated
            state = dataclasses.replace(state, params=params, ema=ema)
        return graph, tx, state

    def say_initial(self, log: RunLog) -> None:
        """What step 0 starts from, line by line."""
        for line in self.initial_notes:
            log.say(line)

    def evaluation_sets(self, split: str) -> dict[str, EvaluationSet]:
        """The evaluation set of every stream that is on."""
        e, data = self.config.evaluate, self.config.data
        return {
            name: evaluation_set(
                data[name],
                data[name].evaluation_datasets if any(data[name].evaluation_datasets) else data[name].datasets,
                split,
                data_dir=data.dir,
                text_length=data.text_length,
                tokenizer=self.tokenizer,
                batch_size=e.batch_size,
                max_items=e.max_items,
                threads=data.threads,
            )
            for name in active_streams(self.config)
        }

    def evaluation(self, graph: Any, split: str) -> PretrainingEvaluation:
        """The evaluation of a split."""
        e = self.config.evaluate
        sets = self.evaluation_sets(split)
        return PretrainingEvaluation(
            graph,
            self.task,
            self.mesh,
            sets,
            batch_size=e.batch_size,
            rerank=e.rerank,
            equal_captions=e.equal_captions,
            seed=self.config.seed,
        )

    def open_log(self, resume_step: int | None) -> RunLog:
        o = self.config.log
        return RunLog(
            self.workdir,
            self.config.train.steps,
            self.is_main,
            console=o.console,
            tensorboard=o.tensorboard,
            wandb_project=o.wandb_project,
            resume_step=resume_step,
        )

    def train(self) -> bool:
        """Trains from the start or the newest checkpoint, then evaluates; False when SIGTERM ended it early."""
        config = self.config
        data = train_dataset(  # before the state: missing shards should be said at once
            config.data,
            seed=config.seed,
            tokenizer=self.tokenizer,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        graph, tx, state = self.initial_state()
        iterator = iter(data)
        evaluation = self.evaluation(graph, config.evaluate.split) if config.evaluate.every else None
        window = Window()
        begun = self.checkpoints.latest()
        if begun is not None:
            state, progress = self.checkpoints.restore(abstract_state(state))
            iterator.set_state(progress["data"])
            window = Window(progress["window"])
        with self.open_log(begun or 0) as log:
            log.save_config(config)
            count = parameters.count(state.params)
            begin = f"continuing from step {begun}" if begun is not None else "starting"
            log.say(f"{begin}: {count / 1e6:.1f} M parameters, {self.mesh.devices.size} device(s)")
            self.say_initial(log)
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
                window,
            )
            if complete:
                self.report(log, graph, state)
            else:
                log.say(f"stopped by a signal; the same command continues from step {int(state.step)}")
        return complete

    def evaluate(self) -> None:
        """Evaluates the newest checkpoint, or without one `config.init.checkpoint`, on the final split."""
        graph, _, state = self.initial_state()
        if self.checkpoints.latest() is not None or not self.config.init.checkpoint:
            state, _ = self.checkpoints.restore(abstract_state(state))
        with self.open_log(None) as log:
            self.say_initial(log)
            self.report(log, graph, state)

    def schedule(self) -> Schedule:
        t = self.config.train
        return Schedule(
            t.steps, self.config.log.every, t.checkpoint_every, self.config.evaluate.every, tuple(t.profile_steps)
        )

    def jit_step(self, graph: Any, tx: Any, state: TrainState) -> Any:
        """The jitted step of this run; its state is donated and keeps its layout."""
        config = self.config
        step = make_step(
            self.task,
            graph,
            tx,
            build.schedule(config),
            seed=config.seed,
            accumulate=config.train.accumulate,
            dropout=config.model.dropout > 0 or config.model.attention_dropout > 0,
            ema=config.optimizer.ema,
        )
        layout = state_shardings(tx, state.params, self.mesh, state.ema is not None)
        return jax.jit(
            on_mesh(self.mesh, step),
            static_argnums=2,
            donate_argnums=0,
            in_shardings=(layout, sharding.batch_sharding(self.mesh)),
            out_shardings=(layout, sharding.replicated(self.mesh)),
        )

    def report(self, log: RunLog, graph: Any, state: TrainState) -> None:
        """The final evaluation: results.json, the table, and the pictures."""
        evaluation = self.evaluation(graph, self.config.evaluate.final_split)
        results, rankings = evaluation(averaged(state))
        log.results({"step": int(state.step), **results})
        if self.is_main:
            self.draw(evaluation.sets, rankings)

    def draw(self, sets: Mapping[str, EvaluationSet], rankings: dict[str, Ranking]) -> None:
        """loss_curves.png and retrieval_<stream>.png."""
        metrics = self.workdir / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            plots.loss_curves(metrics, self.workdir / "loss_curves.png")
        for stream, ranking in rankings.items():
            examples = sets[stream]
            plots.retrieval_sheet(
                ranking,
                examples.captions,
                examples.caption_item,
                examples.frames,
                self.workdir / f"retrieval_{stream}.png",
                kind="image" if stream == "images" else "video",
            )


def averaged(state: TrainState) -> parameters.Params:
    """The running average of the parameters where there is one, else the parameters."""
    return state.params if state.ema is None else state.ema
