"""Rollouts: prompts in, samples with masks and log-probabilities out, tool calls answered on the way.

The device runs calls of `chunk` tokens (see `decode`); between two of them the host (see `scheduler`) takes what came,
answers the rows that have called a tool, and gives the rows of finished samples to the next ones; the last samples go
on in fewer rows (see `tail`). Nothing else travels, and what is drawn does not depend on a row's neighbours, nor on
when a tool answers; how many rows a call has may change the last bits of log-probabilities.
"""

import codecs
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed.device_memory import check_room
from nanochat_jax.distributed.sharding import own_copy
from nanochat_jax.inference.decode import GenerationPrograms
from nanochat_jax.inference.samples import ControlTokens, Sample
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.scheduler import SlotScheduler
from nanochat_jax.inference.shapes import PROMPT_STEP, arrange_slots, padded_size
from nanochat_jax.inference.tools import CALCULATOR_ALONE, Toolbox
from nanochat_jax.model.gpt import GPTConfig

MOST_ANSWERS = 1 << 24  # of one call: each is some Python objects of a hundred bytes
STREAM_CHUNK = 4  # tokens of a device call in `stream`, whose text should come soon


class GenerationStats(NamedTuple):
    """What a call of `generate` took."""

    seconds: float
    host_seconds: float  # of these, with no device at work
    decode_steps: int
    generated_tokens: int


