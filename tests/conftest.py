"""Every test runs on CPU with 8 devices, and a silent broadcast between ranks is an error.

Tests compile much and compute little: without LLVM's optimisations they take half the time. NANOCHAT_TEST_OPTIMIZED=1
runs them on the code that users run.
What one test has compiled, in a process of its own or not, the others read from a folder that the run ends with.
"""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests talk to loopback only
if not os.environ.get("NANOCHAT_TEST_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process; it starts those that run the tests
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones are many: 30 ms each

import jax
import pytest

from tests.support import tiny

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects and little garbage
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = Path(__file__).parent
LONGEST = {
    *("distributed/test_processes", "distributed/test_meshes", "inference/test_engine", "files/test_bucket"),
    "tools/test_faults",
    *(
        "train/test_step",
        "train/test_tpu_aot",
        "tools/test_tpu_vm",
        "test_rl",
        "test_rl_resume",
        "test_resume",
        "test_environments",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with a tiny base model. The compilation cache that a command turns on ends with the module."""
    before = jax.config.jax_compilation_cache_dir
    base = tmp_path_factory.mktemp("base")
    tiny.write_base(base)
    yield base
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def in_base(base, monkeypatch):
    """Commands find and leave their files in `base`, and no data elsewhere."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    return base


@pytest.fixture
def ctrl_c_raises():
    """Also where the tests run in the background of a script, whose children ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items):
    """The files that take longest come first: else one core ends with them while the others wait."""
    items.sort(key=lambda item: item.path.relative_to(TESTS).with_suffix("").as_posix() not in LONGEST)
