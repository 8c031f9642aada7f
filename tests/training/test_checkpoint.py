"""The best checkpoint is kept, and known after a restart; what is damaged is not taken for whole."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scl_jax.training.checkpoint import CheckpointError, Checkpoints, abstract_state, no_space
from scl_jax.training.state import TrainState


def save(checkpoints: Checkpoints, values: dict[int, float | None]) -> None:
    for step, value in values.items():
        state = TrainState(np.zeros([], np.int32), {"x": np.ones(2)}, ())
        checkpoints.save(step, state, {}, None if value is None else {"accuracy": value})
    checkpoints.wait()
    checkpoints.close()


def test_the_best_checkpoint_survives_later_ones_and_a_restart(tmp_path):
    options = {"keep_latest": 1, "keep_best": 1, "best_metric": "accuracy"}
    save(Checkpoints(tmp_path, **options), {1: 0.2, 2: 0.6, 3: 0.4, 4: None})
    again = Checkpoints(tmp_path, **options)
    assert again.best() == 2 and again.latest() == 4
    save(again, {5: 0.5, 6: None})
    restarted = Checkpoints(tmp_path, **options)
    assert restarted.best() == 2 and restarted.latest() == 6
    save(restarted, {7: 0.7})
    assert Checkpoints(tmp_path, **options).best() == 7


def test_without_an_evaluation_there_is_no_best_checkpoint(tmp_path):
    save(Checkpoints(tmp_path, best_metric="accuracy"), {1: None})
    assert Checkpoints(tmp_path, best_metric="accuracy").best() is None


def test_a_best_metric_that_no_evaluation_has_is_an_error_that_names_those_there_are(tmp_path):
    checkpoints = Checkpoints(tmp_path, best_metric="acuracy")
    with pytest.raises(CheckpointError, match="best_metric is 'acuracy', which .* they have accuracy"):
        save(checkpoints, {1: None, 2: 0.5})
    assert checkpoints.latest() == 2  # whole, with its metrics
    checkpoints.close()
    again = Checkpoints(tmp_path, best_metric="acuracy")
    with pytest.raises(CheckpointError, match="they have accuracy"):
        again.best()
    again.close()
    assert Checkpoints(tmp_path, best_metric="accuracy").best() == 2


def test_a_checkpoint_scored_by_another_metric_is_not_the_best(tmp_path):
    save(Checkpoints(tmp_path, keep_latest=1, best_metric="accuracy"), {1: 0.9, 2: 0.1})
    options = {"keep_latest": 1, "keep_best": 1, "best_metric": "recall"}
    checkpoints = Checkpoints(tmp_path, **options)
    for step, recall in ((3, 0.3), (4, 0.2), (5, 0.1)):
        checkpoints.save(step, state_of(step), {}, {"recall": recall})
    checkpoints.wait()
    assert checkpoints.best() == 3 and sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 5]


COUNT_BLOCKS = """
import gc, sys
import numpy as np
from scl_jax.training.checkpoint import Checkpoints
checkpoints, state = Checkpoints(sys.argv[1]), {f"p{i}": np.zeros(2) for i in range(200)}
def blocks_after(steps):
    for step in steps:
        checkpoints.save(step, state, {})
    checkpoints.wait()
    gc.collect()
    return sys.getallocatedblocks()
print((-blocks_after(range(5)) + blocks_after(range(5, 15))) / 10)
checkpoints.close()
"""


def test_saves_leave_no_memory_behind(tmp_path):
    """TensorStore keeps what it returns as JSON: 850 blocks a save of 200 arrays where Orbax asks as it likes, now 50.

    In a process of its own, where nothing else is at work.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COUNT_BLOCKS, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 300


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGES = {
    "data cut short": lambda step: cut(largest(step / "state"), 0.5),
    "data empty": lambda step: cut(largest(step / "state"), 0),
    "data zero": lambda step: zeros(largest(step / "state")),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "half of state gone": lambda step: [path.unlink() for path in (step / "state").glob("[_a-m]*") if path.is_file()],
    "progress gone": lambda step: shutil.rmtree(step / "progress"),
    "progress cut short": lambda step: cut(step / "progress" / "metadata", 0.5),
    "metrics cut short": lambda step: cut(step / "metrics" / "metrics", 0.5),
    "description gone": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "description empty": lambda step: cut(step / "_CHECKPOINT_METADATA", 0),
    "all gone but the folder": lambda step: [shutil.rmtree(x) if x.is_dir() else x.unlink() for x in step.iterdir()],
}


def state_of(step: int) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), {"x": jax.random.normal(jax.random.key(step), (300, 50))}, ())


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = Checkpoints(folder, keep_latest=3, best_metric="accuracy")
    for step in (2, 4, 6):
        checkpoints.save(step, state_of(step), {"data": step}, {"accuracy": 0.1 * step})
    checkpoints.wait()
    checkpoints.close()
    return folder


