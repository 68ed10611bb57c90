"""Whether a process is one of several, and which: from flags, the environment, SLURM and Open MPI.

Run: python -m pytest tests/distributed/test_cluster.py
"""

import pytest

from nanochat_jax.distributed.cluster import VARIABLES, find_cluster

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environ(monkeypatch):
    """Set the environment: JAX reads the real one."""

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_cluster(tpu=False)

    for name in (*VARIABLES, *SLURM, "OMPI_MCA_orte_hnp_uri", "CUDA_VISIBLE_DEVICES", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    return put


def test_a_laptop_is_alone_and_so_is_a_shell_in_a_slurm_job(environ):
    assert environ({}) is None
    assert environ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None  # of salloc, before srun
    assert environ(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # an interactive step of a job of 8 tasks
    assert environ(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}) is None


def test_tasks_of_slurm_find_each_other(environ):
    found = environ(SLURM)
    assert (found.host, found.process_count, found.process_index, found.local_devices) == ("node003", 8, 5, (1,))
    assert environ({"JAX_COORDINATOR_PORT": "1234"}).coordinator == "node003:1234"
    assert environ({"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None  # SLURM has given each task its own
    alone_on_node = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    found = environ(alone_on_node | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert (found.process_count, found.process_index) == (2, 1)
    assert found.local_devices is None  # it has all of the node's GPUs


def test_processes_of_open_mpi_find_each_other(environ):
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    found = environ(ranks | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"})
    assert (found.host, found.process_count, found.process_index, found.local_devices) == ("10.96.0.1", 4, 2, (0,))
    assert environ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


def test_flags_come_before_the_environment_and_half_of_them_is_an_error(environ):
    found = environ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    assert found.process_index == 1
    found = find_cluster("[::1]:99", 3, 2)
    assert (found.host, found.port, found.process_count, found.process_index) == ("::1", 99, 3, 2)
    assert find_cluster("a:1", 1, 0) is None
    for flags, said in (
        (("a:1", 2, None), "--process-id is missing"),
        ((None, 2, 1), "--coordinator is missing"),
        (("a", 2, 1), "must be HOST:PORT"),
        (("a:0", 2, 1), "must be HOST:PORT"),
        (("a:1", 2, 2), "must be from 0 to --num-processes - 1, got 2 of 2"),
    ):
        with pytest.raises(ValueError, match=said):
            find_cluster(*flags)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        environ({"JAX_NUM_PROCESSES": "two"})
