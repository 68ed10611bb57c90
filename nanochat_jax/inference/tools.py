"""What a model may call in the middle of an answer: the calculator, a program, or a tool of the user's own.

A call is the text between python_start and python_end. With one tool the whole text is for that one; with several its
first word names the tool, and what follows is for it. A text that begins with no tool's name is for the first tool.
"""

import contextlib
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat_jax.cli.own_code import load_object
from nanochat_jax.inference.calculator import calculate
from nanochat_jax.tasks import sandbox
from nanochat_jax.tokenizer import Tokenizer

SECONDS = 10.0  # of a call of a tool that names no limit of its own
MAX_SECONDS = 3600.0
CALLS_AT_ONCE = 32
MOST_STUCK = 64  # threads of calls that were given up and run on, above which no further call is made
CHARACTERS = 64  # of a result that are looked at for each token of it that may stay: more than nearly all have
RESULT_TOKENS = 512  # the most that nanochat's commands generate, so that none of their results is ever cut
PROGRAM_SECONDS = 5.0
PROGRAM_LINES = 10
PROGRAMS = threading.BoundedSemaphore(min(8, os.cpu_count() or 1))  # at once: more would take away each other's time


@dataclass(frozen=True)
class Tool:
    """Something that answers a text with a text, or with None where it has no answer.

    seconds: after which a call is given up; 0 of the calculator alone, which takes no time and is asked on the spot.
    The calls of other tools run in threads, several at once."""

    name: str
    call: Callable[[str], str | None]
    seconds: float = SECONDS


def run_program(program: str) -> str:
    """The last lines that a Python program prints in the sandbox, and the last line of its error where it has one.

    TimeoutError: it did not end within PROGRAM_SECONDS."""
    with PROGRAMS:
        result = sandbox.run(program, timeout=PROGRAM_SECONDS)
    if result.reason == "timeout":
        raise TimeoutError
    lines = result.stdout.splitlines() + (result.stderr.splitlines()[-1:] if result.reason else [])
    return "\n".join(lines[-PROGRAM_LINES:])


CALCULATOR = Tool("calculator", calculate, 0.0)
PYTHON = Tool("python", run_program, 120.0)  # it has its own limit, and waits where many programs run
BUILT_IN = {tool.name: tool for tool in (CALCULATOR, PYTHON)}


@dataclass(frozen=True)
class ToolCall:
    """What stood in a block of python_start and python_end, and its result as text; None: it has none, and nothing was
    forced."""

    expression: str
    result: str | None
    timed_out: bool = False


Answer = tuple[ToolCall, list[int]]  # a call that is over, and its result's token ids, of which none is special


@dataclass(eq=False)
class RunningCall:
    """A call that was begun, or waits for a thread."""

    tool: Tool
    text: str  # for the tool
    expression: str
    deadline: float = math.inf  # of `time.monotonic`, from when a thread has taken it
    answer: Answer | None = None
    given_up: bool = False


