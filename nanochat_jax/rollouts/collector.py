"""A step of RL in the loop's terms: its batch is made of what the model answers and what that is worth."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.data.rows import Batch
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import row_part
from nanochat_jax.distributed.sharding import batch_sharding, replicated, to_global
from nanochat_jax.distributed.signals import Interrupted, Signals
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import Sample, SamplingParams, answer_text
from nanochat_jax.rollouts.batch_shape import Shape
from nanochat_jax.rollouts.exchange import from_bytes, to_bytes
from nanochat_jax.rollouts.log import RolloutLog
from nanochat_jax.rollouts.objective import Objective, advantages
from nanochat_jax.rollouts.pack import nanochat_rows, packed_rows
from nanochat_jax.rollouts.prompts import PromptStream
from nanochat_jax.rollouts.statistics import step_statistics
from nanochat_jax.train.metrics import Reporter, SmoothedLoss
from nanochat_jax.train.step import TrainState

RESAMPLE_ROUNDS = 4  # draws of problems for one step, at most
FIRST_STEPS, LITTLE_SIGNAL = 3, 0.2  # below this share of groups with a signal in the first steps, a warning


@dataclasses.dataclass(frozen=True)
class Group:
    """A problem, the answers to it, and what they are worth."""

    example: int
    prompt: np.ndarray
    samples: list[Sample]
    rewards: np.ndarray  # [G]
    advantages: np.ndarray  # float32 [G]


@dataclasses.dataclass
class RolloutCollector:
    """The loop's next_batch, train_step and report. What it remembers from step to step goes into the checkpoint."""

    cfg: Any
    exercises: PromptStream
    tokenizer: Any
    engine: Engine
    sampling: SamplingParams
    objective: Objective
    shape: Shape
    mesh: Mesh
    update: Any  # make_train_step(..., logprobs=True)
    score: Any  # batch -> log-probabilities [A,B,T] under the reference; None without a penalty
    log: RolloutLog
    reporter: Reporter
    signals: Signals
    total: int
    position: int  # of the next problem
    without_signal: int  # steps so far that had nothing to learn from
    smoothed: SmoothedLoss  # of the reward
    first_steps: list = dataclasses.field(default_factory=list)  # (share of groups with a signal, pass rate) of each

    def next_batch(self, state: TrainState):
        """Rollouts of the model as it is -> the global batch, or None where no answer is better than another.

        Interrupted: a signal has come; nothing is recorded then."""
        cfg, step, position = self.cfg, int(state.step), self.position
        groups, costs = [], []
        began = time.perf_counter()
        with self.engine.holding(state.params, self.mesh):  # its copy of the weights makes room for the update
            for _ in range(RESAMPLE_ROUNDS if cfg.resample else 1):
                found, cost = self._together(range(position, position + cfg.examples_per_step), step)
                groups += found
                costs.append(cost)
                position += cfg.examples_per_step
                if sum(group.advantages.any() for group in groups) >= cfg.examples_per_step:
                    break
        tokens, reward_seconds = np.sum(costs, 0)
        rollout_seconds = time.perf_counter() - began - reward_seconds
        self.position = position
        rewards, values = (np.stack([getattr(group, name) for group in groups]) for name in ("rewards", "advantages"))
        self.found = step_statistics([group.samples for group in groups], rewards, values) | {
            "groups": len(groups),
            "rollout_seconds": rollout_seconds,
            "rollout_tokens_per_second": tokens / rollout_seconds,
            "reward_seconds": reward_seconds,
            "reward_tokens_per_second": tokens / reward_seconds,
            "compiles": self.engine.compiles,
        }
        for g in groups[: cfg.log_rollouts]:
            self.log.write(step + 1, g.example, g.prompt, g.samples, g.rewards, g.advantages, self.tokenizer.decode)
        self.clock = time.perf_counter()
        groups.sort(key=lambda group: not group.advantages.any())  # where there are too many, those with a signal stay
        return self._batch(groups[: cfg.examples_per_step])

    def _together(self, positions: range, step: int) -> tuple[list[Group], tuple[float, float]]:
        """The groups of these positions, each process drawing and judging its part of them, in the order of positions;
        and (tokens of all, seconds of the slowest for rewards)."""
        try:
            answered = self._answers(processes.mine(positions), step)
            answered_at = time.perf_counter()
            rewards = [self._rewards(example, samples) for example, _, samples in answered]
            seconds = time.perf_counter() - answered_at
        except Interrupted:
            processes.gather("the step's answers", None)  # the others give up too
            raise
        tokens = sum(len(sample.tokens) for _, _, samples in answered for sample in samples)
        drawn = [(samples, worth) for (_, _, samples), worth in zip(answered, rewards)]
        costs = [(tokens, seconds)]
        if processes.count() > 1:
            parts = processes.gather("the step's answers", to_bytes(drawn, costs[0]))
            if parts is None:
                raise Interrupted
            drawn, costs = [None] * len(positions), []
            for i, part in enumerate(parts):
                drawn[i :: len(parts)], cost = from_bytes(part)
                costs.append(cost)
        groups = []
        for position, (samples, worth) in zip(positions, drawn, strict=True):
            example, prompt = self.exercises[position]
            groups.append(Group(example, prompt, samples, worth, advantages(worth[None], self.cfg.advantage)[0]))
        tokens, seconds = zip(*costs)
        return groups, (sum(tokens), max(seconds))

    def _answers(self, positions: Sequence[int], step: int) -> list[tuple[int, np.ndarray, list[Sample]]]:
        """(problem, prompt, samples) for each position. The position is what the draws depend on, so that a problem
        that comes twice is not answered twice alike."""
        drawn = [self.exercises[position] for position in positions]

        def progress(done, total):
            self.signals.check()
            self.reporter.doing(f"answers {done:,}/{total:,}")

        how = {"samples": self.cfg.num_samples, "seed": self.cfg.seed, "step": step, "examples": positions}
        if not drawn:
            return []  # more processes than problems
        groups = self.engine.generate([prompt for _, prompt in drawn], self.sampling, **how, progress=progress)
        return [(example, prompt, samples) for (example, prompt), samples in zip(drawn, groups)]

    def _rewards(self, example: int, samples: list[Sample]) -> np.ndarray:
        self.signals.check()
        return np.array([self.exercises.reward(example, answer_text(self.tokenizer, s)) for s in samples])

    def _batch(self, groups: list[Group]):
        """The rows of a step's groups, on the devices; what the statistics need of them stays here."""
        values = np.stack([group.advantages for group in groups])
        every_group = self.cfg.objective == "nanochat" or self.objective.kl_coef > 0
        if not (every_group or values.any()):
            self.rows = None
            return None
        args = [group.prompt for group in groups], [group.samples for group in groups], values, self.shape.T
        fields = ("policy_logprobs", *(["logprobs"] if self.objective.is_cap is not None else []))
        if self.cfg.objective == "nanochat":
            end = self.tokenizer.special("<|assistant_end|>")
            self.rows = nanochat_rows(*args, pad=end, rows=self.shape.rows, fields=fields)
        else:
            sizes = {"rows": self.shape.rows, "micro_batches": self.shape.micro_batches}
            self.rows = packed_rows(*args, bos=self.tokenizer.bos, **sizes, fields=fields, every_group=every_group)
        part, parts = row_part(self.mesh)
        own = {name: np.split(leaf, parts, 1)[part] for name, leaf in self.rows.items() if name != "policy_logprobs"}
        batch = to_global(own, self.mesh)
        if self.score:
            batch["reference_logprobs"] = self.score(batch)
            whole = jax.device_put(batch["reference_logprobs"], replicated(self.mesh))
            self.rows["reference_logprobs"] = np.asarray(whole)
        return batch

    def train_step(self, state: TrainState, batch: Batch | None, *scalars):
        """All updates on a batch, as one step; without a batch the state stays as it is."""
        step = state.step + 1
        if batch is None:
            return state._replace(step=step), {"loss": 0.0, "grad_norm": 0.0, "tokens": 0.0, "ok": True}
        state, first = self.update(state, batch, *scalars)
        if self.cfg.updates_per_batch == 1:
            return state, first
        batch, done = batch | {"old_logprobs": jax.device_put(first["logprobs"], batch_sharding(self.mesh))}, [first]
        for _ in range(self.cfg.updates_per_batch - 1):
            state, metrics = self.update(state, batch, *scalars)
            done.append(metrics)
        first |= {name: np.mean([float(metrics[name]) for metrics in done]) for name in ("loss", "grad_norm")}
        first["ok"] = all(bool(metrics["ok"]) for metrics in done)
        return state._replace(step=step), first | {"last_logprobs": done[-1]["logprobs"]}

    def report(self, step: int, multiplier: float, metrics: dict, seconds: float) -> tuple[dict, str]:
        """What `Loop.report` tells of a step."""
        update_seconds = time.perf_counter() - self.clock
        found = self.found | {
            "smoothed_reward": self.smoothed.update(self.found["reward"]),
            "update_seconds": update_seconds,
            "update_tokens_per_second": float(metrics["tokens"]) / update_seconds,
            "percent": 100 * step / self.total,
            "epoch": 1 + (self.position - 1) // self.exercises.size,
        }
        if self.rows is None:
            self.without_signal += 1
        else:
            found |= self.objective.statistics(metrics["logprobs"], self.rows)
            if "last_logprobs" in metrics:
                rows = self.rows | {"old_logprobs": metrics["logprobs"]}
                found["clipped"] = self.objective.statistics(metrics["last_logprobs"], rows)["clipped"]
        found["steps_without_signal"] = self.without_signal
        self._warn(step, found)
        update = f"dlogp {found['delta_logp_mean']:.0e}" if self.rows else "no signal, no update"
        return found, (
            f"reward {found['smoothed_reward']:.3f} | pass {found['pass_rate']:.1%} | signal "
            f"{1 - found['no_signal']:.0%} | length {found['length_mean']:.0f} | {update} | lrm {multiplier:.3f} | "
            f"rollout {found['rollout_tokens_per_second']:,.0f} tok/s {found['rollout_seconds']:.1f} s, update "
            f"{update_seconds:.1f} s | {found['percent']:.1f}%"
        )

    def _warn(self, step: int, found: dict) -> None:
        """Where a run has little to learn from, once: not again when it is resumed."""
        if step <= FIRST_STEPS:
            self.first_steps.append((1 - found["no_signal"], found["pass_rate"]))
        if step != FIRST_STEPS:
            return
        share, passed = np.mean(self.first_steps, 0)
        if share < LITTLE_SIGNAL:
            self.reporter.say(
                f"WARNING: of the first {FIRST_STEPS} steps' groups of answers {share:.0%} differ in reward (pass rate "
                f"{passed:.1%}), too little to learn from: train SFT longer, or choose "
                f"{'harder' if passed > 0.5 else 'easier'} problems"
            )

    def saved(self) -> dict:
        """What the next step depends on beside the state."""
        return {
            "problems_consumed": self.position,
            "steps_without_signal": self.without_signal,
            "smoothed_reward": self.smoothed.state(),
            "rollouts_bytes": self.log.saved(),
        }
