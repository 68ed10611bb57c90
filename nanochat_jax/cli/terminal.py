"""What a user types while a command is at work must not get into what it writes."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

try:
    import termios
except ImportError:  # Windows has none
    termios = None

ENDING = (signal.SIGTERM, *(getattr(signal, name) for name in ("SIGQUIT", "SIGTSTP") if hasattr(signal, name)))


@contextlib.contextmanager
def typing_unseen() -> Iterator[None]:
    """While it is entered, what is typed on the terminal is kept for the next prompt and not shown.

    The terminal is as before when it is left, and while the process is stopped or after it was ended by a signal. It is
    left alone where standard input or output is none, or is another job's."""
    before = _modes() if threading.current_thread() is threading.main_thread() else None
    if before is None:
        yield
        return

    def set_echo(on: bool) -> None:
        input_modes, output_modes, control, local, *rest = before
        local = local if on else local & ~termios.ECHO
        with contextlib.suppress(OSError, termios.error):  # the terminal is gone
            if os.tcgetpgrp(0) == os.getpgrp():  # else the system would stop this process
                termios.tcsetattr(0, termios.TCSADRAIN, [input_modes, output_modes, control, local, *rest])

    def stop(number, frame) -> None:
        set_echo(True)
        if callable(handlers[number]):
            handlers[number](number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            signal.signal(number, stop)  # it was SIGTSTP, and the process goes on
        set_echo(False)

    handlers = {number: signal.getsignal(number) for number in ENDING}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in handlers:
            signal.signal(number, stop)
        set_echo(False)
        yield
    finally:
        set_echo(True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _modes() -> list | None:
    """The modes of the terminal that this process reads from and writes to, in its foreground; None: it does not."""
    if termios is None:
        return None
    try:
        ours = sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(0) == os.getpgrp()
        return termios.tcgetattr(0) if ours else None
    except (AttributeError, OSError, ValueError, termios.error):  # a stream is closed, or the terminal is gone
        return None
