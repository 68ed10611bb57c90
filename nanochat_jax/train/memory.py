"""What to do when a device runs out of memory."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from nanochat_jax.cli.settings import flag
from nanochat_jax.distributed.device_memory import is_out_of_memory

FEWER_ROWS = (
    "Lower --device-batch-size first: gradient accumulation keeps --total-batch-size, and so the training, the same. "
    "Then --remat block, a lower --max-seq-len, or more devices (parameters and optimizer are sharded over them)"
)


@contextlib.contextmanager
def explaining_memory(in_force: Mapping[str, Any], advice: str = FEWER_ROWS) -> Iterator[None]:
    """Where the device runs out of memory inside, MemoryError with the settings in force and the flags to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        shown = ", ".join(f"{flag(name)}={value}" for name, value in in_force.items())
        raise MemoryError(
            f"Out of device memory with {shown}. {advice}. The device said: {str(error).splitlines()[0][:300]}"
        ) from error