class Toolbox:
    """The tools of an engine, and the threads in which their calls run.

    result_tokens: what is longer of a result is cut off. A tool that hangs cannot be stopped: its thread is left alone,
    and another one takes its place."""

    def __init__(self, tools: Sequence[Tool] = (CALCULATOR,), result_tokens: int = RESULT_TOKENS):
        names = [tool.name for tool in tools]
        if not names or len({*names}) < len(names):
            raise ValueError(f"--tool must name tools, each by another name, got {', '.join(names) or 'none'}")
        self.tools, self.result_tokens = tuple(tools), result_tokens
        self._queue: queue.SimpleQueue[tuple[RunningCall, Tokenizer]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # also the lock of what follows, and of what becomes of calls
        self._threads = self._stuck = 0  # that take calls, that were given up
        self._told: set[str] = set()  # tools of which an error was told

    @property
    def threaded(self) -> bool:
        """Whether calls may take time, so that it is chance when they are answered."""
        return any(tool.seconds for tool in self.tools)

    def start(self, expression: str, tokenizer: Tokenizer) -> RunningCall:
        """Make a call; the calculator has answered it already."""
        call = RunningCall(*self._choose(expression), expression)
        if call.tool.seconds == 0:
            call.answer = self._encoded(call, call.tool.call(call.text), tokenizer)
            return call
        with self._changed:
            self._add_thread()
        self._queue.put((call, tokenizer))
        return call

    def answer_of(self, call: RunningCall) -> Answer | None:
        """What has come of a call, None where nothing has yet. One that is over its limit is given up."""
        no_thread = self._stuck >= MOST_STUCK and self._threads == 0
        if call.answer is None and (time.monotonic() > call.deadline or no_thread):
            self.give_up(call)
        return call.answer

    def give_up(self, call: RunningCall) -> None:
        """Want no answer of a call any more."""
        with self._changed:
            if call.answer is not None or call.given_up:
                return
            call.answer, call.given_up = (ToolCall(call.expression, None, timed_out=True), []), True
            if call.deadline < math.inf:
                self._threads, self._stuck = self._threads - 1, self._stuck + 1
                self._add_thread()

    def wait(self, calls: Sequence[RunningCall], seconds: float) -> None:
        """Until one of the calls is over, but at most so long."""
        seconds = min(seconds, *(call.deadline - time.monotonic() for call in calls))
        with self._changed:
            self._changed.wait_for(lambda: any(call.answer for call in calls), max(0.0, seconds))

    def _choose(self, expression: str) -> tuple[Tool, str]:
        if len(self.tools) > 1:
            word, *rest = expression.split(maxsplit=1) or [""]
            for tool in self.tools:
                if tool.name == word:
                    return tool, "".join(rest)
        return self.tools[0], expression

    def _add_thread(self) -> None:
        if self._threads < CALLS_AT_ONCE and self._stuck < MOST_STUCK:
            self._threads += 1
            threading.Thread(target=self._work, name="tool calls", daemon=True).start()

    def _work(self) -> None:
        while True:
            call, tokenizer = self._queue.get()
            with self._changed:
                if call.given_up:
                    continue
                call.deadline = time.monotonic() + call.tool.seconds
            answer = self._attempt(call, tokenizer)
            with self._changed:
                if call.given_up:  # another thread has this one's place
                    self._stuck -= 1
                    return
                call.answer = answer
                self._changed.notify_all()

    def _attempt(self, call: RunningCall, tokenizer: Tokenizer) -> Answer:
        try:
            result = call.tool.call(call.text)
            if not isinstance(result, str | None):
                raise TypeError(f"a result must be text or None, got {type(result).__name__}")
            return self._encoded(call, result, tokenizer)
        except BaseException as e:  # whatever a user's tool does
            timed_out = isinstance(e, TimeoutError)
            if not timed_out and call.tool.name not in self._told:  # else a fault would only show as a number
                self._told.add(call.tool.name)
                with contextlib.suppress(Exception):  # of an error whose text cannot be had
                    print(f"WARNING: tool {call.tool.name}: {type(e).__name__}: {e!s:.300}", file=sys.stderr)
            return ToolCall(call.expression, None, timed_out), []

    def _encoded(self, call: RunningCall, result: str | None, tokenizer: Tokenizer) -> Answer:
        if result is None:
            return ToolCall(call.expression, None), []
        result = result[: CHARACTERS * self.result_tokens]  # megabytes would take their time
        ids = tokenizer.encode(result)
        if len(ids) > self.result_tokens:
            ids = ids[: self.result_tokens]
            result = tokenizer.decode(ids)
        return ToolCall(call.expression, result), ids


CALCULATOR_ALONE = Toolbox()  # nanochat's


def make_toolbox(specs: Sequence[str], result_tokens: int = RESULT_TOKENS) -> Toolbox:
    """The tools that --tool names: calculator, python, or module:Class; none named is the calculator alone.

    ValueError, one sentence: there is no such tool, or it cannot be used here."""
    return Toolbox([make_tool(spec) for spec in specs] or [CALCULATOR], result_tokens)


def make_tool(spec: str) -> Tool:
    """One of them. Class has a `name` of one word, `call(text)`, and perhaps `seconds`; it may be a Tool itself."""
    if ":" not in spec:
        if spec not in BUILT_IN:
            raise ValueError(f"--tool must be {', '.join(BUILT_IN)} or module:Class, got {spec!r:.60}")
        if spec == PYTHON.name and (fault := sandbox.guard_fault()):
            raise ValueError(f"{fault}, so --tool python, which runs what the model writes, is refused")
        return BUILT_IN[spec]
    made = load_object(spec, "--tool")
    name, call, seconds = getattr(made, "name", None), getattr(made, "call", None), getattr(made, "seconds", SECONDS)
    if not isinstance(name, str) or name.split() != [name]:
        raise ValueError(f"--tool {spec}: its name must be one word, got {name!r:.60}")
    if not callable(call):
        raise ValueError(f"--tool {spec} must have call(text), which gives text or None")
    if not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS or not math.isfinite(seconds):
        raise ValueError(f"--tool {spec}: its seconds must be above 0 and at most {MAX_SECONDS:g}, got {seconds!r:.60}")
    return Tool(name, call, float(seconds))