class Engine:
    """Generates with models of one config; its programs are compiled once for all parameters.

    attention: the prefill's backend. slots: rows that are decoded together. chunk: tokens between two visits of the
    host. tools: that the model may call; None: a call is text. context: most tokens of a prompt with its continuation;
    default ten times the sequence length, which is how far nanochat's positions go. prompt_tokens: length of the
    longest prompt to expect, so that longer ones do not compile everything anew. alternatives: how many of the
    likeliest tokens may be asked for beside those drawn.
    """

    def __init__(
        self,
        model_config: GPTConfig,
        tokenizer,
        mesh: Mesh,
        *,
        dtype=jnp.float32,
        attention: str = "chunked",
        slots: int = 256,
        chunk: int = 16,
        tools: Toolbox | None = CALCULATOR_ALONE,
        context: int | None = None,
        prompt_tokens: int = 1,
        alternatives: int = 0,
    ):
        for name, value in {"slots": slots, "chunk": chunk, "context": context, "prompt_tokens": prompt_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"the engine's {name} must be at least 1, got {value}")
        self.config, self.tokenizer, self.mesh, self.slots = model_config, tokenizer, mesh, slots
        self.context = 10 * model_config.sequence_len if context is None else context
        self.control_tokens = ControlTokens(tokenizer, tools)
        ends, block = sorted(self.control_tokens.ends), self.control_tokens.block
        make = partial(GenerationPrograms, model_config, mesh, dtype=dtype, ends=ends, block=block, attention=attention)
        self.programs = make(chunk=chunk, alternatives=alternatives)
        self.stream_programs = make(chunk=min(chunk, STREAM_CHUNK))
        # (programs, groups, rows of a group) -> size of the prompt cache that they were compiled for last
        self._prompt_sizes = collections.defaultdict(lambda: padded_size(prompt_tokens - 1, PROMPT_STEP))

    @property
    def compiles(self) -> int:
        """Programs that were compiled so far."""
        return self.programs.compiles + self.stream_programs.compiles

    def cast_params(self, params):
        """The copy of the parameters that generating reads (see `GenerationPrograms.cast_params`). `generate` and
        `stream` make one at each call, unless they are given one."""
        return self.programs.cast_params(params)

    @contextlib.contextmanager
    def holding(self, params, mesh: Mesh):
        """The `cast_params` of parameters that are on `mesh`; inside, the engine's own mesh is in force. With several
        processes that is one of `own_devices`, and all processes must enter together."""
        with jax.set_mesh(self.mesh):
            yield self.cast_params(own_copy(params, mesh, self.programs.dtype))

    def generate(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples: int = 1,
        seed: int = 0,
        step: int = 0,
        examples: Sequence[int] | None = None,
        respond: Callable[[int, list[str]], str | None] | None = None,
        max_turns: int = 1,
        progress: Callable[[int, int], None] | None = None,
        report: Callable[[GenerationStats], None] | None = None,
    ) -> list[list[Sample]]:
        """`samples` continuations of each prompt (token ids, at least one) -> [prompt][sample].

        params: a tree as GPT's, sharded in any way. A sample's draws depend on (seed, step, examples[p], number of the
        sample, position) and on nothing else; examples default to 0, 1, ...

        respond(example, turns), of an environment, is asked after each answer that ends, at most max_turns - 1 times in
        a sample: turns are the answers and replies so far, and what it returns is the next reply, None where the sample
        is over. The reply and the next answer go on in the same sample, of whose tokens the limit is that of all turns
        together; a reply that would leave no room for an answer is not given. progress(samples done, samples in all) is
        called after each device call, report(what it took) at the end. ValueError: a prompt that is empty, or too long
        to be continued. FloatingPointError: logits are not finite; the prompt is named by its number in examples.
        """
        began = time.perf_counter()
        examples = range(len(prompts)) if examples is None else examples
        if len(examples) != len(prompts) or samples < 1:
            raise ValueError(f"there must be an example number for each of {len(prompts)} prompts, and samples >= 1")
        if (answers := len(prompts) * samples) > MOST_ANSWERS:
            raise ValueError(
                f"{len(prompts):,} problems with {samples:,} answers each would be {answers:,} answers, at most "
                f"{MOST_ANSWERS:,} are held at once: lower --num-samples, --eval-samples or the number of problems"
            )
        scheduler = self._schedule(
            self.programs, params, prompts, examples, samples, sampling, seed, step, respond, max_turns
        )
        results = [[None] * samples for _ in prompts]
        done = 0
        with contextlib.closing(scheduler):
            while active := scheduler.advance():
                for sample in active:
                    if sample.finished:
                        results[sample.prompt][sample.number] = sample.finish()
                        done += 1
                if progress:
                    progress(done, len(prompts) * samples)
        if report:
            seconds = time.perf_counter() - began
            tokens = sum(len(sample.tokens) for group in results for sample in group)
            report(GenerationStats(seconds, seconds - scheduler.device_seconds, scheduler.decode_steps, tokens))
        return results

    def stream(
        self, params, prompt: Sequence[int], sampling: SamplingParams, *, seed: int = 0
    ) -> Iterator[tuple[int, int]]:
        """One continuation as it comes, as (token, mask); the same as sample 0 of `generate`."""
        scheduler = self._schedule(self.stream_programs, params, [prompt], [0], 1, sampling, seed, 0)
        shown = 0
        with contextlib.closing(scheduler):
            while active := scheduler.advance():
                for sample in active:
                    yield from zip(sample.tokens[shown:], sample.mask[shown:])
                    shown = len(sample.tokens)

    def open_schedule(self, params) -> SlotScheduler:
        """A scheduler for prompts that come at any time, each in a row of its own; `check_prompt` them first.

        ValueError: the device has no room for as many slots with a full context."""
        rows = self.mesh.size * -(-self.slots // self.mesh.size)
        most = padded_size(self.context + self.programs.chunk)
        cache = self.programs.cache_bytes(rows, 1, most, most)
        what = f"the keys and values of {rows:,} answers with a full context"
        check_room(what, cache // self.mesh.size, self.mesh.local_devices[0], f"--max-concurrent={self.slots}")
        return SlotScheduler(
            self.programs,
            self.cast_params(params),
            self.control_tokens,
            step=0,
            context=self.context,
            groups=rows,
            group_rows=1,
            prompt_size=None,
        )

    def check_prompt(self, prompt: np.ndarray, name: str = "the prompt") -> None:
        """ValueError where a prompt, int32 [length], cannot be continued."""
        if not 0 < len(prompt) < self.context:
            raise ValueError(
                f"a prompt must have between 1 and {self.context - 1} tokens, so that one more fits into the "
                f"context of {self.context}; {name} has {len(prompt)}"
            )
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise ValueError(f"{name} has ids outside of 0..{self.config.vocab_size - 1}")

    def _schedule(
        self, programs, params, prompts, examples, samples, sampling, seed, step, respond=None, max_turns=1
    ) -> SlotScheduler:
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        for number, prompt in enumerate(prompts):
            self.check_prompt(prompt, f"prompt {number}")
        devices = self.mesh.size
        group_rows, groups = arrange_slots(len(prompts), samples, self.slots, devices)
        shape = programs, groups, group_rows
        longest = max((len(prompt) - 1 for prompt in prompts), default=0)
        self._prompt_sizes[shape] = max(padded_size(longest, PROMPT_STEP), self._prompt_sizes[shape])
        cache = programs.cache_bytes(groups, group_rows, self._prompt_sizes[shape], programs.chunk)
        what = f"the keys and values of {groups * group_rows:,} answers, at their first tokens already,"
        check_room(what, cache // devices, self.mesh.local_devices[0], f"--slots={self.slots}")
        scheduler = SlotScheduler(
            programs,
            self.cast_params(params),
            self.control_tokens,
            step,
            context=self.context,
            groups=groups,
            group_rows=group_rows,
            prompt_size=self._prompt_sizes[shape],
        )
        for prompt, example in zip(prompts, examples):
            scheduler.add(
                prompt,
                sampling,
                seed=seed,
                example=example,
                samples=samples,
                respond=respond and partial(respond, example),
                max_turns=max_turns,
            )
        return scheduler


def text_pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens as they come, in whole UTF-8 characters; bytes that are none become U+FFFD, as in `decode`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece
