"""Every test runs on the CPU with 8 virtual devices, and checks the shapes in the signatures of models and objectives.

`JAX_PLATFORMS=cuda pytest -m gpu` runs the tests that need a GPU on one.

A test that takes `tag` runs once for every recording of the reference in `golden_dir` (SCL_GOLDEN_DIR, default
tests/golden) and fails where there is none.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

gc.set_threshold(
    100_000, 20, 100
)  # tracing makes many objects that live on: looking for rubbish took a tenth of the time
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# tests compile much and run little: a quarter of the compile time, the same numbers; in one piece, since both
# cores are taken
FAST_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_opt_preset=FAST_COMPILE"
)
os.environ.setdefault("XLA_FLAGS", FAST_COMPILE)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# the same program is compiled once: a restarted run, another test, another worker
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for parsed flags
jaxtyping.install_import_hook(["scl_jax.models", "scl_jax.objectives"], "beartype.beartype")

# Coverage's tracer doubles the time of what traces large programs, and these tests run lines that others run too
NOT_MEASURED = (
    "test_session.py::test_an_interrupted_run",
    "test_session.py::test_every_mesh",
    "test_configs.py",
    "test_task_configs.py",
    "test_parity.py",
    "test_parity_downstream.py",
    "test_shared_views.py",
    "test_unusual_batches.py",
    "test_step.py::test_an_accumulated_batch",
    "test_optimizer.py::test_three_steps",
    "test_flops.py",
    "test_sharding.py",
    "test_retrieval.py",
    "test_gallery.py",
    "test_bad_records.py",
    "test_initial.py",
    "test_remat.py::test_each_policy",
    "test_remat.py::test_a_run_chooses",
    "test_remat.py::test_a_finished_run",
    "test_finetuning.py::test_visual_questions",
    "test_models.py::test_attention_by_head",
    "test_models.py::test_the_kernel_for_tpus",
    "test_ahead.py",
)
GOLDEN_DIR = Path(os.environ.get("SCL_GOLDEN_DIR", Path(__file__).with_name("golden")))


def golden_tags() -> list[str]:
    """The recordings in the golden folder: every `<tag>.npz` with `<tag>.safetensors` and `<tag>.json` beside it."""
    return sorted(
        arrays.stem
        for arrays in GOLDEN_DIR.glob("*.npz")
        if arrays.with_suffix(".safetensors").exists() and arrays.with_suffix(".json").exists()
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tag" in metafunc.fixturenames:
        tags = golden_tags()
        metafunc.parametrize("tag", tags or [None], ids=tags or ["missing"], indirect=True, scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: the longest tests should not be what one worker is left with."""
    items.sort(key=lambda item: not item.path.name.startswith(("test_session", "test_finetuning")))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """NOT_MEASURED runs without coverage: pytest-cov starts two tracers a worker, and its `no_cover` stops one."""
    if not any(part in item.nodeid for part in NOT_MEASURED):
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of the recorded tensors; missing data fails, it does not skip."""
    if not golden_tags():
        pytest.fail(f"no recording <tag>.npz + .safetensors + .json in {GOLDEN_DIR}: restore it or set SCL_GOLDEN_DIR")
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def tag(request: pytest.FixtureRequest, golden_dir: Path) -> str:
    """The name of one recording, such as `tiny_image`; `golden_dir` fails first when there is none."""
    return request.param


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory of a very small model with random weights and every head."""
    from tiny_model import write_run

    return write_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_run: Path):
    """That model, loaded."""
    import scl_jax

    return scl_jax.load(str(tiny_run), batch_sizes=(1, 8))
