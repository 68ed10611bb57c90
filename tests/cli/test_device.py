"""What a run computes in, by the device that it has.

Run: python -m pytest tests/cli/test_device.py
"""

import jax.numpy as jnp
import pytest

from nanochat_jax.cli import device


@pytest.mark.parametrize(
    ("flags", "name", "platform", "width", "expected"),
    [
        ("fpu amx_bf16 sse", "auto", "cpu", 256, "bfloat16"),
        ("fpu amx_bf16 sse", "auto", "cpu", 255, "float32"),
        ("fpu amx_bf16_like sse", "auto", "cpu", 256, "float32"),
        ("", "auto", "cpu", 2048, "float32"),
        ("fpu amx_bf16 sse", "float32", "cpu", 2048, "float32"),
        ("", "bfloat16", "cpu", 64, "bfloat16"),
        ("", "auto", "cuda", 64, "bfloat16"),
    ],
)
def test_wide_models_are_trained_in_bfloat16_where_the_processor_multiplies_it(
    monkeypatch, flags, name, platform, width, expected
):
    monkeypatch.setattr(device, "cpu_info", {"flags": flags}.get)
    assert device.training_dtype(name, platform, width) == jnp.dtype(expected)
    assert device.compute_dtype("auto", "cpu") == jnp.float32


def test_what_linux_tells_of_the_processor_is_read_and_nothing_is_empty():
    assert device.cpu_info("no such field") == ""
    assert device.cpu_name().endswith("cores)")
