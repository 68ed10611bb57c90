"""nanochat_jax: SFT and RL of nanochat models in JAX."""

import contextlib
import os
import signal
import sys


def stop_at_once(number: int, _frame: object) -> None:
    """End a command by a signal that nothing else handles: a line, and exit code 128 + number."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, f"\nStopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


# Here, before the seconds of a command's imports, in which a KeyboardInterrupt is a traceback or is swallowed. Python
# sets "-m" while it imports the package of the module to run, so that whoever imports this as a library is left alone.
if sys.argv[:1] == ["-m"] and any(word.startswith(__name__) for word in sys.orig_argv):
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop_at_once)
