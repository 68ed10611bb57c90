"""A prompt's continuation, finished (`Sample`) and in progress; tool calls in it are found here.

Facts of nanochat (its Engine, 2026): a result is forced as output_start, text, output_end; a token sampled where a
forced one is due is thrown away; assistant_end and bos end a sample, also inside a block; forced tokens count as new.
A reply of an environment, which nanochat does not have, is forced as it renders a user's message between two answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanochat_jax.inference.tools import CALCULATOR_ALONE, RunningCall, Toolbox, ToolCall


@dataclass
class Sample:
    """A prompt's continuation. If it was ended by an end token, that is its last."""

    tokens: np.ndarray  # int32 [n]
    mask: np.ndarray  # uint8 [n]: 1 sampled, 0 forced
    logprobs: np.ndarray  # float32 [n]: of a sampled token, under the distribution it was drawn from; 0 where forced
    policy_logprobs: np.ndarray  # the same, under the model's own distribution: temperature 1, no limit
    ended: bool  # by an end token; False: cut at max_new_tokens or at the context's end
    tool_calls: list[ToolCall]
    turns: int = 1  # answers of the model in it; those after the first follow a reply of an environment


class ControlTokens:
    """Ids of the special tokens that steer a sample, and the tools that it may call.

    ends: each ends a sample where it is sampled. block: (start, end) of a call, None without tools. output: (start,
    end) of its result."""

    def __init__(self, tokenizer, tools: Toolbox | None = CALCULATOR_ALONE):
        def pair(name):
            return tuple(tokenizer.special(f"<|{name}_{side}|>") for side in ("start", "end"))

        self.tokenizer, self.tools = tokenizer, tools
        self.end_of_turn = tokenizer.special("<|assistant_end|>")
        self.ends = {self.end_of_turn, tokenizer.special("<|bos|>")}
        self.answer_start = tokenizer.special("<|assistant_start|>")
        self.block = pair("python") if tools else None
        self.output = pair("output")


@dataclass
class SampleInProgress:
    """A sample that has a row: what it has so far, and the tokens that will be forced next."""

    control_tokens: ControlTokens
    prompt: int  # its prompt, as `SlotScheduler.add` has numbered it
    number: int  # among the prompt's samples
    remaining: int  # tokens that may still come
    respond: Callable[[list[str]], str | None] | None = None  # what an environment says to the turns so far
    max_turns: int = 1
    turns: int = 1
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    alternatives: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # of each token, if wanted
    forced: list[int] = field(default_factory=list)  # the next tokens, whatever is sampled
    tool_calls: list[ToolCall] = field(default_factory=list)
    block: list[int] | None = None  # tokens since python_start; None: not in a call
    call: RunningCall | None = None  # whose answer it waits for
    ended: bool = False

    @property
    def finished(self) -> bool:
        """Whether it has ended, or has no room for a further token."""
        return self.ended or self.remaining == 0

    def extend(self, tokens: list[int], logprobs: list[float], policy_logprobs: list[float], alternatives=()) -> None:
        """Take the tokens of a device call, which begin with those that were to be forced. alternatives: for each the
        likeliest ids and their log-probabilities, where they were wanted."""
        forced = min(len(self.forced), len(tokens))
        del self.forced[:forced]
        self.tokens += tokens
        self.logprobs += logprobs
        self.policy_logprobs += policy_logprobs
        self.alternatives += alternatives
        self.mask += [0] * forced + [1] * (len(tokens) - forced)
        self.remaining -= len(tokens)
        self.ended = len(tokens) > forced and tokens[-1] in self.control_tokens.ends
        if self.control_tokens.block is not None:
            for token in tokens:
                self._watch_block(token)
        if self.ended and self.respond and self.turns < self.max_turns:
            self._reply()

    def _reply(self) -> None:
        """Force what the environment says to the answer, and go on, if it says something. A reply that leaves no room
        for an answer is not given."""
        tokenizer = self.control_tokens.tokenizer
        if self.tokens[-1] != self.control_tokens.end_of_turn:
            return  # bos, behind which nothing belongs to the conversation
        reply = self.respond(split_turns(tokenizer, self.tokens[:-1], self.mask))
        if reply is None:
            return
        message = {"role": "user", "content": reply}
        (_bos, *ids), _ = tokenizer.render_conversation({"messages": [message]}, max_tokens=None)
        ids.append(self.control_tokens.answer_start)
        if len(ids) < self.remaining:
            self.ended, self.block, self.forced, self.turns = False, None, ids, self.turns + 1

    def _watch_block(self, token: int) -> None:
        """Collect what stands in a call; where that closes, make it."""
        start, end = self.control_tokens.block
        if token == start:
            self.block = []
        elif token == end:
            if self.block:
                tokenizer = self.control_tokens.tokenizer
                self.call = self.control_tokens.tools.start(tokenizer.decode(self.block), tokenizer)
                self.take_answer()
            self.block = None
        elif self.block is not None:
            self.block.append(token)

    def take_answer(self) -> bool:
        """Force the result of the call that the sample waits for -> whether it can go on."""
        if self.call is None:
            return True
        answer = self.control_tokens.tools.answer_of(self.call)
        if answer is None:
            return False
        made, ids = answer
        self.call = None
        self.tool_calls.append(made)
        if made.result is not None:
            output_start, output_end = self.control_tokens.output
            self.forced = [output_start, *ids, output_end]
        return True

    def give_up_call(self) -> None:
        """Nobody waits for the sample's call any more."""
        if self.call is not None:
            self.control_tokens.tools.give_up(self.call)

    def finish(self) -> Sample:
        """What there is of it, as arrays."""
        return Sample(
            np.asarray(self.tokens, np.int32),
            np.asarray(self.mask, np.uint8),
            np.asarray(self.logprobs, np.float32),
            np.asarray(self.policy_logprobs, np.float32),
            self.ended,
            self.tool_calls,
            self.turns,
        )


def split_turns(tokenizer, tokens: Sequence[int], mask: Sequence[int]) -> list[str]:
    """The answers in a continuation that has no end token, and the replies to them: answer, reply, answer, ...

    A reply is where its special tokens were forced, as results of tools hold none."""
    reply_start, answer_start = (tokenizer.special(f"<|{role}_start|>") for role in ("user", "assistant"))
    ends = [i for i, token in enumerate(tokens) if not mask[i] and token in (reply_start, answer_start)]
    pieces = zip([0, *(i + 1 for i in ends)], [*(i - 1 for i in ends), len(tokens)])  # before each: the end of a turn
    return [tokenizer.decode(tokens[start:end]) for start, end in pieces]


def turns_of(tokenizer, sample: Sample) -> list[str]:
    """What `evaluate`, `reward` and `respond` get of a sample: its answers and the replies to them; without an
    environment its `answer_text` alone."""
    return split_turns(tokenizer, sample.tokens[: len(sample.tokens) - sample.ended], sample.mask)


def answer_text(tokenizer, sample: Sample) -> str:
    """The text with the results of calls, without the end token, as tasks judge it.

    Special tokens are written as in the vocabulary, as in nanochat."""
    return tokenizer.decode(sample.tokens[: len(sample.tokens) - sample.ended])
