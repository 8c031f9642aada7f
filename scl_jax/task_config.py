"""Options of the tasks, and their checks: what `config.py` holds for pre-training, for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from ml_collections import ConfigDict

HEADS = {  # the heads of the network, by task
    "pretrain": ("contrastive", "matching", "masked_language"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "entailment": ("entailment",),
    "retrieval": ("contrastive", "rank"),
}
TASKS = tuple(HEADS)
CLASSIFIERS = ("vqa", "nlvr2", "entailment")
METRICS = {  # how the names of a task's metrics begin
    "pretrain": ("retrieval/", "matching/", "masked_language/"),
    "vqa": ("vqa/",),
    "nlvr2": ("nlvr2/",),
    "entailment": ("entailment/",),
    "retrieval": ("retrieval/",),
}
NOT_BETTER = (  # last parts of the names of metrics that are no better the higher they are
    "median_rank", "items", "texts", "examples", "pairs_scored", "matching_weight", "majority", "in_vocabulary",
)  # fmt: skip
CLASSES = {  # what a data set of the task tells apart; the answers of visual questions are the data set's own
    "nlvr2": ("false", "true"),
    "entailment": ("contradiction", "neutral", "entailment"),
}


def retrieval_defaults() -> ConfigDict:
    """Fine-tuning for retrieval."""
    return ConfigDict(
        {
            "others": 15,  # texts of other images that an image is compared with
            "hard_negatives": 0,  # how many of these are drawn by contrastive similarity, not evenly
            "contrastive_weight": 0.5,
            "group_size": 64,  # samples among which the other texts are found
        }
    )


def group_option(task: str) -> str:
    """The name of the option that `group_size` reads."""
    return "retrieval.group_size" if task == "retrieval" else "objectives.group_size"


def group_size(config: ConfigDict) -> int:
    """Samples that a micro-batch must keep together."""
    sizes = {"pretrain": config.objectives.group_size, "retrieval": config.retrieval.group_size}
    return sizes.get(config.task, 1)


def check_task(config: ConfigDict) -> Iterator[str]:
    """What cannot work with `config.task`."""
    if config.task not in TASKS:
        yield f"task is {config.task!r}; choose {', '.join(TASKS)}"
        return
    metric = config.train.best_metric
    if metric and not metric.startswith(METRICS[config.task]):
        yield (
            f"train.best_metric is {metric!r}, but the metrics of task {config.task} begin with "
            f"{' or '.join(METRICS[config.task])}"
        )
    elif metric.rpartition("/")[2] in NOT_BETTER:
        yield (
            f"train.best_metric is {metric!r}; the best checkpoint is that of the highest number, which says nothing "
            "good here: name a recall, score or accuracy"
        )
    streams = [name for name in ("images", "videos") if any(config.data[name].datasets) and config.data[name].share > 0]
    if config.train.epochs < 0 or (config.train.epochs and len(streams) != 1):
        yield f"train.epochs is {config.train.epochs}; it is for one stream of data, else set train.steps"
    if config.task == "vqa" and config.model.answers == 1:  # 0: not known, as data are missing
        yield f"model.answers is {config.model.answers}; set 0 to take the answers of the data set"
    if config.task == "retrieval":
        r = config.retrieval
        if not 1 <= r.others < r.group_size:
            yield (
                f"retrieval.others is {r.others}; it must be at least 1, and below retrieval.group_size, "
                f"the {r.group_size} samples they are found among"
            )
        if not 0 <= r.hard_negatives <= r.others:
            yield f"retrieval.hard_negatives is {r.hard_negatives}; it counts some of the {r.others} retrieval.others"
        if r.contrastive_weight < 0:
            yield f"retrieval.contrastive_weight is {r.contrastive_weight}; 0 switches it off"
