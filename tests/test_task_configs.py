"""Every config of a task holds METHOD section 7's settings, passes its checks, and its step can be built."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from test_configs import EVERY, FILES, abstract_batch, load

from scl_jax import build
from scl_jax.config import ConfigError, active_streams, finalize
from scl_jax.config_check import check
from scl_jax.models import parameters
from scl_jax.training.state import TrainState
from scl_jax.training.step import make_step

TASKS = [name for name in EVERY if name not in FILES]
PAPER = {  # task, pixels, rate, × head, × fusion, batch, epochs, candidates
    "vqa": ("vqa", 384, 5e-6, 50, 10, 512, 10, 128),
    "nlvr2": ("nlvr2", 288, 1e-5, 10, 10, 256, 10, 128),
    "snli_ve": ("entailment", 384, 2e-6, 10, 10, 64, 5, 128),
    "retrieval_f30k": ("retrieval", 384, 5e-6, 10, 10, 512, 10, 128),
    "retrieval_coco": ("retrieval", 384, 5e-6, 5, 5, 512, 10, 256),
    "retrieval_msrvtt": ("retrieval", 224, 5e-6, 5, 5, 256, 10, 128),
    "retrieval_lsmdc": ("retrieval", 224, 5e-6, 5, 5, 256, 10, 128),
}


def finalized(name, variant=""):
    config = load(name).get_config(variant)
    return finalize(config, config.model.text.vocab_size or 1000, answers=23)


def test_every_config_of_a_task_is_in_the_table():
    assert set(TASKS) == set(PAPER)


@pytest.mark.parametrize("name", TASKS)
def test_the_papers_settings(name):
    config = finalized(name)
    (stream,) = active_streams(config)
    s, o = config.data[stream], config.optimizer
    found = (config.task, s.image_size, o.learning_rate, o.multiplier_head, o.multiplier_fusion)
    assert (*found, s.batch_size, config.train.epochs, config.evaluate.rerank) == PAPER[name]
    assert o.warmup == (0.05 if stream == "videos" else 0.1) and o.decay == "linear"
    assert s.frames == (4 if stream == "videos" else 1) and s.flip == "never"
    assert tuple(s.rand_augment) == (2, 9) and tuple(s.crop_scale) == (0.9, 1.0)
    assert not any(s.evaluation_datasets)  # evaluated is what it was fine-tuned on
    assert config.retrieval.others == 15 and not any(config.reference_behaviour.to_dict().values())


@pytest.mark.parametrize("variant", ["", "toy"])
@pytest.mark.parametrize("name", TASKS)
def test_a_config_passes_its_checks_on_the_devices_it_is_for(name, variant):
    config = finalized(name, variant)
    for devices in (1, 8):
        check(config, config.model.text.vocab_size, devices=devices)
    assert config.evaluate.every % config.log.every == 0
    assert config.train.checkpoint_every % config.log.every == 0


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("retrieval")])
def test_zero_shot_retrieval_is_the_same_config_with_the_task_of_pretraining(name):
    config = load(name).get_config()
    config.task = "pretrain"
    check(finalize(config, 50265), 50265)


@pytest.mark.parametrize("metric", ["retrieval/text_to_video/median_rank", "retrieval/video/items"])
def test_a_metric_that_is_no_better_the_higher_it_is_cannot_choose_the_best(metric):
    config = load("retrieval_msrvtt").get_config()
    config.train.best_metric = metric
    with pytest.raises(ConfigError, match=f"train.best_metric is '{metric}'; .* name a recall, score or accuracy"):
        check(finalize(config, 50265), 50265)


def test_a_smoke_run_looks_at_no_split_that_the_config_leaves_alone():
    config = load("retrieval_msrvtt").get_config()  # the data set has no validation part
    config.debug = True
    assert finalize(config, 1000).evaluate.every == 0


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="no variant 'tyo'; it has toy"):
        load("vqa").get_config("tyo")


def test_steps_follow_from_epochs():
    config = finalize(load("nlvr2").get_config(), 50265, examples=86_373)
    assert config.train.steps == 3374
    config = load("nlvr2").get_config()
    config.data.videos.update(datasets=("toy_world/videos",), share=0.5)
    with pytest.raises(ConfigError, match="train.epochs is 10; it is for one stream of data"):
        check(finalize(config, 50265), 50265)


def task_batch(config, stream, rows=64):
    """Shapes of a batch with the targets of the config's task."""
    batch = abstract_batch(config, stream, rows)
    extra = {
        "vqa": {"answer_scores": jax.ShapeDtypeStruct((rows, config.model.answers), jnp.float32)},
        "nlvr2": {"second_pixels": batch.pixels, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)},
        "entailment": {"label": jax.ShapeDtypeStruct((rows,), jnp.int32)},
        "retrieval": {},
    }[config.task]
    return dataclasses.replace(batch, **extra)


# sizes of COCO's and LSMDC's network and step are those of Flickr30k's and MSRVTT's
STEPS = [(name, "") for name in TASKS if not name.endswith(("coco", "lsmdc"))] + [("vqa", "toy"), ("nlvr2", "toy")]


@pytest.mark.parametrize(("name", "variant"), STEPS)
def test_the_step_of_a_config_can_be_built(name, variant):
    config = finalized(name, variant)
    task = build.task(config, config.model.text.vocab_size, 4)
    graph, params = parameters.abstract(build.model_maker(config))
    tx = build.optimizer_maker(config)(params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params))
    step = make_step(task, graph, tx, build.schedule(config), seed=0, dropout=config.model.dropout > 0)
    (stream,) = active_streams(config)
    after, metrics = jax.eval_shape(lambda s, b: step(s, b, task.active(0)), state, task_batch(config, stream))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (after.params, params)]
    assert shapes[0] == shapes[1]
    assert {f"loss/{loss}" for loss in task.active(0)} <= set(metrics)
