"""Long phases in which nothing is seen: lines say what is going on, and afterwards how long it took."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from nanochat_jax.distributed.processes import print0

PATIENCE = 2.0  # seconds that nothing need be said
INTERVAL = 20.0  # seconds between two lines about work that goes on, where there is no terminal


class Silence:
    """How long nothing has been said: `over` where it is time for another line about work that goes on."""

    def __init__(self):
        self.begin()

    def begin(self) -> None:
        """Something has been said just now."""
        self._began = time.monotonic()

    def over(self) -> bool:
        """Whether nothing has been said for INTERVAL."""
        return time.monotonic() > self._began + INTERVAL


@contextlib.contextmanager
def saying(what: str, say: Callable[[str], None] = print0) -> Iterator[None]:
    """While it is entered for longer than PATIENCE, `say` gets "<what> ..." and at the end "<what>: 12.3 s".

    what: such as "compiling the train step". say: is called from another thread; default: prints on process 0."""
    began = time.perf_counter()
    timer = threading.Timer(PATIENCE, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.perf_counter() - began) > PATIENCE:
        say(f"{what}: {seconds:.1f} s")
