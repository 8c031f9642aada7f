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


def configured(config, options):
    """The config of a run, checked."""
    c = load(Path(config).stem).get_config()
    c.update_from_flattened_dict({name: str(v) if isinstance(v, Path) else v for name, v in options.items()})
    check(finalize(c, 1000), 1000)
    return c


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
        c = configured(config, options)
        weights[arm] = {name: c.objectives[name].weight for name in (*ablation.COMPLETION, "matching", "contrastive")}
        assert c.seed == 1 and c.data.videos.share == 0 and c.init.checkpoint.endswith("start")
        assert (task, answers["seed"]) == ("configs/vqa.py:toy", 1)
    off = {arm: {name for name, weight in found.items() if weight == 0} for arm, found in weights.items()}
    assert off == {"none": set(ablation.COMPLETION), "global": {"local_vision", "local_text"}, "global_local": set()}
    assert len({(found["matching"], found["contrastive"]) for found in weights.values()}) == 1


def test_all_arms_continue_a_run_without_completion(ablation):
    ablation.common_start(ablation.options)
    ((_, options),) = ablation.calls
    config = configured("configs/quickstart.py", options)
    o = config.objectives
    assert {o[name].weight for name in ablation.COMPLETION} == {0.0} and config.init.checkpoint == ""
    assert (o.contrastive.start, o.matching.start, o.masked_language.start, config.train.steps) == (500, 600, 0, 1000)


def test_the_table_of_the_ablation_is_mean_and_deviation(ablation):
    by_seed = {str(seed): dict.fromkeys(ablation.METRICS.values(), value) for seed, value in enumerate((0.1, 0.2, 0.3))}
    last = ablation.table({"none": by_seed, "global": {"0": by_seed["1"]}}).splitlines()[-2:]
    assert last[0].startswith("| none | 3 | 20.0 ± 10.0 |") and last[1].startswith("| global | 1 | 20.0 |")


def test_results_are_collected_by_arm_and_seed(ablation, tmp_path):
    for name, found in (("global_0", {"a": 1}), ("global_0_vqa", {"b": 2}), ("global_local_1", {"a": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    assert ablation.collect(tmp_path) == {"global": {"0": {"a": 1, "b": 2}}}  # the other one is not fine-tuned yet


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
