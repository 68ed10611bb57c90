"""What a device holds while it trains: what it has, what the state takes, and what the backward pass needs kept."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.distributed.device_memory import bytes_on_device, device_memory
from nanochat_jax.model.gpt import REMAT, GPTConfig
from nanochat_jax.model.loss import CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU
from nanochat_jax.train.step import TrainState

# Bytes that are kept for each token, layer and channel of the residual stream, for a compute type of 2 bytes: a rough
# fit to what XLA said of depth 8 on CPU, and of depths 2 to 34 on v5e, v6e and v5p.
KEPT = {"none": 40, "elementwise": 28, "block": 10}
LOGITS = 4 * 4  # bytes of the loss's work for each logit of a chunk
ROOM = 0.85  # of a device's memory may be filled by this estimate


class Choice(NamedTuple):
    """What is computed again in the backward pass, and why."""

    name: str
    why: str


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
