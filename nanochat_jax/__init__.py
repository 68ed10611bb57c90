"""nanochat_jax: SFT and RL of nanochat models in JAX."""

import contextlib
import importlib.util
import os
import signal
import sys

OLDEST_PYTHON = (3, 12)


def stop_at_once(number, _frame):
    """End a command by a signal that nothing else handles: a line, and exit code 128 + number."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        if sys.stdout.isatty():
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    os.write(2, f"\nStopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def begin_command(module):
    """What comes before the seconds of a command's imports: signals end it with a line, where a KeyboardInterrupt would
    be a traceback or swallowed; a Python that cannot run it is told so; and --help is answered.

    module: its full name. Python of any version must be able to read this."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop_at_once)
    if sys.version_info < OLDEST_PYTHON:
        oldest, this = ".".join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        sys.exit(f"nanochat_jax needs Python {oldest} or newer, {sys.executable} is {this}")
    if importlib.util.find_spec("jax") is None:
        sys.exit(
            f"the packages of nanochat_jax are not installed in {sys.executable}: run tools/setup.sh, "
            "then .venv/bin/python instead of python, or first: source .venv/bin/activate"
        )
    command = module.rpartition(".")[2]
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        from nanochat_jax.flags.commands import show_help

        show_help(command, sys.argv[1:])


# Python sets "-m" while it imports the package of the module to run, so that whoever imports this as a library is left
# alone.
if sys.argv[:1] == ["-m"]:
    for word in getattr(sys, "orig_argv", []):
        if word.startswith(__name__):
            begin_command(word)
            break
elif os.path.basename(sys.argv[0] if sys.argv else "") == "nanochat-jax":
    begin_command(__name__)
