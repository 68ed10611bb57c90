"""How far long work is: bars on a terminal, elsewhere lines now and then."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat_jax.cli.waiting import Silence
from nanochat_jax.distributed import processes


class Bars:
    """Shows on process 0 how far each of some works is, and lines that stay."""

    def __init__(self):
        self.console, self._silence = Console(quiet=processes.index() > 0), Silence()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        disable = not self.console.is_terminal
        self._bars = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=disable)

    def shown(self) -> contextlib.AbstractContextManager:
        """While it is entered, bars can be seen."""
        return self._bars

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A function to call with (done, total) while it is entered."""
        bar = self._bars.add_task(name, total=total)

        def progress(done: int, total: int) -> None:
            self._bars.update(bar, completed=done, total=total)
            if not self.console.is_terminal and self._silence.over():
                self.say(f"{name}: {done:,} of {total:,}")

        try:
            yield progress
        finally:
            self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """A line that stays."""
        print_line(self.console, text)
        self._silence.begin()


def print_line(console: Console, text: str) -> None:
    """A line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
