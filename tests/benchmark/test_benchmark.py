"""The benchmarks run, at toy size, and count what they say they count."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_run

from scl_jax.benchmark import input as input_benchmark
from scl_jax.benchmark import pipeline, report, retrieval, step
from scl_jax.benchmark.workload import complete, random_arrays
from scl_jax.config import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config():
    c = toy_run.config(Path())
    c.model.text.vocab_size = 60
    return c


def compare_module():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_config_is_completed_without_shards_or_tokenizer(config):
    completed = complete(config, "videos", 24)
    assert completed.data.videos.batch_size == 24 and completed.data.images.share == 0
    with pytest.raises(ConfigError, match="batch_size 7 does not divide"):
        complete(config, "images", 7)


def test_random_texts_are_whole(config):
    arrays = random_arrays(complete(config, "images", 8), "images", 8)
    assert arrays["pixels"].shape == (8, 1, 64, 64, 3) and arrays["token_mask"].all()
    assert (arrays["word_ids"][:, [0, -1]] == -1).all() and (np.diff(arrays["word_ids"][0, :-1]) == 1).all()


def test_the_input_benchmark_names_both_resizes(config):
    rates = input_benchmark.measure(config.data, 0.03)
    assert {"images/example, bicubic", "images/example, fast", "clips/decode", "clips/example, fast"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values())


def test_the_pipeline_benchmark_reads_the_shards_of_the_config(tmp_path):
    toy = toy_run.config(toy_run.prepare(tmp_path))
    results = pipeline.measure(toy, 0.2)
    assert results["threads"] == toy.data.threads == 1
    assert results["examples_per_second"] > 0 and results["processor_milliseconds_per_example"] > 0
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        pipeline.measure(toy_run.config(tmp_path / "nowhere"), 0.2)


def test_results_are_written_with_the_machine(tmp_path):
    report.write(str(tmp_path / "new" / "results.json"), {"seconds": 1.5})
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert written["seconds"] == 1.5 and written["machine"]["devices"] == jax.device_count()


def test_the_comparison_gives_both_sides_one_config():
    compare = compare_module()
    options = compare.parse(["--debug", "--batch=8", "--dtype=bfloat16", "--remat=dots", "--worker=ours"])
    config = compare.load_config(options)
    assert (config.data.images.batch_size, config.model.dtype, config.model.remat) == (8, "bfloat16", "dots")


def test_the_comparison_takes_another_checkout_and_fewer_layers(tmp_path, capsys):
    compare = compare_module()
    options = compare.parse(["--batch=8", "--sides", "ours", "before", f"--before={ROOT}", "--layers", "3", "2", "1"])
    model = compare.load_config(options).model
    assert (model.vision.layers, model.text.layers, model.fusion.layers) == (3, 2, 1)
    with pytest.raises(SystemExit):
        compare.parse(["--sides", "ours", "before", f"--before={tmp_path}"])
    assert "must name another checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_of_two_checkouts_alternate():
    compare = compare_module()
    argv = ["--debug", "--batch=8", "--repeats=2", "--sides", "ours", "before", f"--before={ROOT}"]
    results = compare.compare(compare.parse(argv), argv)
    assert len(results["ours"]["seconds"]) == len(results["before"]["seconds"]) == 2


@pytest.mark.slow
def test_a_step_is_timed_and_counted(config):
    results = step.measure(config, "images", 16, repeats=2, warmup=1, with_profile=True)
    assert results["samples_per_second"] == pytest.approx(16 / results["seconds_per_step"])
    assert 0 < results["mfu"] < 1 and results["peak_bytes"] > 0
    assert any(name.startswith("vision/mlp") for name in results["seconds_by_scope"])


@pytest.mark.slow
def test_retrieval_scores_every_candidate_pair(config):
    results = retrieval.measure(config, "images", items=20, batch_size=8, rerank=4)
    assert 80 <= results["pairs"] <= 160 and results["items_per_second"] > 0
