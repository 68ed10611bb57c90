"""What a device holds while it trains: what it has, what the state takes, and what the backward pass needs kept."""

import contextlib
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nanochat_jax.distributed.sharding import make_mesh
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.model.loss import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU
from nanochat_jax.train.step import TrainState

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Bytes that are kept for each token, layer and channel of the residual stream, for a compute type of 2 bytes: a rough
# fit to what XLA said of depth 8 on CPU, and of depths 2 to 34 on v5e, v6e and v5p.
KEPT = {"none": 40, "elementwise": 28, "block": 10}
LOGITS = 4 * 4  # bytes of the loss's work for each logit of a chunk
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROOM = 0.85  # of a device's memory may be filled by this estimate


class Choice(NamedTuple):
    """What is computed again in the backward pass, and why."""

    name: str
    why: str


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


def pages_note(platform: str) -> list[str]:
    """What makes steps on a CPU faster and must be set before a program starts, if there is something.

    A step's buffers are asked for and given back each time: 133,000 page faults in each step of the CPU bench, 600 with
    large pages, which the kernel gives to those who ask, and glibc asks for if told to."""
    if platform != "cpu" or "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
        return []
    try:
        for_who_asks = "[madvise]" in LARGE_PAGES.read_text()
    except OSError:  # another system than Linux
        return []
    said = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment makes steps on this CPU faster (large pages)"
    return [said] * for_who_asks


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


def kept_for_backward(config: GPTConfig, remat: str, tokens: int, dtype: Any) -> int:
    """Bytes of what the forward pass of `tokens` tokens a device keeps for the backward pass, roughly."""
    return KEPT[remat] * jnp.dtype(dtype).itemsize // 2 * tokens * config.n_layer * config.n_embd


def held_anyway(state: TrainState) -> int:
    """Bytes of a device in the train step whatever --remat says, roughly: the state (real or abstract), gradients and
    their sum or the updates, and the loss's work."""
    (device, *_) = state.step.sharding.device_set
    logits = CHUNK_ELEMENTS_CPU if device.platform == "cpu" else CHUNK_ELEMENTS
    return bytes_on_device(state) + 2 * bytes_on_device(state.params) + LOGITS * logits


def choose_remat(wanted: str, config: GPTConfig, state: TrainState, dtype: Any, rows: int, T: int) -> Choice:
    """The --remat in force; "auto" is the first of REMAT with which everything fits by an estimate, else the last.

    state: real or abstract, for its shardings. rows: of T tokens, of a device in one pass. Where half or a quarter of
    them would need nothing computed again, the reason says so."""
    if wanted != "auto":
        return Choice(wanted, "as --remat says")
    devices = state.step.sharding.device_set
    had = device_memory(next((d for d in jax.local_devices() if d in devices), next(iter(devices))))
    if had is None:
        return Choice(REMAT[0], "the device does not tell how much memory it has")

    def needed(name, rows):
        return held_anyway(state) + kept_for_backward(config, name, rows * T, dtype)

    name = next((name for name in REMAT if needed(name, rows) <= ROOM * had), REMAT[-1])
    why = f"{needed(name, rows) / 2**30:.1f} of {had / 2**30:.1f} GiB a device, by an estimate; see --preflight"
    fewer = next((n for n in (rows // 2, rows // 4) if n and needed(REMAT[0], n) <= ROOM * had), None)
    if name != REMAT[0] and fewer:
        why += f"; with --device-batch-size={fewer} nothing would be computed again"
    return Choice(name, why)
