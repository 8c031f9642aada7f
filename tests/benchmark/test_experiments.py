"""The experiments of RESULTS.md ask for runs that can be configured, and their tables hold what the runs gave."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_configs import load

from scl_jax.config import finalize
from scl_jax.config_check import check
from scl_jax.data import builders

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """The script with a folder for its runs, none of which is made: every call is recorded as (config, options)."""
    module = script("ablation")
    module.calls = []

    def run(workdir, config, **options):
        module.calls.append((config, options))
        return dict.fromkeys(module.METRICS.values(), 0.5)

    monkeypatch.setattr(module, "run", run)
    module.options = module.parse([f"--out={tmp_path}"])
    return module


def test_arms_of_the_ablation_differ_in_completion_alone(ablation):
    weights = {}
    for arm in ablation.ARMS:
        ablation.one_run(ablation.options, arm, seed=1)
        (config, options), (task, answers) = ablation.calls[-2:]
        c = load(Path(config).stem).get_config()
        c.update_from_flattened_dict({name: str(v) if isinstance(v, Path) else v for name, v in options.items()})
        check(finalize(c, 1000), 1000)
        weights[arm] = {name: c.objectives[name].weight for name in (*ablation.COMPLETION, "matching", "contrastive")}
        assert c.seed == 1 and c.data.videos.share == 0 and c.init.checkpoint.endswith("start")
        assert (task, answers["seed"]) == ("configs/vqa.py:toy", 1)
    off = {arm: {name for name, weight in found.items() if weight == 0} for arm, found in weights.items()}
    assert off == {"none": set(ablation.COMPLETION), "global": {"local_vision", "local_text"}, "global_local": set()}
    assert len({(found["matching"], found["contrastive"]) for found in weights.values()}) == 1


def test_the_ablation_starts_before_completion(ablation, tmp_path):
    run = tmp_path / "run"
    for step in (1800, 2100, 2400):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    starts = {"objectives": {name: {"start": 2300} for name in ablation.COMPLETION}}
    (run / "config.json").write_text(json.dumps(starts))
    kept = ablation.before_completion(run, tmp_path / "kept")
    assert [path.name for path in (kept / "checkpoints").iterdir()] == ["2100"]
    (run / "config.json").write_text(json.dumps(starts).replace("2300", "900"))
    with pytest.raises(FileNotFoundError, match="completion began at step 900"):
        ablation.before_completion(run, tmp_path / "other")


def test_the_table_of_the_ablation_is_mean_and_deviation(ablation):
    by_seed = {str(seed): dict.fromkeys(ablation.METRICS.values(), value) for seed, value in enumerate((0.1, 0.2, 0.3))}
    last = ablation.table({"none": by_seed, "global": {"0": by_seed["1"]}}).splitlines()[-2:]
    assert last[0].startswith("| none | 3 | 20.0 ± 10.0 |") and last[1].startswith("| global | 1 | 20.0 |")


def test_what_is_known_without_looking_at_the_picture(tmp_path):
    downstream = script("downstream_toy")
    pairs = [("how many a?", "2"), ("how many b?", "2"), ("how many c?", "1"), ("is it red?", "no")]
    assert downstream.majority(pairs) == 0.5 and downstream.majority(pairs, 2) == 0.75
    for name in ("questions", "entailment", "images"):
        builders.prepare(f"toy_world/{name}", tmp_path, train=1, validation=1, test=4)
    record = builders.open_source("toy_world/questions", "test", tmp_path)[0]
    texts = list(downstream.texts_with_answers(tmp_path, "toy_world/questions"))
    assert texts[: len(record["captions"])] == list(zip(record["captions"], record["answers"][::10], strict=True))
    assert downstream.baselines("image_retrieval", tmp_path) == (0.25, 0.25)
    assert 1 / 3 <= downstream.baselines("snli_ve", tmp_path)[0] <= 1


def test_every_task_of_the_table_has_a_toy_config_and_its_metric():
    for task in script("downstream_toy").TASKS.values():
        config = load(task.config).get_config("toy")
        assert all(metric.split("/")[0] == config.train.best_metric.split("/")[0] for metric in task.metrics)
        assert task.dataset in (*config.data.images.datasets, *config.data.videos.datasets)
