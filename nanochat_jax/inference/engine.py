"""Rollouts: prompts in, samples with masks and log-probabilities out, calculator calls answered on the way.

The device runs calls of `chunk` tokens (see `decode`); between two of them the host looks at what came: it answers the
rows that closed a calculator block, takes away finished samples and gives their rows to the next ones. Nothing else
travels, and what a row computes does not depend on its neighbours.
"""

import codecs
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed.sharding import own_copy
from nanochat_jax.inference.decode import Programs, empty_table
from nanochat_jax.inference.samples import ControlTokens, Row, Sample, SamplingParams
from nanochat_jax.model.gpt import GPTConfig

PREFILL_TOKENS = 2048  # per device and call
PROMPT_STEP, OWN_STEP = 16, 32  # the least sizes of the parts that hold keys and values; finer means more programs
MIN_SHARED = 4  # rows of a group where there are more samples than slots: a long sample holds up 3 others at most
STREAM_CHUNK = 4


class Engine:
    """Generates with one model. `load` gives it parameters, as often as they change.

    attention: the prefill's backend. slots: rows that are decoded together. chunk: tokens between two visits of the
    host. context: most tokens of a prompt with its continuation; default ten times the sequence length, which is how
    far nanochat's positions go. prompt_tokens: length of the longest prompt to expect, so that longer ones do not
    compile everything anew.
    `stats` tells about the last `generate`: seconds, host_seconds (of these, with no device at work), decode_steps,
    generated_tokens, compiles (of this engine, so far).
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
        tools: bool = True,
        context: int | None = None,
        prompt_tokens: int = 1,
    ):
        for name, value in {"slots": slots, "chunk": chunk, "context": context, "prompt_tokens": prompt_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"the engine's {name} must be at least 1, got {value}")
        self.config, self.tokenizer, self.mesh, self.slots = model_config, tokenizer, mesh, slots
        self.context = 10 * model_config.sequence_len if context is None else context
        self.control_tokens = ControlTokens(tokenizer, tools)
        how = {
            "dtype": dtype,
            "attention": attention,
            "ends": sorted(self.control_tokens.ends),
            "block": self.control_tokens.block,
        }
        self._batch, self._stream = (
            Programs(model_config, mesh, chunk=n, **how) for n in (chunk, min(chunk, STREAM_CHUNK))
        )
        self._params = None
        self._prompt_size = collections.defaultdict(lambda: padded_size(prompt_tokens - 1, PROMPT_STEP))
        self.stats = {}

    @property
    def compiles(self) -> int:
        """Programs that were compiled so far."""
        return self._batch.compiles + self._stream.compiles

    @property
    def peak_memory(self) -> int:
        """Bytes that the largest program so far holds on a device: inputs, results and temporaries."""
        return max(self._batch.peak_memory, self._stream.peak_memory)

    def load(self, params) -> None:
        """Take these parameters (a tree as GPT's, sharded in any way) for all calls until the next load."""
        self._params = self._batch.place(params)

    @contextlib.contextmanager
    def holding(self, params, mesh: Mesh):
        """While it is entered, the parameters, which are on `mesh`, are loaded, and the engine's mesh is in force. With
        several processes that is one of `own_devices`, and all processes must enter together."""
        with jax.set_mesh(self.mesh):
            self.load(own_copy(params, mesh))
            try:
                yield
            finally:
                self.load(None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples: int = 1,
        seed: int = 0,
        step: int = 0,
        examples: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Sample]]:
        """`samples` continuations of each prompt (token ids, at least one) -> [prompt][sample].

        A sample's draws depend on (seed, step, examples[p], number of the sample, position) and on nothing else;
        examples default to 0, 1, ... progress(samples done, samples in all) is called as they end. ValueError: a
        prompt that is empty, or too long to be continued.
        """
        began = time.perf_counter()
        examples = range(len(prompts)) if examples is None else examples
        if len(examples) != len(prompts) or samples < 1:
            raise ValueError(f"there must be an example number for each of {len(prompts)} prompts, and samples >= 1")
        run = _Run(self, self._batch, prompts, examples, samples, sampling, (seed, step))
        results = [[None] * samples for _ in prompts]
        done = 0
        while rows := run.advance():
            for row in rows:
                if row.finished:
                    results[row.prompt][row.sample] = row.result()
                    done += 1
            if progress:
                progress(done, len(prompts) * samples)
        seconds = time.perf_counter() - began
        self.stats = {
            "seconds": seconds,
            "host_seconds": seconds - run.device_seconds,
            "decode_steps": run.steps,
            "generated_tokens": sum(len(sample.tokens) for row in results for sample in row),
            "compiles": self.compiles,
        }
        return results

    def stream(self, prompt: Sequence[int], sampling: SamplingParams, *, seed: int = 0) -> Iterator[tuple[int, int]]:
        """One continuation as it comes, as (token, mask); the same as sample 0 of `generate`."""
        run = _Run(self, self._stream, [prompt], [0], 1, sampling, (seed, 0))
        shown = 0
        while rows := run.advance():
            for row in rows:
                yield from zip(row.tokens[shown:], row.mask[shown:])
                shown = len(row.tokens)


