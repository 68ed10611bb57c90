"""What a test needs that is not installed everywhere."""

import importlib.util

import pytest

from nanochat_jax.distributed import compile_only

needs_tpu_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: tools/setup.sh --extra aot"
)
needs_cuda_compiler = pytest.mark.skipif(
    not compile_only.has_cuda_compiler(), reason="the CUDA compiler is not installed: tools/setup.sh --extra cuda13-aot"
)
