"""Every test runs on CPU with 8 devices, and a silent broadcast between ranks is an error.

Tests compile much and compute little: without LLVM's optimisations they take half the time. NANOCHAT_TEST_OPTIMIZED=1
runs them on the code that users run.
What one test has compiled, in a process of its own or not, the others read from a folder that the run ends with.
"""

import atexit
import gc
import os
import random
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests talk to loopback only
if not os.environ.get("NANOCHAT_TEST_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process; it starts those that run the tests
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones are many: 30 ms each

os.environ.setdefault("NANOCHAT_TEST_TURN", str(random.randrange(60)))  # the same in all processes of a run

import jax
import pytest

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects and little garbage
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

LONGEST = {
    f"test_{name}"
    for name in ("processes", "engine", "rl", "tpu_aot", "resume", "tpu_vm", "rl_resume", "meshes", "storage")
}


TURNS = [  # long tests of which a run does one of each row, by chance; NANOCHAT_TEST_ALL=1 does all
    (
        "test_processes.py::test_a_lost_process_ends_the_others_by_name_and_a_stopped_one_saves_with_them[sft]",
        "test_processes.py::test_a_lost_process_ends_the_others_by_name_and_a_stopped_one_saves_with_them[rl]",
    ),
    (
        "test_resume.py::test_pretraining_that_is_killed_ends_bit_identical_across_shards_and_epochs",
        "test_rl_resume.py::test_a_run_that_is_killed_at_a_random_moment_ends_bit_identical",
        "test_storage.py::test_a_run_killed_in_the_middle_of_an_upload_goes_on_bit_for_bit_on_another_machine",
    ),
    (
        "test_meshes.py::test_rl_draws_the_same_answers_and_learns_the_same_on_every_mesh[data]",
        "test_meshes.py::test_rl_draws_the_same_answers_and_learns_the_same_on_every_mesh[fsdp]",
        "test_meshes.py::test_rl_draws_the_same_answers_and_learns_the_same_on_every_mesh[replicas]",
    ),
]


def pytest_collection_modifyitems(items):
    """The files that take longest come first: else one core ends with them while the others wait."""
    turn = int(os.environ["NANOCHAT_TEST_TURN"])
    waiting = {name for row in TURNS for i, name in enumerate(row) if i != turn % len(row)}
    names = {item.nodeid.split("/")[-1] for item in items}
    asked_by_name = len(names) <= len(waiting)
    for item in items:
        if item.nodeid.split("/")[-1] in waiting and not (asked_by_name or os.environ.get("NANOCHAT_TEST_ALL")):
            item.add_marker(pytest.mark.skip(reason="its turn comes by chance; NANOCHAT_TEST_ALL=1 does all"))
    items.sort(key=lambda item: item.path.stem not in LONGEST)
