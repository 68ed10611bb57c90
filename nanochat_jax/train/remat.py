"""Rematerialization: what the backward pass computes again in place of keeping it, chosen by an estimate of memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.distributed.device_memory import bytes_on_device, device_memory
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.model.loss import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU
from nanochat_jax.train.step import TrainState

# Bytes that the forward pass keeps for each token, layer and channel of the residual stream, in a compute type of 2
# bytes: a rough fit to what XLA reported of depth 8 on CPU, and of depths 2 to 34 on v5e, v6e and v5p.
KEPT = {"none": 40, "elementwise": 28, "block": 10}
LOGIT_BYTES = 4 * 4  # of the loss's work for each logit of a chunk: float32, four arrays
USABLE = 0.85  # share of a device's memory that this estimate may fill


class RematChoice(NamedTuple):
    """What is computed again in the backward pass, and why."""

    name: str
    why: str


def kept_for_backward(config: GPTConfig, remat: str, tokens: int, dtype: Any) -> int:
    """Bytes on a device, roughly, of what the forward pass of its `tokens` tokens keeps for the backward pass."""
    return KEPT[remat] * jnp.dtype(dtype).itemsize // 2 * tokens * config.n_layer * config.n_embd


def held_anyway(state: TrainState) -> int:
    """Bytes on a device, roughly, that the train step needs whatever --remat says: the state (real or abstract), the
    gradients with their sum or the updates, and the loss's work."""
    (device, *_) = state.step.sharding.device_set
    logits = CHUNK_ELEMENTS_CPU if device.platform == "cpu" else CHUNK_ELEMENTS
    return bytes_on_device(state) + 2 * bytes_on_device(state.params) + LOGIT_BYTES * logits


def choose_remat(wanted: str, config: GPTConfig, state: TrainState, dtype: Any, rows: int, T: int) -> RematChoice:
    """The --remat in force; "auto" is the first of REMAT with which everything fits by an estimate, else the last.

    state: real or abstract, for its shardings. rows: of T tokens, of a device in one pass. Where half or a quarter of
    them would need nothing computed again, the reason says so."""
    if wanted != "auto":
        return RematChoice(wanted, "as --remat says")
    devices = state.step.sharding.device_set
    had = device_memory(next((d for d in jax.local_devices() if d in devices), next(iter(devices))))
    if had is None:
        return RematChoice(REMAT[0], "the device does not tell how much memory it has")

    def needed(name, rows):
        return held_anyway(state) + kept_for_backward(config, name, rows * T, dtype)

    name = next((name for name in REMAT if needed(name, rows) <= USABLE * had), REMAT[-1])
    why = f"{needed(name, rows) / 2**30:.1f} of {had / 2**30:.1f} GiB a device, by an estimate; see --preflight"
    fewer = next((n for n in (rows // 2, rows // 4) if n and needed(REMAT[0], n) <= USABLE * had), None)
    if name != REMAT[0] and fewer:
        why += f"; with --device-batch-size={fewer} nothing would be computed again"
    return RematChoice(name, why)
