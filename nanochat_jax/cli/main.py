"""How a command ends: with an exit code, and with one sentence for whatever can go wrong in a user's hands."""

import contextlib
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from nanochat_jax.distributed import processes
from nanochat_jax.files import bucket

NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def run_stage(main: Callable[[Any], int], cfg: Any) -> None:
    """Exit with what main(cfg) returns; what can go wrong in a user's hands ends with a sentence, not a traceback."""
    gc.set_threshold(20_000, 20, 20)  # tracing makes many objects and little garbage
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows \xNN
            stream.reconfigure(errors="backslashreplace")
    at_imports = signal.getsignal(signal.SIGINT)
    is_command = getattr(at_imports, "__name__", "") == "stop_at_once"  # see nanochat_jax/__init__.py
    if is_command:  # it cleans up after a KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = _raising_interrupts_again(sys.unraisablehook)
    try:
        try:
            sys.exit(main(cfg))
        except BrokenPipeError:
            write_nowhere()
            said = "whoever read the output has closed it, so the run has stopped"
            sys.exit(f"error: {said}; write to a file instead of a pipe")
        except OSError as e:
            sys.exit(f"error: {_sentence(e)}")
        except (ValueError, MemoryError, FloatingPointError) as e:
            sys.exit(f"error: {e}")
        except Exception as e:
            if (said := bucket.error_text(e)) is None:
                raise
            sys.exit(f"error: {said}")
        except KeyboardInterrupt:
            print("\nStopped by SIGINT", file=sys.stderr, flush=True)
            if is_command and processes.count() == 1:  # else Python waits for threads that still write or judge
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(130)
            sys.exit(130)
    finally:
        processes.leave()


def _raising_interrupts_again(previous: Callable) -> Callable:
    """A KeyboardInterrupt inside a callback of JAX goes no further: it is sent anew, outside of the callback."""

    def hook(dropped) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            previous(dropped)

    return hook


def _sentence(e: OSError) -> str:
    """What the system says, without its number: the place where it is known, and advice where another one helps."""
    if e.errno is None or not e.strerror:  # one of our own sentences
        return str(e)
    said = f"{e.filename}: {e.strerror}" if e.filename is not None else e.strerror
    advice = ": free some space, or choose another place with NANOCHAT_BASE_DIR, --output-dir or --output"
    return said + (advice if e.errno in NO_PLACE else "")


def write_nowhere() -> None:
    """After a closed pipe: else Python complains again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
