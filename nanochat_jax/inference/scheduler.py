"""The host's side of generation: which sample is in which row (slot), and what the next device call must know of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference.decode import DecodeSettings, GenerationPrograms, PrefillBatch, SlotTable, empty_slots
from nanochat_jax.inference.kv_cache import Cache
from nanochat_jax.inference.samples import ControlTokens, SampleInProgress
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.shapes import (
    CONTINUATION_STEP,
    PROMPT_STEP,
    TAIL_STEP,
    coarse_size,
    padded_size,
    prefill_prompts,
)
from nanochat_jax.inference.tail import WORTH, fewest_rows, tail_shapes

MOMENT = 0.05  # seconds without a look at anything else


@dataclass(eq=False)
class PromptInProgress:
    """A prompt of which samples are still to be begun, or are in rows."""

    number: int  # as `SlotScheduler.add` has given it
    ids: np.ndarray  # int32 [length]
    sampling: SamplingParams
    samples: int
    seed: int
    example: int  # its number in the keys
    alternatives: bool  # whether the likeliest tokens are wanted too
    respond: Callable[[list[str]], str | None] | None  # of an environment: the reply to the turns so far
    max_turns: int
    started: int = 0  # samples that have got a row

    @property
    def left(self) -> int:
        """Samples that have no row yet."""
        return self.samples - self.started


@dataclass
class SlotScheduler:
    """Continues prompts, which may come at any time, in groups of rows that share a prompt at a time.

    A row whose sample is finished gets the next one of its group's prompt; a group that has finished its prompt gets
    the one of which most samples are left, and of these the one that came first.
    """

    programs: GenerationPrograms
    params: Any  # as `GenerationPrograms.cast_params` gives them
    control_tokens: ControlTokens
    step: int  # of the keys
    context: int  # most tokens of a prompt with its continuation
    groups: int
    group_rows: int
    prompt_size: int | None  # tokens that the prompt cache has room for; None: caches fit what there is, in few sizes
    waiting: list[PromptInProgress] = field(init=False, default_factory=list)  # that have samples left
    decode_steps: int = field(init=False, default=0)  # so far
    device_seconds: float = field(init=False, default=0.0)  # so far

    def __post_init__(self):
        self.follows = self.prompt_size is None
        least = coarse_size(0, self._most) if self.follows else 0
        size = least if self.follows else self.prompt_size
        self.added = 0  # prompts so far
        self.group_prompt: list[PromptInProgress | None] = [None] * self.groups
        self.rows: list[SampleInProgress | None] = [None] * (self.groups * self.group_rows)
        self.slots = empty_slots(len(self.rows), self.programs.chunk)
        # That rows may still move to. They stay where threads answer calls: when is chance, and the last bits of what a
        # row computes may depend on how many rows there are.
        tools, local_groups = self.control_tokens.tools, self.groups // self.programs.mesh.size
        rows_stay = self.follows or (tools and tools.threaded)
        self.tail_shapes = [] if rows_stay else tail_shapes(local_groups, self.group_rows)
        self.prompt_cache = self.programs.empty(self.programs.layout.prompt(self.groups, size))
        self.continuation_size = self.least_continuation = least  # tokens that it can hold
        self.continuation = self.programs.empty(self.programs.layout.continuation(len(self.rows), least))

    @property
    def _most(self) -> int:
        """Tokens that a cache needs room for at the most."""
        return padded_size(self.context + self.programs.chunk)

    @property
    def running(self) -> int:
        """Samples that have a row."""
        return sum(sample is not None for sample in self.rows)

    def add(
        self,
        ids: np.ndarray,
        sampling: SamplingParams,
        *,
        seed: int,
        example: int = 0,
        samples: int = 1,
        alternatives: bool = False,
        respond: Callable[[list[str]], str | None] | None = None,
        max_turns: int = 1,
    ) -> int:
        """Continue a prompt, int32 [length], `samples` times, as soon as rows are free -> its number: 0, 1, 2, ...

        respond, max_turns: as of `SampleInProgress`. A sample's draws depend on (seed, the scheduler's step, example,
        number of the sample, position) only."""
        self.added += 1
        prompt = PromptInProgress(
            self.added - 1, ids, sampling, samples, seed, example, alternatives, respond, max_turns
        )
        self.waiting.append(prompt)
        return prompt.number

    def cancel(self, number: int) -> None:
        """Forget a prompt and its samples, also where they are finished already; their rows are free."""
        self.waiting = [prompt for prompt in self.waiting if prompt.number != number]
        for prompt in self.group_prompt:
            if prompt and prompt.number == number:
                prompt.samples = prompt.started
        for r, sample in enumerate(self.rows):
            if sample and sample.prompt == number:
                sample.give_up_call()
                self.rows[r], self.slots.remaining[r] = None, 0

    def close(self) -> None:
        """Wait for no tool any more; for a scheduler that is left before its samples are finished."""
        for sample in filter(None, self.rows):
            sample.give_up_call()

    def advance(self) -> list[SampleInProgress]:
        """One device call -> the samples that it has extended; an empty list when all samples are finished.

        Samples that wait for a tool stay in their rows, which are idle meanwhile. Where all wait, there is no device
        call: after MOMENT seconds at most they are returned as they are. FloatingPointError: logits are not finite."""
        self._fill_rows()
        rows = [(r, sample) for r, sample in enumerate(self.rows) if sample]
        if not rows:
            return []
        active = self._not_waiting(rows)
        if not active:
            return [sample for _, sample in rows]
        slots, chunk = self.slots, self.programs.chunk
        for r, sample in active:
            forced = sample.forced[:chunk]
            slots.forced[r, : len(forced)] = forced
            slots.forced_count[r] = len(forced)
            slots.block[r] = -1 if sample.block is None else len(sample.block)
        refill = bool(self.waiting) or any(sample.respond for _, sample in active)
        settings = DecodeSettings(np.uint32(self.step % 2**32), refill=np.bool(refill))
        began = time.perf_counter()
        output, fresh = self.programs.decode(self.params, self.prompt_cache, self.continuation, slots, settings)
        output = jax.device_get(output)
        self.device_seconds += time.perf_counter() - began
        self.decode_steps += int(output.count.max())

        lengths = slots.length.copy()  # before this call
        for r, sample in active:
            n = int(output.count[r])
            self._check(r, sample, output.policy_logprobs[r, :n])
            tokens = output.tokens[r, :n].tolist()
            alternatives = zip(output.likeliest[r, :n], output.likeliest_logprobs[r, :n])
            sample.extend(
                tokens,
                output.logprobs[r, :n].tolist(),
                output.policy_logprobs[r, :n].tolist(),
                alternatives if slots.alternatives[r] else (),
            )
            slots.previous[r] = tokens[-2] if n > 1 else slots.token[r]
            slots.token[r] = tokens[-1]
            slots.length[r] += n
            slots.remaining[r] = 0 if sample.finished or sample.call else sample.remaining
            if sample.finished:
                sample.give_up_call()
                self.rows[r] = None
        unfinished = [int(lengths[r]) for r, sample in rows if not sample.finished]
        if unfinished:
            fresh, lengths = self._move_together(fresh, lengths)
            self.continuation_size = self._continuation_size(max(unfinished) + chunk)
            self.continuation = self.programs.append(self.continuation, fresh, lengths, self.continuation_size)
        else:
            self.continuation_size = self.least_continuation
            layout = self.programs.layout.continuation(len(self.rows), self.least_continuation)
            self.continuation = self.programs.resize(self.continuation, layout)
        return [sample for _, sample in active]

    def _move_together(self, fresh: Cache, lengths: np.ndarray) -> tuple[Cache, np.ndarray]:
        """Go on with the fewest rows that hold the samples, where no prompt waits for one and there is enough to do.
        fresh, lengths: of all rows, the call's cache and the tokens before it -> those of the rows that are left."""
        prompts = [sample.prompt if sample else -1 for sample in self.rows]
        devices, remaining = self.programs.mesh.size, max(sample.remaining for sample in self.rows if sample)
        worth = not self.waiting and remaining > WORTH * self.programs.chunk
        table = fewest_rows(prompts, devices, self.tail_shapes) if worth else None
        if table is None:
            return fresh, lengths
        local_rows, local_groups = len(self.rows) // devices, self.groups // devices
        first = local_rows * np.arange(devices)[:, None, None]
        of_group = np.where(table[..., :1] < 0, first, table[..., :1])  # an idle row copies any of its device
        rows = np.where(table < 0, of_group, table).ravel()
        groups = of_group.ravel() // self.group_rows
        self.prompt_cache, self.continuation, fresh = self.programs.take(
            self.prompt_cache,
            self.continuation,
            fresh,
            (groups % local_groups).astype(np.int32),
            (rows % local_rows).astype(np.int32),
        )
        self.rows = [self.rows[r] if r >= 0 else None for r in table.ravel()]
        self.group_prompt = [self.group_prompt[group] for group in groups]
        self.slots = SlotTable(*(column[rows] for column in self.slots))
        self.slots.remaining[table.ravel() < 0] = 0
        _, per_device, self.group_rows = table.shape
        self.groups = devices * per_device
        self.tail_shapes = [shape for shape in self.tail_shapes if shape[0] * shape[1] < per_device * self.group_rows]
        most = max(self.slots.length[r] + sample.remaining for r, sample in enumerate(self.rows) if sample)
        self.continuation_size = padded_size(int(most) + self.programs.chunk, TAIL_STEP)  # of one size to the end
        return fresh, lengths[rows]

    def _not_waiting(self, rows: list[tuple[int, SampleInProgress]]) -> list[tuple[int, SampleInProgress]]:
        """The rows that can go on; where there is none, whoever gets an answer from its tool within a moment."""
        waiting = [(r, sample) for r, sample in rows if sample.call]
        if not waiting:
            return rows
        if len(waiting) == len(rows):
            self.control_tokens.tools.wait([sample.call for _, sample in waiting], MOMENT)
        for r, sample in waiting:
            if sample.take_answer():
                self.slots.remaining[r] = sample.remaining
        return [(r, sample) for r, sample in rows if not sample.call]

    def _continuation_size(self, needed: int) -> int:
        if self.follows:
            return coarse_size(needed, self._most)
        return max(self.continuation_size, padded_size(needed, CONTINUATION_STEP))

    def _check(self, r: int, sample: SampleInProgress, policy_logprobs: np.ndarray) -> None:
        """FloatingPointError where a token was drawn from logits that are not finite, as its log-probability tells."""
        finite = np.isfinite(policy_logprobs)
        if not finite.all():
            token = len(sample.tokens) + int(np.argmin(finite))
            raise FloatingPointError(
                f"the model's logits are not finite at token {token} of answer {sample.number} to prompt "
                f"{self.group_prompt[r // self.group_rows].example}: go back to an earlier checkpoint, and lower the "
                "learning rates if this model is in training"
            )

    def _fill_rows(self) -> None:
        new = []  # (group, prompt) of groups that begin a prompt
        for group in range(self.groups):
            first = group * self.group_rows
            free = [r for r in range(first, first + self.group_rows) if not self.rows[r]]
            prompt = self.group_prompt[group]
            if len(free) == self.group_rows and not (prompt and prompt.left):
                prompt = max(self.waiting, key=lambda p: p.left, default=None)
                self.group_prompt[group] = prompt = prompt if prompt and prompt.left else None
                if prompt is None:
                    continue
                new.append((group, prompt))
            for r, number in zip(free, range(prompt.started, prompt.samples)):
                self._start_sample(r, prompt, number)
        self.waiting = [prompt for prompt in self.waiting if prompt.left]
        if self.follows:
            longest = max((len(prompt.ids) - 1 for prompt in self.group_prompt if prompt), default=0)
            layout = self.programs.layout.prompt(self.groups, coarse_size(longest, self._most))
            self.prompt_cache = self.programs.resize(self.prompt_cache, layout)
        self._prefill([(group, prompt) for group, prompt in new if len(prompt.ids) > 1])

    def _start_sample(self, r: int, prompt: PromptInProgress, number: int) -> None:
        prompt.started += 1
        ids, sampling, slots = prompt.ids, prompt.sampling, self.slots
        remaining = min(sampling.max_new_tokens, self.context - len(ids))
        self.rows[r] = SampleInProgress(
            self.control_tokens, prompt.number, number, remaining, prompt.respond, prompt.max_turns
        )
        slots.token[r] = ids[-1]
        slots.previous[r] = ids[-2] if len(ids) > 1 else 0
        slots.prompt_length[r] = len(ids) - 1
        slots.length[r] = 0
        slots.remaining[r] = remaining
        slots.seed[r] = prompt.seed % 2**32
        slots.example[r] = prompt.example % 2**32
        slots.sample[r] = number
        slots.temperature[r] = sampling.temperature
        slots.top_k[r] = min(sampling.top_k, self.programs.config.vocab_size)
        slots.top_p[r] = sampling.top_p
        slots.alternatives[r] = prompt.alternatives

    def _prefill(self, new: list[tuple[int, PromptInProgress]]) -> None:
        """Fill the prompt cache for (group, prompt) pairs, each on its group's device, long prompts together."""
        devices = self.programs.mesh.size
        local_groups = self.groups // devices
        queues = [[] for _ in range(devices)]
        for group, prompt in sorted(new, key=lambda pair: -len(pair[1].ids)):
            queues[group // local_groups].append((group % local_groups, prompt.ids[:-1]))
        while any(queues):
            longest = max(len(queue[0][1]) for queue in queues if queue)
            T = coarse_size(longest, self._most, 2) if self.follows else padded_size(longest, PROMPT_STEP)
            count = prefill_prompts(max(map(len, queues)), T, local_groups)
            ids = np.zeros((devices, count, T), np.int32)
            lengths = np.zeros((devices, count), np.int32)
            groups = np.full((devices, count), local_groups, np.int32)
            for device, queue in enumerate(queues):
                for i, (group, known) in enumerate(queue[:count]):
                    ids[device, i, : len(known)], lengths[device, i], groups[device, i] = known, len(known), group
                del queue[:count]
            batch = PrefillBatch(ids.reshape(-1, T), lengths.ravel(), groups.ravel())
            self.prompt_cache = self.programs.prefill(self.params, self.prompt_cache, batch)
