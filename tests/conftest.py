"""Every test runs on CPU with 8 devices, and a silent broadcast between ranks is an error.

Tests compile much and compute little: without LLVM's optimisations they take half the time. NANOCHAT_TEST_OPTIMIZED=1
runs them on the code that users run.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests talk to loopback only
if not os.environ.get("NANOCHAT_TEST_OPTIMIZED"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
