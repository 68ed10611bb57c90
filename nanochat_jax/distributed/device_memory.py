"""How much memory a device has, and how much of it a compiled program or an array takes."""

import contextlib
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.distributed import compile_only
from nanochat_jax.distributed.mesh import make_mesh

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def device_memory(device) -> int | None:
    """Bytes that programs may use on a device, which may be compile-only; None where that cannot be known. CPU devices
    share the machine's memory evenly."""
    if device.platform == "cpu":
        with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system has sysconf and these names
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
        return None
    if device in jax.devices():
        return (device.memory_stats() or {}).get("bytes_limit")
    if gpu := compile_only.gpu_of(device):
        return compile_only.usable_memory(gpu)
    whole = NamedSharding(make_mesh("data=1", [device]), PartitionSpec())
    too_large = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32, sharding=whole)  # 4 TiB
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        return parse_memory_error(error)[1]
    return None


def check_room(what: str, needed: int, device, flags: str) -> None:
    """ValueError where `needed` bytes are more than all that the device has; it names the flags to lower."""
    memory = device_memory(device)
    if memory and needed > memory:
        sizes = f"{needed / 2**30:,.1f} GiB of a device's {memory / 2**30:,.1f} GiB"
        raise ValueError(f"{what} would take {sizes}: lower {flags}")


def parse_memory_error(error: Exception) -> tuple[int | None, int | None]:
    """(bytes that the program needs, bytes that the device has) from a compiler's error message; None without them."""
    size = r"([\d.]+)([KMGT]?)i?B?"
    patterns = (rf"\({size}\) exceeds available \w+ \({size}\)", rf"Used {size} of {size} hbm")
    found = next(filter(None, (re.search(pattern, str(error)) for pattern in patterns)), None)
    if not found:
        return None, None
    needed, needed_unit, had, had_unit = found.groups()
    return int(float(needed) * UNITS[needed_unit]), int(float(had) * UNITS[had_unit])


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error is a device's, or a compiler's for it, that memory is too small."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def beside_arguments(compiled: Any) -> int:
    """Bytes on a device that a compiled program needs besides its arguments and the results that take their place.

    XLA for TPU reports the peak, which is less than the sum of the temporaries, as these do not all live at once."""
    sizes = compiled.memory_analysis()
    extra = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    if device.platform == "tpu" and sizes.peak_memory_in_bytes:
        extra = min(extra, max(0, sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes))
    return extra + sizes.generated_code_size_in_bytes


def bytes_on_device(tree: Any) -> int:
    """Bytes that a tree of arrays, real or abstract with shardings, takes on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
