"""The launch scripts check their arguments and print, with --dry_run, exactly what they would run."""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")
)
TPU = ("--name=scl", "--zone=us-west4-a")
TRAIN = ("--config=configs/pretrain_joint.py", "--config.mesh.fsdp=8")
KUBERNETES = (
    *("--name=scl", "--image=registry/scl_jax:1", "--accelerator=tpu-v5-lite-podslice", "--topology=16x16"),
    *("--hosts=64", "--volume=share", "--workdir=/shared/joint", *TRAIN),
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", f"launch/{script}", *arguments], cwd=ROOT, capture_output=True, text=True)


def printed(script: str, *arguments: str) -> list[list[str]]:
    """The words of every command that a dry run prints."""
    done = run(script, *arguments, "--dry_run")
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def main_of(words: list[str]) -> list[str]:
    """The arguments of scl_jax.main in a command."""
    start = words.index("scl_jax.main")
    assert words[start - 2].endswith("python") and words[start - 1] == "-m"
    return words[start + 1 :]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of requirements-dev.txt
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_quickstart_says_what_it_takes_and_installs_nothing(word):
    done = run("quickstart.sh", "--config.train.steps=100", word)
    assert done.returncode == 0 and not done.stderr
    first, *others = done.stdout.splitlines()
    assert first.endswith("bash launch/quickstart.sh") and others[-1].startswith("WORKDIR=… and DATA=…")


@pytest.mark.parametrize("script", ["kubernetes.sh", "local_gpu.sh", "slurm.sbatch", "test.sh", "tpu_pod.sh"])
def test_so_do_the_others(script):
    done = run(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"launch/{script}" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize(
    "versions, found",
    [
        ({"python3": "3.13", "python3.12": "3.12"}, "python3"),
        ({"python3": "3.14", "python3.13": "3.13", "python3.11": "3.11"}, "python3.13"),
        ({"python3": "3.9", "python3.11": "3.11"}, "python3.11"),
        ({"python3": "3.14"}, ""),
    ],
)
def test_an_environment_is_made_by_a_python_that_the_pins_are_for(tmp_path, versions, found):
    for name, version in versions.items():
        stand_in = f"import sys; sys.version_info = (*map(int, '{version}'.split('.')), 0); exec(sys.argv.pop())"
        program = tmp_path / name
        # called as `python -c CODE`: this Python runs that code as if it were of the other version
        program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", stand_in])} "$2"\n')
        program.chmod(0o755)
    only = {"PATH": str(tmp_path)}
    done = subprocess.run(
        ["/bin/bash", "-c", "source launch/environment.sh; find_python"],
        cwd=ROOT,
        env=only,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == found and done.returncode == int(not found)


def test_gpus_of_this_machine():
    (command,) = printed("local_gpu.sh", "--workdir=runs/a b", "--gpus=0,3", *TRAIN)
    assert command[:3] == ["env", "CUDA_VISIBLE_DEVICES=0,3", "JAX_PLATFORMS=cuda"]
    assert main_of(command) == ["--config=configs/pretrain_joint.py", "--workdir=runs/a b", "--config.mesh.fsdp=8"]


def test_a_slurm_job_runs_one_process_a_node_and_comes_back_until_it_is_complete():
    command, again = printed("slurm.sbatch", "--workdir=/shared/joint", *TRAIN)
    assert command[:3] == ["srun", "--kill-on-bad-exit=1", "--label"]
    words = ["--config=configs/pretrain_joint.py", "--workdir=/shared/joint", "--config.mesh.fsdp=8"]
    assert main_of(command) == ["--stopped_status=75", *words]
    assert again[:2] == ["scontrol", "requeue"]
    header = [line for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --signal=TERM@300", "#SBATCH --requeue"} <= set(header)


@pytest.mark.parametrize(("status", "again"), [(0, False), (1, False), (75, True), (143, True)])
def test_a_slurm_job_comes_back_where_a_signal_ended_it(tmp_path, status, again):
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/told')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "results.json").touch()  # of an evaluation in between
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", "launch/slurm.sbatch", f"--workdir={tmp_path}", *TRAIN], cwd=ROOT, env=env)
    assert done.returncode == (0 if again else status) and (tmp_path / "told").exists() == again
    assert not again or (tmp_path / "told").read_text() == "requeue 7\n"


def test_a_tpu_slice_from_creation_to_deletion():
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    (create,) = printed(
        "tpu_pod.sh", "create", *TPU, "--type=v5litepod-256", "--version=v2", "--spot=true", "--project=p"
    )
    slice_options = ["--accelerator-type=v5litepod-256", "--version=v2", "--spot"]
    assert create == [*tpu, "create", "scl", *slice_options, "--zone=us-west4-a", "--project=p"]
    archive, copy, unpack = printed("tpu_pod.sh", "copy", *TPU)
    assert archive[:2] == ["git", "archive"] and copy[4:] == [
        "scp",
        copy[5],
        "scl:",
        "--worker=all",
        "--zone=us-west4-a",
    ]
    assert unpack[6:] == [
        "--worker=all",
        "--command=mkdir -p scl_jax && tar -xzf scl_jax.tar.gz -C scl_jax",
        "--zone=us-west4-a",
    ]
    packages, environment, prepare = printed("tpu_pod.sh", "install", *TPU, "--prepare=sudo mount -t nfs h:/s /mnt")
    assert "python3.11-venv" in packages[7] and '".[tpu]"' in environment[7]
    assert prepare[7] == "--command=sudo mount -t nfs h:/s /mnt"
    (train,) = printed("tpu_pod.sh", "run", *TPU, "--workdir=/mnt/joint", *TRAIN)
    assert train[4:7] == ["ssh", "scl", "--worker=all"]
    command = shlex.split(train[7].removeprefix("--command="))
    assert main_of(command)[:3] == [
        "--config=configs/pretrain_joint.py",
        "--workdir=/mnt/joint",
        "--config.mesh.fsdp=8",
    ]
    (logs,) = printed("tpu_pod.sh", "logs", *TPU)
    assert logs[6:8] == ["--worker=0", "--command=tail -n 100 -F scl_jax.log"]
    (stop,) = printed("tpu_pod.sh", "stop", *TPU)
    assert stop[7] == '--command=kill -TERM "$(cat scl_jax.pid)"'
    assert printed("tpu_pod.sh", "delete", *TPU) == [[*tpu, "delete", "scl", "--quiet", "--zone=us-west4-a"]]


def test_stop_reaches_the_program_that_run_started(tmp_path):
    """A gcloud that runs the command in a home of its own, where the "program" notes SIGTERM and ends."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "scl_jax/.venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/bin/bash\ntrap 'echo saved > ~/end; exit 0' TERM\ntouch ~/begun\nfor _ in {1..400}; do sleep 0.05; done\n"
    )
    gcloud = tmp_path / "bin/gcloud"
    gcloud.write_text(
        '#!/bin/bash\ncd; for word in "$@"; do [[ $word != --command=* ]] || bash -c "${word#--command=}"; done\n'
    )
    for file in (program, gcloud):
        file.chmod(0o755)
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def step(*arguments: str) -> None:
        subprocess.run(["bash", "launch/tpu_pod.sh", *arguments], cwd=ROOT, env=env, check=True, timeout=20)

    step("run", *TPU, "--workdir=/mnt/joint", *TRAIN)
    appears(tmp_path / "begun")
    pid = int((tmp_path / "scl_jax.pid").read_text())
    try:
        step("stop", *TPU)
        appears(tmp_path / "end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def appears(file: Path) -> None:
    end = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < end, f"no {file.name}"
        time.sleep(0.02)


def test_a_job_set_is_filled_in():
    project = "--config.log.wandb_project=a&b"
    done = run("kubernetes.sh", *KUBERNETES, project, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kubectl apply -f - <<'JOBSET'\n") and done.stdout.endswith("\nJOBSET\n")
    job_set = yaml.safe_load(done.stdout.split("\n", 1)[1].removesuffix("JOBSET\n"))
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job_set["metadata"]["name"] == "scl"
    (job,) = job_set["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    assert (job["replicas"], hosts["parallelism"], hosts["completions"], hosts["completionMode"]) == (
        1,
        64,
        64,
        "Indexed",
    )
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/scl_jax:1" and container["resources"]["limits"] == {"google.com/tpu": 4}
    words = ["--config=configs/pretrain_joint.py", "--workdir=/shared/joint", "--config.mesh.fsdp=8", project]
    assert container["command"] == ["python", "-m", "scl_jax.main"] and container["args"] == [
        "--stopped_status=75",
        *words,
    ]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/shared"}
    assert volume["persistentVolumeClaim"] == {"claimName": "share"}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local_gpu.sh", ("--workdir=x",), "--config=… is missing"),
        ("local_gpu.sh", ("--config=configs/none.py", "--workdir=x"), "there is no such file"),
        ("local_gpu.sh", (*TRAIN, "--workdir=x", "--gpus=a"), "--gpus=a is not a list of numbers"),
        ("local_gpu.sh", (*TRAIN, "--workdir"), "what is --workdir?"),
        ("slurm.sbatch", (*TRAIN, "--workdir=runs/x"), "write the whole path"),
        ("tpu_pod.sh", ("destroy",), "name a step"),
        ("tpu_pod.sh", ("create", *TPU), "--type=… is missing"),
        ("tpu_pod.sh", ("copy", "--name=scl", "--zone=here"), "--zone=here is not a zone"),
        ("tpu_pod.sh", ("delete", *TPU, "--force"), "what is --force?"),
        ("kubernetes.sh", (*KUBERNETES, "--hosts=8"), "--hosts=8 × --chips=4 is not the 256 chips"),
    ],
)
def test_wrong_arguments_are_named(script, arguments, message):
    done = run(script, *arguments, "--dry_run")
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_the_audit_says_what_it_knows_and_what_it_does_not():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "launch" / "audit.py")
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    unknown = {"name": "jax", "skip_reason": "not found"}
    assert (
        audit.told([unknown])
        == "0 of 1 pinned packages are known to the vulnerability service: not audited (no access to it?)"
    )
    found = {"name": "pillow", "version": "9.0.0", "vulns": [{"id": "CVE-1", "fix_versions": ["9.0.1"]}]}
    assert audit.told([unknown, found]).splitlines() == [
        "1 of 2 pinned packages are known to the vulnerability service; 1 known vulnerabilities",
        "  warning: pillow 9.0.0: CVE-1, fixed in 9.0.1",
    ]
    assert audit.ask(["no_such_file.txt"]).startswith("not audited: ")
