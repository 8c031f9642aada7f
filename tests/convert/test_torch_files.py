"""Weights of every kind of file are read exactly and at little cost, and written all or nothing."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch

from scl_jax.convert.torch_files import read_tensors, write_safetensors


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return collections.OrderedDict(
        {"layer.weight": torch.randn(4, 3, generator=generator), "layer.bias": torch.randn(4, generator=generator)}
    )


def assert_equal(found: dict, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.detach().numpy())


class TestWhatIsRead:
    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
    def test_a_bare_state_dict(self, tmp_path: Path, new_format: bool) -> None:
        torch.save(state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=new_format)
        assert_equal(read_tensors(tmp_path / "w.pt"), state_dict())

    @pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
    def test_the_weights_inside_a_checkpoint(self, tmp_path: Path, key: str) -> None:
        torch.save({key: state_dict(), "other": torch.zeros(1), "epoch": 3}, tmp_path / "w.ckpt")
        assert_equal(read_tensors(tmp_path / "w.ckpt"), state_dict())

    def test_a_lightning_checkpoint_with_its_metadata(self, tmp_path: Path) -> None:
        parameters = [torch.nn.Parameter(value) for value in state_dict().values()]
        optimizer = torch.optim.Adam(parameters)
        sum(value.sum() for value in parameters).backward()
        optimizer.step()
        hyper_parameters = {
            "namespace": argparse.Namespace(rate=np.float64(0.1), table=np.arange(3)),
            "path": pathlib.PurePosixPath("x"),
            "sizes": torch.Size([1, 2]),
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "counts": collections.defaultdict(int, a=1),
            "tags": {"a", "b"},
        }
        checkpoint = {
            "epoch": 1,
            "state_dict": state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "callbacks": {collections.Counter: {"best": torch.tensor(0.5)}},
            "hyper_parameters": hyper_parameters,
        }
        torch.save(checkpoint, tmp_path / "w.ckpt")
        assert_equal(read_tensors(tmp_path / "w.ckpt"), state_dict())

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_a_torchscript_archive_without_its_code(self, tmp_path: Path) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.MultiheadAttention(4, 2)).half()
        module.register_buffer("input_resolution", torch.tensor(224))
        scripted = torch.jit.trace_module(module[0], {"forward": torch.ones(1, 3).half()})
        scripted.save(str(tmp_path / "clip.pt"))
        assert_equal(read_tensors(tmp_path / "clip.pt"), dict(module[0].state_dict()))

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_nested_torchscript_modules_have_the_names_of_the_state_dict(self, tmp_path: Path) -> None:
        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.visual = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
                self.register_buffer("input_resolution", torch.tensor(224))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.visual(x)

        model = Model()
        torch.jit.trace(model, torch.ones(1, 3)).save(str(tmp_path / "clip.pt"))
        assert_equal(read_tensors(tmp_path / "clip.pt"), dict(model.state_dict()))

    def test_every_type_and_layout(self, tmp_path: Path) -> None:
        x = torch.arange(24.0).reshape(4, 6)
        kinds = [
            torch.float64,
            torch.float16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        ]
        expected = {str(kind): x.to(kind) for kind in kinds + [torch.complex64, torch.uint16]}
        expected |= {"turned": x.T, "part": x[1:, ::2], "scalar": torch.tensor(3.0), "none": torch.zeros(0, 3)}
        expected["parameter"] = torch.nn.Parameter(x)
        torch.save(expected | {"bfloat16": x.bfloat16(), "float8": x.to(torch.float8_e4m3fn)}, tmp_path / "w.pt")
        found = dict(read_tensors(tmp_path / "w.pt"))
        assert found["bfloat16"].dtype == ml_dtypes.bfloat16 and found["float8"].dtype == ml_dtypes.float8_e4m3fn
        for name in ("bfloat16", "float8"):
            value = found.pop(name)
            np.testing.assert_array_equal(value, x.numpy().astype(value.dtype))
        assert_equal(found, expected)

    def test_tensors_are_read_only_views_of_the_file(self, tmp_path: Path) -> None:
        torch.save(state_dict(), tmp_path / "w.pt")
        with pytest.raises(ValueError, match="read-only"):
            read_tensors(tmp_path / "w.pt")["layer.weight"][0] = 1

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    @pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shards"])
    def test_a_hugging_face_folder(self, tmp_path: Path, kind: str, sharded: bool) -> None:
        stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
        parts = [{name: value} for name, value in state_dict().items()] if sharded else [dict(state_dict())]
        names = [f"{stem}-{i}.{kind}" if sharded else f"{stem}.{kind}" for i in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            if kind == "bin":
                torch.save(part, tmp_path / name)
            else:
                write_safetensors(tmp_path / name, {key: value.numpy() for key, value in part.items()}, {})
        if sharded:
            shard_of = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": shard_of}))
        (tmp_path / "config.json").write_text("{}")
        assert_equal(read_tensors(tmp_path), state_dict())

    @pytest.mark.slow
    def test_the_weights_of_a_4_gigabyte_checkpoint_need_little_memory_and_time(self, tmp_path: Path) -> None:
        """378 million parameters with Adam's moments: 4.5 GB, of which 1.5 GB are weights."""
        write = """
            import sys, torch
            new = lambda: [torch.zeros(10, 1024, 1024) for _ in range(36)]
            moments = {i: {"exp_avg": a, "exp_avg_sq": b} for i, (a, b) in enumerate(zip(new(), new()))}
            weights = {f"layer{i}.weight": value for i, value in enumerate(new())}
            torch.save({"state_dict": weights, "optimizer_states": [{"state": moments}]}, sys.argv[1])
        """
        read = """
            import sys, time
            start = time.perf_counter()
            from scl_jax.convert.torch_files import read_tensors
            total = sum(float(value.sum()) for value in read_tensors(sys.argv[1]).values())
            status = open("/proc/self/status").read()  # getrusage counts the process that started this one, too
            peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
            print(peak, time.perf_counter() - start, "torch" in sys.modules)
        """

        def run(program: str) -> list[str]:
            command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "big.ckpt")]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

        run(write)
        gibibytes, seconds, torch_was_imported = run(read)
        assert (tmp_path / "big.ckpt").stat().st_size > 4.4e9
        assert float(gibibytes) < 3 and float(seconds) < 60 and torch_was_imported == "False"


class TestWhatIsWritten:
    TENSORS = {
        "turned": np.arange(6.0).reshape(2, 3).T,
        "scalar": np.float32(3).reshape(()),
        "none": np.zeros((0, 2), np.int64),
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "nan": np.array([np.nan, -0.0, np.inf], np.float16),
    }

    def test_it_comes_back_bit_by_bit(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "w.safetensors", self.TENSORS, {"format": "pt"})
        found = read_tensors(tmp_path / "w.safetensors")
        assert set(found) == set(self.TENSORS)
        for name, value in self.TENSORS.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()
        with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert file.get_tensor("turned").tolist() == self.TENSORS["turned"].tolist()

    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "w.safetensors"
        write_safetensors(path, {"old": np.zeros(1)}, {})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # as if 64 KiB were left
        try:
            with pytest.raises(
                OSError, match=r"w\.safetensors: could not write 1\.0 MiB of weights .*nothing was left"
            ):
                write_safetensors(path, {"new": np.zeros(2**17)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
        assert list(read_tensors(path)) == ["old"]

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere/w.safetensors: could not write"):
            write_safetensors(tmp_path / "nowhere" / "w.safetensors", {"w": np.zeros(1)}, {})
