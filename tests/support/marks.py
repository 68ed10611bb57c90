"""What a test needs that is not installed everywhere."""

import importlib.util

import pytest

needs_tpu_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: tools/setup.sh --extra aot"
)
