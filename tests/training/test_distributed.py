"""Who the other processes are, from the environments that launchers leave."""

import pytest

from scl_jax.training.distributed import ClusterError, Processes, connect, first_node, from_environment, from_flags

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-009,011]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "3",
    "SLURM_LOCALID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.sub,t-1.sub,t-2.sub,t-3.sub", "TPU_WORKER_ID": "2"}


def test_nothing_means_one_process():
    assert from_environment({}) is None
    assert from_flags("", 0, -1) is None
    connect(None, start_timeout=1, heartbeat_timeout=1, stop_timeout=1)  # joins nobody


def test_slurm():
    found = from_environment(SLURM)
    assert found == Processes("gpu007:61586", 4, 3, "Slurm")
    assert 61440 <= int(found.coordinator.split(":")[1]) < 65536


def test_slurm_tasks_that_share_a_node_take_a_gpu_each_unless_slurm_has_dealt_them_out():
    shared = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}
    assert from_environment(shared | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_devices == (1,)
    assert from_environment(shared | {"CUDA_VISIBLE_DEVICES": "1"}).local_devices is None
    assert from_environment(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices is None  # alone: all of them


def test_the_batch_script_of_slurm_is_no_task():
    assert from_environment({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert from_environment(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None  # nor is a shell for one


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[001-003]", "n001"),
        ("gpu-a[3,5-7],gpu-b1", "gpu-a3"),
        ("r[1-2]c3,x", "r1c3"),
        ("rack[1-2]node[03-4,6]x,y", "rack1node03x"),
        ("a.b.c", "a.b.c"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_node(nodes) == first


def test_open_mpi():
    assert from_environment(MPI) == Processes("10.96.0.1:61440", 4, 2, "Open MPI")
    one_host = MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert from_environment(one_host).coordinator.startswith("localhost:")
    version_5 = {name: value for name, value in MPI.items() if "hnp" not in name}
    with pytest.raises(ClusterError, match="set SCL_COORDINATOR=host:port"):
        from_environment(version_5)
    assert from_environment(version_5 | {"SCL_COORDINATOR": "first:5000"}).coordinator == "first:5000"


def test_tpu():
    assert from_environment(TPU) == Processes("t-0.sub:8476", 4, 2, "TPU_WORKER_HOSTNAMES")
    assert from_environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s-0:9915"}
    assert from_environment(TPU | slices) == Processes("s-0:8476", 8, 6, "TPU_WORKER_HOSTNAMES")


def test_explicit_settings_come_first():
    own = {"SCL_COORDINATOR": "h:1234", "SCL_PROCESSES": "2", "SCL_PROCESS": "1"}
    assert from_environment(SLURM | MPI | TPU | own) == from_flags("h:1234", 2, 1, ", ".join(own))
    assert from_flags("[::1]:80", 2, 0).coordinator == "[::1]:80"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SCL_PROCESSES": "two", "SCL_PROCESS": "0"}, "SCL_PROCESSES is 'two'"),
        ({"SCL_PROCESSES": "2", "SCL_PROCESS": "0"}, "needed together"),
        ({"SCL_COORDINATOR": "h", "SCL_PROCESSES": "2", "SCL_PROCESS": "0"}, "coordinator is 'h'; write host:port"),
        ({"SCL_COORDINATOR": "h:1", "SCL_PROCESSES": "2", "SCL_PROCESS": "2"}, "process 2 of 2; it must count from 0"),
        (SLURM | {"SLURM_PROCID": "4"}, "Slurm: process 4 of 4"),
        (SLURM | {"SLURM_STEP_NODELIST": "["}, "no host can be read"),
        (TPU | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID is ''"),
        ({name: value for name, value in MPI.items() if "RANK" not in name}, "OMPI_COMM_WORLD_RANK is ''"),
    ],
)
def test_what_makes_no_sense_is_named(env, message):
    with pytest.raises(ClusterError, match=message.replace("[", r"\[")):
        from_environment(env)


def test_flags_belong_together():
    with pytest.raises(ClusterError, match="flags: coordinator, number of processes and process are needed together"):
        from_flags("h:1", 2, -1)
