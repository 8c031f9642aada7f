"""Fine-tuning runs: from a checkpoint of another resolution to results, the best checkpoint, predictions."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from scl_jax import build
from scl_jax.config import ConfigError
from scl_jax.convert.checkpoints import read_parameters
from scl_jax.convert.rules import ConversionError
from scl_jax.data import builders
from scl_jax.data.tokens import train_tokenizer
from scl_jax.inference.weights import read_weights
from scl_jax.session import Session
from scl_jax.training import sharding
from scl_jax.training.loop import Feed
from scl_jax.training.records import write_json
from scl_jax.types import FIELDS, Batch

SETS = ("images", "videos", "questions", "statements", "entailment")
DATA = {"vqa": "questions", "nlvr2": "statements", "entailment": "entailment", "retrieval": "images"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy_tasks")
    texts: list[str] = []
    for name in SETS:
        builders.prepare(f"toy_world/{name}", folder, train=16, validation=6, test=6)
        source = builders.open_source(f"toy_world/{name}", "train", folder)
        texts += [text for index in range(len(source)) for text in source[index]["captions"]]
    train_tokenizer(texts, folder / "tokenizer", 400)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiles faster."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(sharding, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def pretrained(data_dir, tmp_path_factory) -> Path:
    """A work directory of pre-training as it begins: 64 px."""
    workdir = tmp_path_factory.mktemp("pretrained")
    session = Session(toy_run.config(data_dir, **{"mesh.data": -1}), workdir)
    _, _, state = session.initial_state()
    with session.open_log(0) as log:
        log.save_config(session.config)
    session.checkpoints.save(7, state, {})
    session.checkpoints.wait()
    return workdir


def config(data_dir: Path, task: str, stream: str = "images", **changes):
    """Four steps of fine-tuning at 32 px, an evaluation after two."""
    c = toy_run.config(data_dir, task=task)
    c.model.vision.image_size = 32
    other = "videos" if stream == "images" else "images"
    dataset = f"toy_world/{'videos' if stream == 'videos' else DATA[task]}"
    c.data[stream].update(datasets=(dataset,), batch_size=8, image_size=32, share=1.0, flip="never")
    c.data[other].share = 0.0
    c.data.text_length = 32
    c.retrieval.update(others=3, group_size=4)
    c.train.update(steps=4, checkpoint_every=2)
    c.train.best_metric = {
        "vqa": "vqa/score",
        "nlvr2": "nlvr2/accuracy",
        "entailment": "entailment/accuracy",
        "retrieval": "retrieval/mean_recall_of_streams",
    }[task]
    c.evaluate.update(every=2, batch_size=8, best=True)
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.parametrize("task", ["pretrain", *DATA])
def test_the_planned_batch_is_that_of_the_data(task, data_dir, tmp_path):
    """What `model.remat=auto` compiles is the step that then runs."""
    options = toy_run.config(data_dir, **{"mesh.data": -1}) if task == "pretrain" else config(data_dir, task)
    session = Session(options, tmp_path)
    real = Feed(iter(session.training_data()), session.mesh).take()
    planned = build.batch_shapes(session.config, real.stream, session.mesh)

    def kinds(batch: Batch) -> dict:
        arrays = {name: getattr(batch, name) for name in FIELDS if getattr(batch, name) is not None}
        return {name: (array.shape, array.dtype, array.sharding) for name, array in arrays.items()}

    assert kinds(planned) == kinds(real.batch)


def run(data_dir: Path, workdir: Path, pretrained: Path, task: str, **changes) -> dict:
    """The results of a run from the checkpoint."""
    session = Session(config(data_dir, task, **changes, **{"init.checkpoint": str(pretrained)}), workdir)
    assert session.train()
    notes = "\n".join(session.initial_notes)
    head = (
        "rank: starts from row 1 of the matching head" if task == "retrieval" else f"as initialised: (some of) {task}"
    )
    assert head in notes and "vision.position_embedding: 17 → 5 rows (resize_position_rows)" in notes
    best = session.checkpoints.best()
    results = json.loads((workdir / "results.json").read_text())
    assert results["step"] == best and best in (2, 4)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    metric = session.config.train.best_metric
    evaluated = {line["step"]: line[metric] for line in lines if metric in line}
    assert evaluated.keys() == {2, 4} and evaluated[best] == max(evaluated.values())
    return results


def records(folder: Path, name: str, split: str = "test") -> list[dict]:
    source = builders.open_source(f"toy_world/{name}", split, folder)
    return [source[index] for index in range(len(source))]


def test_visual_questions(data_dir, pretrained, tmp_path):
    results = run(data_dir, tmp_path, pretrained, "vqa")
    questions = [text_id for record in records(data_dir, "questions") for text_id in record["text_ids"]]
    assert results["vqa/examples"] == len(questions)
    assert 0 <= results["vqa/score"] <= 1 and 0 < results["vqa/majority"] < 1 and results["vqa/in_vocabulary"] == 1
    answers = json.loads((tmp_path / "predictions/vqa_images_test.json").read_text())
    assert [str(answer["question_id"]) for answer in answers] == questions
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert {answer["answer"] for answer in answers} <= set(classes)
    assert list(read_weights(str(tmp_path)).answers) == classes  # whoever loads the run hears words


@pytest.mark.slow
def test_statements_about_two_images(data_dir, pretrained, tmp_path):
    results = run(data_dir, tmp_path, pretrained, "nlvr2")
    with (tmp_path / "predictions/nlvr2_images_test.csv").open() as stream:
        predicted = dict(csv.reader(stream))
    labels = {
        text_id: ("False", "True")[label]
        for record in records(data_dir, "statements")
        for text_id, label in zip(record["text_ids"], record["labels"], strict=True)
    }
    assert predicted.keys() == labels.keys()
    right = np.mean([predicted[text_id] == label for text_id, label in labels.items()])
    assert results["nlvr2/accuracy"] == pytest.approx(right)
    types, _ = read_parameters(tmp_path, results["step"])
    assert types["fusion.token_type"].shape[0] == 3


@pytest.mark.slow
def test_entailment(data_dir, pretrained, tmp_path):
    results = run(data_dir, tmp_path, pretrained, "entailment")
    with (tmp_path / "predictions/entailment_images_test.csv").open() as stream:
        heading, *rows = csv.reader(stream)
    assert heading == ["pairID", "label"] and len(rows) == results["entailment/examples"]
    assert {label for _, label in rows} <= {"contradiction", "neutral", "entailment"}


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["images", "videos"])
def test_retrieval(data_dir, pretrained, tmp_path, stream):
    results = run(data_dir, tmp_path, pretrained, "retrieval", stream=stream, **{"retrieval.hard_negatives": 1})
    middle = "" if stream == "images" else "video/"
    pairs = results[f"retrieval/{middle}pairs_scored"]
    assert 0 < pairs < results[f"retrieval/{middle}texts"] * results[f"retrieval/{middle}items"]
    lines = (tmp_path / f"predictions/retrieval_{stream}_test.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == results[f"retrieval/{middle}texts"] + results[f"retrieval/{middle}items"]
    assert first["scores"] == sorted(first["scores"], reverse=True) and len(first["items"]) == len(first["scores"])
    assert not any(name.startswith("speed/") for name in results)


def test_a_head_that_the_checkpoint_lacks_cannot_be_evaluated(data_dir, pretrained, tmp_path):
    session = Session(config(data_dir, "vqa", **{"init.checkpoint": str(pretrained)}), tmp_path)
    with pytest.raises(ConversionError, match=r"has no head vqa, which task vqa evaluates: fine-tune from it"):
        session.evaluate()


@pytest.fixture(scope="module")
def renumbered(data_dir, tmp_path_factory) -> Path:
    """The same data with the last two answers of the questions swapped."""
    folder = shutil.copytree(data_dir, tmp_path_factory.mktemp("renumbered") / "data")
    (file,) = folder.glob("toy_world/questions/*/metadata.json")
    metadata = json.loads(file.read_text())
    metadata["classes"][-2:] = metadata["classes"][:-3:-1]
    file.write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_a_begun_run_keeps_its_answers(data_dir, renumbered, tmp_path, mode):
    begun = Session(config(data_dir, "vqa"), tmp_path)
    write_json(tmp_path / "config.json", begun.config.to_dict())
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    Session(config(renumbered, "vqa"), tmp_path, mode)  # it has no list
    write_json(tmp_path / "classes.json", list(begun.classes))
    Session(config(data_dir, "vqa"), tmp_path, mode)
    message = r"classes.json lists 23 classes, .* class 21 is 'yes' there and 'no' in the data"
    with pytest.raises(ConfigError, match=message):
        Session(config(renumbered, "vqa"), tmp_path, mode)


def test_an_evaluation_of_a_classifier_needs_no_training_split(data_dir, tmp_path):
    builders.prepare("toy_world/statements", tmp_path / "data", train=1, validation=6, test=6)
    info = next((tmp_path / "data").glob("toy_world/statements/*/dataset_info.json"))
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] != "train"]
    info.write_text(json.dumps(content))
    options = config(tmp_path / "data", "nlvr2", **{"data.tokenizer": str(data_dir / "tokenizer")})
    session = Session(options, tmp_path / "run", "evaluate")
    assert session.classes == ("false", "true")
    with pytest.raises(ConfigError, match="has no split 'train'"):
        Session(options, tmp_path / "run")


def test_a_checkpoint_of_another_architecture_is_named(data_dir, pretrained, tmp_path):
    changes = {"init.checkpoint": str(pretrained), "model.fusion.layers": 2, "model.fusion.mlp_width": 64}
    with pytest.raises(ConversionError, match=r"another network \(model\.fusion\.layers: 1 → 2; .*mlp_width: 32 → 64"):
        Session(config(data_dir, "nlvr2", **changes), tmp_path).initial_state()


def test_a_data_set_of_another_task_is_named(data_dir, tmp_path):
    wrong = config(data_dir, "nlvr2", **{"data.images.datasets": ("toy_world/questions",)})
    with pytest.raises(
        ConfigError, match="toy_world/questions: has the classes .*, but task nlvr2 needs .* false, true"
    ):
        Session(wrong, tmp_path)
    with pytest.raises(
        ConfigError, match="toy_world/images: has no classes, but task vqa needs a data set with answers"
    ):
        Session(config(data_dir, "vqa", **{"data.images.datasets": ("toy_world/images",)}), tmp_path)


def test_another_number_of_answers_is_named(data_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"model.answers is 3129, but toy_world/questions has 23 answers"):
        Session(config(data_dir, "vqa", **{"model.answers": 3129}), tmp_path)
