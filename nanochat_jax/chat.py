"""Talk with a model in the terminal. Its settings, with examples: flags/chat.py.

Answers go to standard output, notes about them to standard error. A call of a tool is shown as [expression = result],
one without a result as [expression].
"""

import contextlib
import itertools
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from nanochat_jax.checkpoints import find
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.device import compute_dtype, start_device
from nanochat_jax.cli.settings import check_bounds, require
from nanochat_jax.cli.terminal import typing_unseen
from nanochat_jax.cli.waiting import saying
from nanochat_jax.flags.chat import ChatConfig
from nanochat_jax.inference.engine import Engine, text_pieces
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import make_toolbox
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.tokenizer.show import visible

CALL_STYLE, NOTE_STYLE = Style.parse("cyan"), "dim"
JOINERS = "\u200c\u200d"  # invisible, but needed to spell Persian, the scripts of India and emoji


class History:
    """The chat so far as token ids. A turn goes from user_start to assistant_end; answers stay as they were generated.

    context: most tokens of a prompt with its answer. reserved: tokens of it that earlier turns leave for an answer.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, reserved: int):
        self.tokenizer, self.context, self.reserved = tokenizer, context, reserved
        self.turns: list[list[int]] = []

    def question(self, message: str) -> list[int]:
        """user_start, the message, user_end, assistant_start. ValueError: it leaves no room for an answer."""
        conversation = {"messages": [{"role": "user", "content": message}]}
        (_bos, *ids), _ = self.tokenizer.render_conversation(conversation, max_tokens=None)
        limit = self.context - 5  # bos, the three special tokens, and one token of the answer
        require(
            len(ids) - 2 <= limit,
            f"a message must have at most {limit:,} tokens to fit into the model's context of {self.context:,}, "
            f"this one has {len(ids) - 2:,}; it was not sent",
        )
        return [*ids, self.tokenizer.special("<|assistant_start|>")]

    def make_room(self, question: list[int]) -> int:
        """Forget the oldest turns until question and answer fit -> how many were forgotten."""
        before = len(self.turns)
        while self.turns and len(self.prompt(question)) + self.reserved > self.context:
            del self.turns[0]
        return before - len(self.turns)

    def prompt(self, question: list[int]) -> list[int]:
        """The token ids of the chat so far and of the question."""
        return [self.tokenizer.bos, *itertools.chain(*self.turns), *question]

    def add(self, question: list[int], answer: Iterable[int]) -> None:
        """Add a turn; `answer` is without its end token."""
        self.turns.append([*question, *answer, self.tokenizer.special("<|assistant_end|>")])


class Answer:
    """One answer while it is generated: `tokens` are those so far, `pieces` the text that is shown."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.tokens = tokenizer, []
        self.call: int | None = None  # index in `tokens` of the tool call that is not over yet
        self._names = {i: name for name, i in tokenizer.special_tokens.items()}

    def pieces(self, stream: Iterable[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
        """(token, mask) pairs -> (text, whether it belongs to a tool call). Special tokens are not shown."""
        inside = ""  # the last part of a call: "expression", "end" (a result may follow or not) or "result"
        for name, run in itertools.groupby(self._keep_tokens(stream), self._name):
            if inside == "end" and name != "<|output_start|>":
                yield "]", True
                inside, self.call = "", None
            if name == "":
                for text in text_pieces(self.tokenizer, (token for token, _ in run)):
                    yield escaped(text), bool(inside)
            elif name == "<|python_start|>":  # also inside of a call, which then starts again, as in the engine
                yield "][" if inside else "[", True
                inside, self.call = "expression", len(self.tokens) - 1
            elif name == "<|python_end|>" and inside == "expression":
                inside = "end"
            elif name == "<|output_start|>" and inside == "end":
                yield " = ", True
                inside = "result"
            elif name == "<|output_end|>" and inside == "result":
                yield "]", True
                inside, self.call = "", None
        if inside:
            yield "]", True

    def kept(self, ended: bool) -> list[int]:
        """The tokens for the history: without the end token, and without a call in which the answer was cut."""
        return self.tokens[:-1] if ended else self.tokens[: self.call]

    def _keep_tokens(self, stream):
        for token, mask in stream:
            self.tokens.append(token)
            yield token, mask

    def _name(self, pair: tuple[int, int]) -> str:
        """A special token's name, "" for text. Output tokens have a meaning only where the engine has forced them."""
        token, sampled = pair
        name = self._names.get(token, "")
        return "no meaning" if sampled and name.startswith("<|output") else name


def escaped(text: str) -> str:
    """The text with escapes such as \\x1b for all that a terminal acts on, except for new lines and tabs."""
    return "".join(c if c in "\n\t" + JOINERS or unicodedata.category(c) == "Zs" else visible(c, "") for c in text)


@contextlib.contextmanager
def watching_interrupts() -> Iterator[Callable[[Iterable], Iterator]]:
    """Gives watch(items): the items until Ctrl-C is pressed, then KeyboardInterrupt instead of the next one.

    Where Python raises KeyboardInterrupt inside a callback of JAX, it is printed and dropped: so Ctrl-C is recorded."""
    pressed = False

    def record(number, frame):
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def watch(items):
        for item in items:
            if pressed:
                raise KeyboardInterrupt
            yield item

    hook = sys.unraisablehook
    with contextlib.ExitStack() as stack:
        raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, or has an owner
        if raises and threading.current_thread() is threading.main_thread():
            stack.callback(setattr, sys, "unraisablehook", hook)
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, record))
            sys.unraisablehook = lambda dropped: issubclass(dropped.exc_type, KeyboardInterrupt) or hook(dropped)
        yield watch


