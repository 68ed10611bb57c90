"""How far transfers are: bars on a terminal, lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanochat_jax.distributed import processes

SAID_EVERY = 10  # seconds between lines where there is no terminal


@contextlib.contextmanager
def progress(log: Callable) -> Iterator[Callable]:
    """start(name) -> report(done, total), in bytes: a bar on process 0's terminal, elsewhere a line now and then."""
    console = Console(stderr=True)
    if not processes.index() and console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bars:

            def start(name: str) -> Callable:
                bar = bars.add_task(name, total=None)
                return lambda done, total: bars.update(bar, completed=done, total=total, visible=done != total)

            yield start
        return

    def start(name: str) -> Callable:
        said = time.monotonic()

        def report(done: int, total: int | None) -> None:
            nonlocal said
            if time.monotonic() - said > SAID_EVERY:
                said = time.monotonic()
                log(f"downloading {name}: {done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} MB" if total else " MB"))

        return report

    yield start
