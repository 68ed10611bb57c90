"""Signals that ask a run to stop: noted, told to its other processes, and looked at where it can stop."""

import contextlib
import signal

from nanochat_jax.distributed import processes


class Interrupted(Exception):
    """A signal has come, and what is going on, a batch in the making or a measurement, takes too long to wait for."""


class Signals:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the process; a second SIGINT ends it. Of
    several processes each learns of the signal that any of them got."""

    def __init__(self):
        self._own = 0

    @property
    def received(self) -> int:
        """The signal's number, 0 for none; among several processes not the same everywhere at the same moment."""
        return self._own or processes.signal_noticed()

    def stop(self) -> bool:
        """Whether to stop here, the same answer on all processes: all must ask equally often."""
        return processes.stop_here() if processes.count() > 1 else bool(self._own)

    def check(self, *_) -> None:
        """Interrupted where a signal was received: for whatever makes batches slowly."""
        if self.received:
            raise Interrupted

    def __enter__(self):
        self.context = contextlib.ExitStack()
        if processes.count() > 1:
            self.context.enter_context(processes.stopping_in_order())
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self.context.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *error):
        return self.context.__exit__(*error)

    def _note(self, number, frame):
        if self._own and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = number
