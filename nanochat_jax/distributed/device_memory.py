"""How much memory a device has, and how much a compiled program or an array takes of it."""

import contextlib
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.distributed.mesh import make_mesh

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def device_memory(device) -> int | None:
    """Bytes that programs may use of this device, real or compile-only; None where it does not tell.

    CPU devices share the machine's memory evenly."""
    if device.platform == "cpu":
        with contextlib.suppress(ValueError, OSError, AttributeError):  # no such system call, or no such name
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
        return None
    if device in jax.devices():
        return (device.memory_stats() or {}).get("bytes_limit")
    everywhere = NamedSharding(make_mesh("data=1", [device]), PartitionSpec())
    too_large = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32, sharding=everywhere)  # 4 TiB
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return asked_and_had(error)[1]
    return None


def asked_and_had(error: Exception) -> tuple[int | None, int | None]:
    """(bytes that a program needs, bytes that the device has) from a compiler's message that memory is too small."""
    number = r"([\d.]+)([KMGT]?)i?B?"
    pairs = (rf"\({number}\) exceeds available \w+ \({number}\)", rf"Used {number} of {number} hbm")
    found = next(filter(None, (re.search(pair, str(error)) for pair in pairs)), None)
    if not found:
        return None, None
    asked, asked_unit, had, had_unit = found.groups()
    return int(float(asked) * UNITS[asked_unit]), int(float(had) * UNITS[had_unit])


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or a compiler for it, says that memory is too small."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def beside_arguments(compiled: Any) -> int:
    """Bytes on a device that a compiled program needs beside its arguments, results in their place not counted.

    XLA for TPU tells the peak itself, which its temporaries, not all alive at once, may exceed together."""
    sizes = compiled.memory_analysis()
    extra = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform == "tpu" and sizes.peak_memory_in_bytes:
        extra = min(extra, max(0, sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes))
    return extra + sizes.generated_code_size_in_bytes


def bytes_on_device(tree: Any) -> int:
    """Bytes of a device's share of arrays, real or abstract ones with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
