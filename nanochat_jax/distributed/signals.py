"""SIGTERM and SIGINT ask a run to stop: they are recorded, shared among the processes, and obeyed where it can stop."""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, Self

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.coordinator import STOP_SIGNALS


class Interrupted(Exception):
    """A signal has come during work that takes too long to be finished: the making of a batch, or a measurement."""


class FailedTogether(ValueError):
    """Work that all processes share has failed on one of them, and all of them know."""


class Signals:
    """Inside, SIGTERM and SIGINT are recorded instead of ending the process; a second SIGINT ends it. Each of several
    processes learns of a signal that any of them got."""

    def __init__(self, first: Callable[[], str] = str, second: Callable[[], str] = str):
        """first, second: what standard error says at once when the first signal comes, and when a second SIGINT does,
        of a run of one process."""
        self._first, self._second = first, second
        self._own = 0  # the signal that this process got, where it is the only one
        self._stack = contextlib.ExitStack()

    @property
    def received(self) -> int:
        """The signal's number, 0 for none; among several processes it changes at another moment on each."""
        return self._own or processes.signal_noticed()

    def stop(self) -> bool:
        """Whether to stop here. All processes must call it equally often, and get the same answer."""
        return processes.stop_here() if processes.count() > 1 else bool(self._own)

    def check(self, *_: Any) -> None:
        """Raise Interrupted if a signal was received."""
        if self.received:
            raise Interrupted

    def __enter__(self) -> Self:
        if processes.count() > 1:
            self._stack.enter_context(processes.stopping_in_order())
        else:
            for number in STOP_SIGNALS:
                self._stack.callback(signal.signal, number, signal.signal(number, self._record))
        return self

    def __exit__(self, *error: Any) -> bool:
        return self._stack.__exit__(*error)

    def _record(self, number: int, _frame: Any) -> None:
        again = bool(self._own)
        if not again or number == signal.SIGINT:
            said = self._second() if again else self._first()
            os.write(2, f"\n{said}\n".encode() if said else b"")  # not through a stream that may be in use just now
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = number


def collect[T](what: str, compute: Callable[[], T]) -> list[T]:
    """What compute() returns on each process, by their numbers; the values travel as JSON.

    Where compute raises Interrupted on one process, all raise it, so that they give up a measurement together. Another
    error there is a FailedTogether on all."""
    error = None
    try:
        part = [compute(), ""]
    except Interrupted:
        part = None
    except Exception as e:
        if processes.count() == 1:
            raise
        error, part = e, [None, f"{what}: {type(e).__name__}: {e} (process {processes.index()})"]
    parts = processes.exchange(what, part)
    if None in parts:
        raise Interrupted
    if failed := next((reason for _, reason in parts if reason), ""):
        raise FailedTogether(failed) from error
    return [value for value, _ in parts]