def text_pieces(tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens as they come, in whole UTF-8 characters; bytes that are none become U+FFFD, as in `decode`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


class _Run:
    """The slots of one call of `generate` or `stream`: who sits where, and what the device is told about it."""

    def __init__(self, engine, programs, prompts, examples, samples, sampling, seed_and_step):
        if engine._params is None:
            raise RuntimeError("the engine has no parameters: call load() first")
        self.prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        for number, prompt in enumerate(self.prompts):
            if not 0 < len(prompt) < engine.context:
                raise ValueError(
                    f"a prompt must have between 1 and {engine.context - 1} tokens, so that one more fits into the "
                    f"context of {engine.context}; prompt {number} has {len(prompt)}"
                )
            if prompt.min() < 0 or prompt.max() >= engine.config.vocab_size:
                raise ValueError(f"prompt {number} has ids outside of 0..{engine.config.vocab_size - 1}")
        self.engine, self.programs, self.sampling, self.samples = engine, programs, sampling, samples
        self.settings = {
            "temperature": np.float32(sampling.temperature),
            "top_k": np.int32(min(sampling.top_k, engine.config.vocab_size)),
            "seed": np.uint32(seed_and_step[0] % 2**32),
            "step": np.uint32(seed_and_step[1] % 2**32),
        }
        self.examples = [np.uint32(number % 2**32) for number in examples]
        self.steps, self.device_seconds = 0, 0.0

        devices = engine.mesh.size
        self.shared, groups = arrange_slots(len(prompts), samples, engine.slots)
        self.groups = devices * padded_size(-(-groups // devices))
        R, C = self.groups * self.shared, programs.chunk
        self.working_on = [-1] * self.groups  # a group's prompt
        self.given = [0] * len(prompts)  # samples of a prompt that have a row
        self.rows: list[Row | None] = [None] * R
        self.table = empty_table(R, C)
        longest = max((len(prompt) - 1 for prompt in self.prompts), default=0)
        shape = programs, self.groups, self.shared
        size = engine._prompt_size[shape] = max(padded_size(longest, PROMPT_STEP), engine._prompt_size[shape])
        self.prompt_parts = programs.empty_prompts(self.groups, size)
        self._forget()

    def _forget(self):
        self.own, self.size = self.programs.empty_own(len(self.rows)), 0

    def advance(self) -> list[Row]:
        """One call of the device -> the rows that it was for; an empty list when all samples are done."""
        self._fill()
        active = [(r, row) for r, row in enumerate(self.rows) if row]
        if not active:
            return []
        for r, row in active:
            queue = row.queue[: self.programs.chunk]
            self.table["forced"][r, : len(queue)] = queue
            self.table["forced_count"][r] = len(queue)
            self.table["block"][r] = -1 if row.block is None else len(row.block)
        began = time.perf_counter()
        params, table = self.engine._params, self.table
        self.settings["refill"] = np.bool(sum(self.given) < len(self.prompts) * self.samples)
        out, fresh = self.programs.decode(params, self.prompt_parts, self.own, table, self.settings)
        out = jax.device_get(out)
        self.device_seconds += time.perf_counter() - began
        self.steps += int(out["count"].max())

        filled = table["filled"].copy()
        for r, row in active:
            n = int(out["count"][r])
            tokens = out["tokens"][r, :n].tolist()
            row.extend(tokens, *(out[name][r, :n].tolist() for name in ("logprobs", "policy_logprobs")))
            table["previous"][r] = tokens[-2] if n > 1 else table["token"][r]
            table["token"][r] = tokens[-1]
            table["filled"][r] += n
            table["room"][r] = 0 if row.finished else row.room
            if row.finished:
                self.rows[r] = None
        going_on = [int(filled[r]) for r, row in active if not row.finished]
        if going_on:
            self.size = max(self.size, padded_size(max(going_on) + self.programs.chunk, OWN_STEP))
            self.own = self.programs.append(self.own, fresh, filled, self.size)
        else:
            self._forget()
        return [row for _, row in active]

    def _fill(self) -> None:
        """Give free rows the next samples of their group's prompt, and groups without work the next prompt."""
        admitted = []
        for group in range(self.groups):
            seats = range(group * self.shared, (group + 1) * self.shared)
            free = [r for r in seats if not self.rows[r]]
            prompt = self.working_on[group]
            if len(free) == self.shared and (prompt < 0 or self.given[prompt] == self.samples):
                prompt = max(range(len(self.prompts)), key=lambda p: self.samples - self.given[p], default=-1)
                if prompt < 0 or self.given[prompt] == self.samples:
                    continue
                self.working_on[group] = prompt
                admitted.append((group, prompt))
            for r, sample in zip(free, range(self.given[prompt], self.samples)):
                self._seat(r, prompt, sample)
        self._prefill([(group, prompt) for group, prompt in admitted if len(self.prompts[prompt]) > 1])

    def _seat(self, r: int, prompt: int, sample: int) -> None:
        self.given[prompt] += 1
        ids = self.prompts[prompt]
        room = min(self.sampling.max_new_tokens, self.engine.context - len(ids))
        self.rows[r] = Row(self.engine.control_tokens, prompt, sample, room)
        values = {
            "token": ids[-1],
            "previous": ids[-2] if len(ids) > 1 else 0,
            "prompt": len(ids) - 1,
            "filled": 0,
            "room": room,
            "example": self.examples[prompt],
            "sample": sample,
        }
        for name, value in values.items():
            self.table[name][r] = value

    def _prefill(self, admitted: list[tuple[int, int]]) -> None:
        """Compute the prompt parts of (group, prompt) pairs, each on its group's device, long prompts together."""
        devices = self.engine.mesh.size
        local = self.groups // devices
        waiting = [[] for _ in range(devices)]
        for group, prompt in sorted(admitted, key=lambda pair: -len(self.prompts[pair[1]])):
            waiting[group // local].append((group % local, prompt))
        while any(waiting):
            T = padded_size(max(len(self.prompts[queue[0][1]]) - 1 for queue in waiting if queue), PROMPT_STEP)
            most = min(max(map(len, waiting)), max(1, PREFILL_TOKENS // T))
            count = min(local, 4 ** -(-(most - 1).bit_length() // 2))  # 1, 4, 16, ...: few programs for each T
            ids = np.zeros((devices, count, T), np.int32)
            lengths = np.zeros((devices, count), np.int32)
            groups = np.full((devices, count), local, np.int32)
            for device, queue in enumerate(waiting):
                for i, (group, prompt) in enumerate(queue[:count]):
                    known = self.prompts[prompt][:-1]
                    ids[device, i, : len(known)], lengths[device, i], groups[device, i] = known, len(known), group
                del queue[:count]
            batch = {"ids": ids.reshape(-1, T), "lengths": lengths.ravel(), "groups": groups.ravel()}
            self.prompt_parts = self.programs.admit(self.engine._params, self.prompt_parts, batch)


def arrange_slots(prompts: int, samples: int, slots: int) -> tuple[int, int]:
    """(rows in a group, groups): all samples at once where they fit; else small groups, so that rows are soon free."""
    if prompts * samples <= slots:
        return samples, max(prompts, 1)
    shared = min(samples, max(MIN_SHARED, slots // prompts), slots)
    return shared, min(prompts, max(1, slots // shared))


def padded_size(n: int, least: int = 1) -> int:
    """The smallest of least * (1, 2, 3, 4, 6, 8, 12, ...) that is at least n, 0 for 0: few sizes, few programs."""
    steps = -(-n // least)
    power = 1 << max(steps - 1, 0).bit_length()
    return least * (power * 3 // 4 if power >= 4 and power * 3 // 4 >= steps else power) if n else 0
