"""The update of a step of RL: rows of answers onto the devices, one or several train steps on them, and statistics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.distributed.mesh import row_part, row_shards
from nanochat_jax.distributed.sharding import batch_sharding, replicated, to_global
from nanochat_jax.rollouts.collector import Group
from nanochat_jax.rollouts.objective import Objective
from nanochat_jax.rollouts.pack import most_rows, nanochat_rows, packed_rows
from nanochat_jax.train.plan import BatchShape, Plan, TokenLoss
from nanochat_jax.train.step import StepMetrics, TrainState

NOTHING_DONE = StepMetrics(loss=0.0, micro_losses=None, grad_norm=0.0, tokens=0.0, ok=1.0)


def token_loss_of(objective: Objective, kind: str, updated: bool = False) -> TokenLoss:
    """The loss of --objective `kind`, "global" or "nanochat". updated: the policy has been updated on these answers
    before, so the log-probabilities of the policy before that come with the batch."""
    inputs = (*objective.inputs, "old_logprobs") if updated else objective.inputs
    return TokenLoss(objective.token_loss, inputs, kind == "nanochat", objective.limits)


def rl_batch_shape(cfg: Any, mesh: Mesh, longest: int, sequence_len: int) -> BatchShape:
    """The shape of every step's batch, from the settings alone, so that the train step compiles once.

    longest: tokens of the longest prompt with an answer. ValueError: the sizes do not fit together."""
    T = cfg.max_seq_len or max(sequence_len, longest - 1)
    samples, shards = cfg.examples_per_step * cfg.num_samples, row_shards(mesh)
    if cfg.objective == "nanochat":
        if cfg.num_samples % cfg.device_batch_size or cfg.device_batch_size % shards:
            raise ValueError(
                f"--objective nanochat: a pass has --device-batch-size={cfg.device_batch_size} answers to one problem, "
                f"which must divide --num-samples={cfg.num_samples} and be a multiple of the {shards} devices "
                "that rows are split over"
            )
        return BatchShape(samples // cfg.device_batch_size, cfg.device_batch_size, longest - 1)
    most = most_rows(samples, longest, T)
    rows = shards * min(cfg.device_batch_size, -(-most // shards))
    return BatchShape(-(-most // rows), rows, T)


def rows_of(
    groups: Sequence[Group], plan: Plan, objective: Objective, kind: str, tokenizer
) -> dict[str, np.ndarray] | None:
    """The rows [A,B,T] of a step's groups, with `objective.fields`; None where nothing is to be learnt from them, since
    no answer is better than another."""
    advantages = np.stack([group.advantages for group in groups])
    every_group = kind == "nanochat" or objective.kl_coef > 0
    if not (every_group or advantages.any()):
        return None
    prompts, samples = [group.prompt for group in groups], [group.trained for group in groups]
    fields = objective.fields
    A, B, T = plan.batch
    if kind == "nanochat":
        end = tokenizer.special("<|assistant_end|>")
        return nanochat_rows(prompts, samples, advantages, T, pad=end, rows=B, fields=fields)
    return packed_rows(
        prompts,
        samples,
        advantages,
        T,
        bos=tokenizer.bos,
        rows=B,
        micro_batches=A,
        fields=fields,
        every_group=every_group,
    )


class Update(NamedTuple):
    """What the updates of a step leave."""

    state: TrainState
    metrics: StepMetrics
    statistics: dict[str, float]  # of `Objective.statistics`; {} where nothing was updated


def make_update(
    plan: Plan, objective: Objective, *, updates_per_batch: int = 1, score: Callable | None = None
) -> Callable[[TrainState, dict[str, np.ndarray] | None, Mapping[str, float]], Update]:
    """-> update(state, rows of `rows_of`, scalars): all updates on a step's rows, counted as one step.

    Without rows the state stays as it is, one step further. score(batch) -> log-probabilities [A,B,T] under the
    reference model, for a penalty. To be called in the plan's scope, by all processes with the same rows."""
    first_step = plan.make_train_step()
    loss = plan.loss._replace(inputs=(*plan.loss.inputs, "old_logprobs"))
    later_step = dataclasses.replace(plan, loss=loss).make_train_step()
    part, parts = row_part(plan.mesh)
    on_device = {*plan.abstract_batch} - {"reference_logprobs"}  # the rest is for the statistics alone

    def update(state: TrainState, rows, scalars) -> Update:
        step = state.step + 1
        if rows is None:
            return Update(state._replace(step=step), NOTHING_DONE, {})
        own = {name: np.split(leaf, parts, 1)[part] for name, leaf in rows.items() if name in on_device}
        batch = to_global(own, plan.mesh)
        if score:
            batch["reference_logprobs"] = score(batch)
            whole = jax.device_put(batch["reference_logprobs"], replicated(plan.mesh))
            rows = rows | {"reference_logprobs": np.asarray(whole)}
        state, first = first_step(state, batch, scalars)
        metrics, all_metrics = first, [first]
        if updates_per_batch > 1:
            batch |= {"old_logprobs": jax.device_put(first.logprobs, batch_sharding(plan.mesh))}
            for _ in range(updates_per_batch - 1):
                state, later = later_step(state, batch, scalars)
                all_metrics.append(later)
            metrics = first._replace(
                loss=np.mean([float(m.loss) for m in all_metrics]),
                grad_norm=np.mean([float(m.grad_norm) for m in all_metrics]),
                ok=float(all(bool(m.ok) for m in all_metrics)),
            )
            state = state._replace(step=step)
        statistics = objective.statistics(first.logprobs, rows)
        if updates_per_batch > 1:
            last = objective.statistics(all_metrics[-1].logprobs, rows | {"old_logprobs": first.logprobs})
            statistics["clipped"] = last["clipped"]
        return Update(state, metrics, statistics)

    return update