def copied(three: Path, tmp_path: Path) -> Path:
    return shutil.copytree(three, tmp_path / "checkpoints")


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_set_aside_and_the_one_before_taken(three, tmp_path, damage):
    folder = copied(three, tmp_path)
    DAMAGES[damage](folder / "6")
    checkpoints = Checkpoints(folder, keep_latest=3, best_metric="accuracy")
    state, progress = checkpoints.restore(abstract_state(state_of(0)))
    assert int(state.step) == 4 and progress == {"data": 4}
    np.testing.assert_array_equal(state.params["x"], state_of(4).params["x"])
    (note,) = checkpoints.notes
    assert note.startswith("checkpoint 6 cannot be read (") and note.endswith(
        f"set aside in {tmp_path}/broken_checkpoints"
    )
    assert (tmp_path / "broken_checkpoints/6").is_dir() and checkpoints.best() == 4
    checkpoints.save(6, state_of(6), {"data": 6}, {"accuracy": 0.6})  # its place is free
    checkpoints.wait()
    assert int(Checkpoints(folder).restore(abstract_state(state_of(0)))[0].step) == 6


def test_what_is_left_of_a_removal_that_was_cut_short_is_said_to_be_that(three, tmp_path):
    folder = copied(three, tmp_path)
    DAMAGES["state gone"](folder / "2")
    checkpoints = Checkpoints(folder, keep_latest=3, best_metric="accuracy")
    (note,) = checkpoints.notes
    assert note.startswith("checkpoint 2 (older than 6) was being removed, or is damaged (state is missing): set aside")
    assert checkpoints.latest() == 6


@pytest.mark.parametrize("damage", ["data empty", "state gone"])
def test_where_nothing_can_be_read_that_is_an_error_and_nothing_is_begun_anew(three, tmp_path, damage):
    folder = copied(three, tmp_path)
    for step in (2, 4, 6):
        DAMAGES[damage](folder / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint of .* can be read; the last one tried: step [26] "):
        Checkpoints(folder).restore(abstract_state(state_of(0)))
    assert list(folder.glob("[0-9]*"))


def test_a_named_checkpoint_is_not_replaced_by_another(three, tmp_path):
    folder = copied(three, tmp_path)
    DAMAGES["data empty"](folder / "4")
    with pytest.raises(CheckpointError, match="checkpoint 4 of .* cannot be read"):
        Checkpoints(folder).restore(abstract_state(state_of(0)), 4)


NOT_DAMAGE = [
    MemoryError("Unable to allocate 200. MiB for an array"),
    *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES)),
    ValueError("RESOURCE_EXHAUSTED: Failed to open: \"state/d/ab\": Too many open files [os_error_code='24']"),
    ValueError('Error reading "params.x/0.0" in OCDBT database: Input/output error [OS error 5: EIO]'),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345678 bytes."),
]


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=repr)
def test_what_is_no_damage_ends_the_run_and_sets_nothing_aside(three, tmp_path, monkeypatch, error):
    folder = copied(three, tmp_path)
    checkpoints = Checkpoints(folder, keep_latest=3, best_metric="accuracy")

    def restore(*_, **__):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not restore") from cause

    monkeypatch.setattr(checkpoints._manager, "restore", restore)
    for step in (None, 4):
        with pytest.raises(CheckpointError, match=f"checkpoint {step or 6} of .* cannot be read now ") as said:
            checkpoints.restore(abstract_state(state_of(0)), step)
        assert str(error).splitlines()[0] in str(said.value) and "\n" not in str(said.value)
    assert not checkpoints.notes and not (tmp_path / "broken_checkpoints").exists()
    monkeypatch.undo()
    assert int(checkpoints.restore(abstract_state(state_of(0)))[0].step) == 6


def test_small_files_that_cannot_be_read_now_are_no_damage(three, tmp_path, monkeypatch):
    folder = copied(three, tmp_path)

    def refuse(path, *_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            Checkpoints(folder)
    assert Checkpoints(folder).latest() == 6 and not (tmp_path / "broken_checkpoints").exists()


def test_reading_only_touches_nothing(three, tmp_path):
    """Not even what a running save has written so far."""
    folder = copied(three, tmp_path)
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    DAMAGES["state gone"](folder / "6")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.newest_before(6) == 4
    assert int(checkpoints.restore(abstract_state(state_of(0)), 4)[0].step) == 4
    checkpoints.close()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


def test_the_checkpoint_before_a_step_is_kept_for_its_replay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    for step in range(1, 4):
        checkpoints.save(step, state_of(step), {})
    checkpoints.keep_before(4)
    for step in range(4, 8):
        checkpoints.save(step, state_of(step), {})
    checkpoints.wait()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 7]


def test_a_step_that_is_not_after_the_newest_is_an_error(three, tmp_path):
    with pytest.raises(CheckpointError, match="holds step 6; step 5 is not after it"):
        Checkpoints(copied(three, tmp_path)).save(5, state_of(5), {})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (ValueError("write failed: Disk quota exceeded [OS error 122: EDQUOT]"), "the quota is used up"),
        (OSError(errno.EACCES, "no"), ""),
    ],
    ids=str,
)
def test_a_lack_of_space_is_found_behind_other_errors(error, said):
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not save") from cause
    except RuntimeError as last:
        assert no_space(last) == no_space(error) == said


def test_a_save_that_finds_no_room_is_an_error_and_harms_no_earlier_checkpoint(tmp_path):
    """A limit on the size of files stands for a full disk, which tests/faults/cases.py makes."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="a file is too large; the newest whole checkpoint is step 1. The"):
            checkpoints.save(2, state_of(2), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path)
    state, _ = again.restore(abstract_state(state_of(0)))
    np.testing.assert_array_equal(state.params["x"], state_of(1).params["x"])
    again.save(2, state_of(2), {})
    again.wait()
    assert again.latest() == 2 and [path.name for path in sorted(tmp_path.iterdir())] == ["1", "2"]
