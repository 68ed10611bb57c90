"""The host's side of generation: which sample is in which row (slot), and what the next device call must know of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nanochat_jax.inference.decode import DecodeSettings, GenerationPrograms, PrefillBatch, empty_slots
from nanochat_jax.inference.samples import ControlTokens, SampleInProgress
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.shapes import CONTINUATION_STEP, PROMPT_STEP, padded_size, prefill_prompts


@dataclass
class SlotScheduler:
    """Continues every prompt `samples` times, in groups of rows that share a prompt at a time.

    A row whose sample is finished gets the next one of its group's prompt; a group that has finished its prompt gets
    the one of which most samples are left.
    """

    programs: GenerationPrograms
    params: Any  # as `GenerationPrograms.cast_params` gives them
    control_tokens: ControlTokens
    prompts: Sequence[np.ndarray]  # int32 [length] each
    examples: Sequence[int]  # the prompts' numbers in the keys
    samples: int
    sampling: SamplingParams
    seed: int
    step: int
    context: int  # most tokens of a prompt with its continuation
    groups: int
    group_rows: int
    prompt_size: int  # tokens that the prompt cache has room for

    def __post_init__(self):
        self.settings = DecodeSettings(
            temperature=np.float32(self.sampling.temperature),
            top_k=np.int32(min(self.sampling.top_k, self.programs.config.vocab_size)),
            seed=np.uint32(self.seed % 2**32),
            step=np.uint32(self.step % 2**32),
            refill=np.bool(False),
        )
        self.decode_steps, self.device_seconds = 0, 0.0  # so far
        self.group_prompt = [-1] * self.groups  # the prompt that a group continues; -1: none so far
        self.started = [0] * len(self.prompts)  # how many of a prompt's samples have got a row
        self.rows: list[SampleInProgress | None] = [None] * (self.groups * self.group_rows)
        self.slots = empty_slots(len(self.rows), self.programs.chunk)
        self.prompt_cache = self.programs.empty(self.programs.layout.prompt(self.groups, self.prompt_size))
        self.no_continuation = self.programs.empty(self.programs.layout.continuation(len(self.rows), 0))
        self.continuation, self.continuation_size = self.no_continuation, 0  # a cache, and how many tokens it can hold

    def advance(self) -> list[SampleInProgress]:
        """One device call -> the samples that it has extended; an empty list when all samples are finished.

        FloatingPointError: logits are not finite."""
        self._fill_rows()
        active = [(r, sample) for r, sample in enumerate(self.rows) if sample]
        if not active:
            return []
        slots, chunk = self.slots, self.programs.chunk
        for r, sample in active:
            forced = sample.forced[:chunk]
            slots.forced[r, : len(forced)] = forced
            slots.forced_count[r] = len(forced)
            slots.block[r] = -1 if sample.block is None else len(sample.block)
        refill = np.bool(sum(self.started) < len(self.prompts) * self.samples)
        settings = self.settings._replace(refill=refill)
        began = time.perf_counter()
        output, fresh = self.programs.decode(self.params, self.prompt_cache, self.continuation, slots, settings)
        output = jax.device_get(output)
        self.device_seconds += time.perf_counter() - began
        self.decode_steps += int(output.count.max())

        lengths = slots.length.copy()  # before this call
        for r, sample in active:
            n = int(output.count[r])
            self._check(sample, output.policy_logprobs[r, :n])
            tokens = output.tokens[r, :n].tolist()
            sample.extend(tokens, output.logprobs[r, :n].tolist(), output.policy_logprobs[r, :n].tolist())
            slots.previous[r] = tokens[-2] if n > 1 else slots.token[r]
            slots.token[r] = tokens[-1]
            slots.length[r] += n
            slots.remaining[r] = 0 if sample.finished else sample.remaining
            if sample.finished:
                self.rows[r] = None
        unfinished = [int(lengths[r]) for r, sample in active if not sample.finished]
        if unfinished:
            needed = padded_size(max(unfinished) + chunk, CONTINUATION_STEP)
            self.continuation_size = max(self.continuation_size, needed)
            self.continuation = self.programs.append(self.continuation, fresh, lengths, self.continuation_size)
        else:
            self.continuation, self.continuation_size = self.no_continuation, 0
        return [sample for _, sample in active]

    def _check(self, sample: SampleInProgress, policy_logprobs: np.ndarray) -> None:
        """FloatingPointError where a token was drawn from logits that are not finite, as its log-probability tells."""
        finite = np.isfinite(policy_logprobs)
        if not finite.all():
            token = len(sample.tokens) + int(np.argmin(finite))
            raise FloatingPointError(
                f"the model's logits are not finite at token {token} of answer {sample.number} to prompt "
                f"{self.examples[sample.prompt]}: go back to an earlier checkpoint, and lower the learning rates if "
                "this model is in training"
            )

    def _fill_rows(self) -> None:
        new = []  # (group, prompt) of groups that begin a prompt
        for group in range(self.groups):
            first = group * self.group_rows
            free = [r for r in range(first, first + self.group_rows) if not self.rows[r]]
            prompt = self.group_prompt[group]
            if len(free) == self.group_rows and (prompt < 0 or self.started[prompt] == self.samples):
                prompt = max(range(len(self.prompts)), key=lambda p: self.samples - self.started[p], default=-1)
                if prompt < 0 or self.started[prompt] == self.samples:
                    continue
                self.group_prompt[group] = prompt
                new.append((group, prompt))
            for r, number in zip(free, range(self.started[prompt], self.samples)):
                self._start_sample(r, prompt, number)
        self._prefill([(group, prompt) for group, prompt in new if len(self.prompts[prompt]) > 1])

    def _start_sample(self, r: int, prompt: int, number: int) -> None:
        self.started[prompt] += 1
        ids, slots = self.prompts[prompt], self.slots
        remaining = min(self.sampling.max_new_tokens, self.context - len(ids))
        self.rows[r] = SampleInProgress(self.control_tokens, prompt, number, remaining)
        slots.token[r] = ids[-1]
        slots.previous[r] = ids[-2] if len(ids) > 1 else 0
        slots.prompt_length[r] = len(ids) - 1
        slots.length[r] = 0
        slots.remaining[r] = remaining
        slots.example[r] = self.examples[prompt] % 2**32
        slots.sample[r] = number

    def _prefill(self, new: list[tuple[int, int]]) -> None:
        """Fill the prompt cache for (group, prompt) pairs, each on its group's device, long prompts together."""
        devices = self.programs.mesh.size
        local_groups = self.groups // devices
        queues = [[] for _ in range(devices)]
        for group, prompt in sorted(new, key=lambda pair: -len(self.prompts[pair[1]])):
            queues[group // local_groups].append((group % local_groups, self.prompts[prompt][:-1]))
        while any(queues):
            T = padded_size(max(len(queue[0][1]) for queue in queues if queue), PROMPT_STEP)
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