class Chat:
    """The chat with a model in the terminal."""

    def __init__(self, engine: Engine, params, sampling: SamplingParams, seed: int):
        self.engine, self.params, self.sampling, self.seed, self.asked = engine, params, sampling, seed, 0
        self.history = History(engine.tokenizer, engine.context, min(sampling.max_new_tokens, engine.context // 2))
        self.notes = Console(stderr=True)
        stdout = Console()
        self.colours = ColorSystem.STANDARD if stdout.color_system and not stdout.no_color else None

    def reply(self, message: str) -> bool:
        """Print the answer as it comes -> False where Ctrl-C has stopped it. ValueError: the message cannot be sent."""
        question = self.history.question(message)
        if forgotten := self.history.make_room(question):
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            self.note(f"the oldest {turns} forgotten: the context of {self.engine.context:,} has no room for more")
        prompt, answer, stopped = self.history.prompt(question), Answer(self.engine.tokenizer), False
        seed = (self.seed + self.asked) % 2**31
        wait = "thinking" if self.asked else "compiling, for the first answer"
        self.asked += 1
        stream = self.engine.stream(self.params, prompt, self.sampling, seed=seed)
        try:
            with typing_unseen(), watching_interrupts() as watch, contextlib.closing(stream):
                with self.notes.status(wait):
                    first = list(itertools.islice(stream, 1))
                for text, is_call in answer.pieces(watch(itertools.chain(first, stream))):
                    self.write(CALL_STYLE.render(text, color_system=self.colours) if is_call else text)
        except KeyboardInterrupt:
            stopped = True
        self.write("\n")
        ended = not self.engine.control_tokens.ends.isdisjoint(answer.tokens[-1:])
        if answer.tokens:
            self.history.add(question, answer.kept(ended))
        if stopped:
            self.note("stopped" if answer.tokens else "stopped before the answer began; the message is forgotten")
        elif not ended:
            full = len(prompt) + len(answer.tokens) == self.engine.context
            limit = f"the end of the context of {self.engine.context:,}" if full else "--max-new-tokens"
            self.note(f"the answer was cut after {len(answer.tokens):,} tokens, by {limit}")
        return not stopped

    def write(self, text: str) -> None:
        """Print a piece of the answer at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(self, sentence: str, style: str = NOTE_STYLE) -> None:
        """A sentence about the chat, on standard error."""
        self.notes.print(Text(f"({visible(sentence, '')})", style), soft_wrap=True)

    def talk(self) -> None:
        """Answer what the user types until the chat is ended."""
        for line in self.lines():
            message = line.strip()
            if message.lower() in ("quit", "exit"):
                return
            if message.lower() == "clear":
                self.history.turns.clear()
                self.note("the chat is forgotten")
            elif message:
                try:
                    self.reply(message)
                except ValueError as e:
                    self.note(str(e), "red")

    def lines(self) -> Iterator[str]:
        """What the user types, or the lines of a file or pipe, until the end."""
        typed = sys.stdin.isatty()
        if typed:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  # input() uses it; without a terminal it would write escape codes
        warned = False
        while True:
            try:
                line = input("> " if typed and sys.stdout.isatty() else "")
            except EOFError:
                self.write("\n" if typed else "")
                return
            except KeyboardInterrupt:
                if warned:
                    raise
                warned = True
                self.write("\n" if typed else "")
                self.note("Ctrl-C again, Ctrl-D or quit ends the chat")
                continue
            warned = False
            yield line


def load_model(cfg: ChatConfig) -> tuple[Engine, Any, find.Found]:
    """(engine, its parameters, where they were found), on one device."""
    tools = make_toolbox(cfg.tool, cfg.tool_tokens)
    found = find.find_model(cfg.source, cfg.model_tag, cfg.step, cfg.base)
    start_device(cfg.device_type)
    model = find.chat_model_of(found, compute_dtype(cfg.dtype), tools=tools)
    return model.engine, model.params, found


def main(cfg: ChatConfig) -> int:
    """Talk -> the exit code: 0, or 130 where Ctrl-C has stopped the answer to --prompt."""
    sampling = SamplingParams(cfg.temperature, cfg.top_k, cfg.max_new_tokens)
    check_bounds(cfg)
    require(cfg.prompt != "", "--prompt must hold a message, got an empty one")
    require(cfg.prompt is not None or sys.stdin is not None, "standard input is closed: give a message with --prompt")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    require(sys.stdout is not None, "standard output is closed: there is nowhere to print an answer to")
    to_stderr = contextlib.redirect_stdout(sys.stderr)  # a warning is no part of an answer
    with typing_unseen(), to_stderr, saying("reading the model"):
        engine, params, found = load_model(cfg)
    chat = Chat(engine, params, sampling, cfg.seed)
    if found.source == "base":
        chat.note("a base model has not learned to take turns: expect it to go on with any text")
    if cfg.prompt is not None:
        return 0 if chat.reply(cfg.prompt) else 130
    if sys.stdin.isatty():
        chat.note(f"{found}; clear: start again; quit or Ctrl-D: end; Ctrl-C: stop an answer")
    chat.talk()
    return 0


if __name__ == "__main__":
    cli_main.run_stage(main, parse(ChatConfig, prog="python -m nanochat_jax.chat"))
