"""The evaluation of a task from the config, and what it leaves in the work directory: pictures and predictions.

<workdir>/loss_curves.png  retrieval_<stream>.png  predictions/<task>_<stream>_<split>.json, .csv or .jsonl
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from scl_jax import plots
from scl_jax.config import active_streams
from scl_jax.data.pipeline import EvaluationSet, evaluation_set
from scl_jax.data.records import NOTHING, LeftOut
from scl_jax.data.task_pipeline import TaskEvaluationSet, task_evaluation_set
from scl_jax.data.tokens import Tokenizer
from scl_jax.evaluation.classification import ClassificationEvaluation
from scl_jax.evaluation.predictions import write_answers, write_entailment, write_rankings, write_statements
from scl_jax.evaluation.pretraining import PretrainingEvaluation
from scl_jax.evaluation.retrieval import RetrievalEvaluation
from scl_jax.task_config import CLASSIFIERS
from scl_jax.training.sharding import process_rows

Evaluation = RetrievalEvaluation | ClassificationEvaluation  # params → (metrics, what `leave` writes)
WRITERS = {
    "vqa": (write_answers, "json"),
    "nlvr2": (write_statements, "csv"),
    "entailment": (write_entailment, "csv"),
}


def evaluation_sets(
    config: ConfigDict, split: str, tokenizer: Tokenizer, mesh: Mesh, left_out: Mapping[str, LeftOut] = NOTHING
) -> dict[str, Any]:
    """The evaluation set of every stream that is on, without the records that are left out of it."""
    e, data = config.evaluate, config.data
    open_set: Callable[..., EvaluationSet | TaskEvaluationSet] = (
        task_evaluation_set if config.task in CLASSIFIERS else evaluation_set
    )
    return {
        name: open_set(
            data[name],
            data[name].evaluation_datasets if any(data[name].evaluation_datasets) else data[name].datasets,
            split,
            data_dir=data.dir,
            text_length=data.text_length,
            tokenizer=tokenizer,
            batch_size=e.batch_size,
            max_items=e.max_items,
            rows_of=partial(process_rows, mesh),
            threads=data.threads,
            left_out=left_out.get(name, NOTHING),
        )
        for name in active_streams(config)
    }


def make_evaluation(
    config: ConfigDict,
    task: Any,
    graph: Any,
    mesh: Mesh,
    sets: Mapping[str, Any],
    classes: tuple[str, ...],
    progress: Callable[[str, int, int], None],
) -> Evaluation:
    """The evaluation of the config's task on these sets; `classes` are what a classifier tells apart."""
    e = config.evaluate
    if config.task in CLASSIFIERS:
        return ClassificationEvaluation(graph, task, mesh, sets, classes=classes, progress=progress)
    options: dict[str, Any] = {
        "batch_size": e.batch_size,
        "rerank": e.rerank,
        "all_pairs": e.all_pairs,
        "equal_captions": e.equal_captions,
        "weights": e.matching_weights,
        "progress": progress,
    }
    if config.task == "retrieval":
        return RetrievalEvaluation(graph, mesh, sets, head="rank", **options)
    return PretrainingEvaluation(graph, task, mesh, sets, seed=config.seed, **options)


def said(metrics: Mapping[str, float]) -> list[str]:
    """Lines about an evaluation that its table does not tell: what re-scoring cost."""
    lines = []
    for stream, middle in (("images", ""), ("videos", "video/")):
        scored = metrics.get(f"retrieval/{middle}pairs_scored")
        if scored:
            texts, items = metrics[f"retrieval/{middle}texts"], metrics[f"retrieval/{middle}items"]
            seconds = metrics[f"speed/retrieval_{stream}_seconds"]
            lines.append(
                f"{stream}: {scored:,.0f} of {texts * items:,.0f} pairs scored in {seconds:.1f} s "
                f"({texts:,.0f} texts × {items:,.0f} items)"
            )
    return lines


def leave(
    workdir: Path, config: ConfigDict, split: str, sets: Mapping[str, Any], findings: Mapping[str, Any]
) -> list[Path]:
    """Writes the predictions, draws the pictures, and returns the files of predictions."""
    files = []
    for stream, found in findings.items():
        stem = workdir / "predictions" / f"{config.task}_{stream}_{split}"
        if config.task in CLASSIFIERS:
            write, suffix = WRITERS[config.task]
            files.append(write(found, stem.with_suffix(f".{suffix}")))
        elif config.task == "retrieval":
            files.append(write_rankings(found, sets[stream], stem.with_suffix(".jsonl")))
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        plots.loss_curves(metrics, workdir / "loss_curves.png")
    for stream, found in findings.items() if config.task not in CLASSIFIERS else ():
        examples = sets[stream]
        plots.retrieval_sheet(
            found,
            examples.captions,
            examples.caption_item,
            examples.frames,
            workdir / f"retrieval_{stream}.png",
            kind="image" if stream == "images" else "video",
        )
    return files
