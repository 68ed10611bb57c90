"""The objective of RL: what a sample's reward makes of the log-probability of each of its tokens.

REINFORCE with a group's mean as baseline is the default, as in nanochat; ratio clipping, a penalty for leaving a
reference model and truncated importance sampling compose with it. The normaliser is the train step's: by default the
number of sampled tokens of the whole step, so that neither --device-batch-size nor devices nor packing matter.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.distributed.sharding import batch_sharding
from nanochat_jax.model.gpt import GPTConfig, abstract_gpt
from nanochat_jax.model.loss import NO_LIMITS, Limits, token_logprobs

ADVANTAGES = ("mean", "grpo", "rloo")
# No step becomes infinite by its rewards alone: an advantage is then at most 2e6, so is the factor that it is for a
# token's loss and gradient, and squares of the gradient, in its norm and in AdamW, get 4e12. float32 ends at 3e38.
MAX_REWARD = 1e6


def advantages(rewards: np.ndarray, kind: str = "mean") -> np.ndarray:
    """rewards [P,G], a line the samples of one prompt -> float32 [P,G]; exactly 0 where a line's rewards are all equal.

    mean: r - mean(r) (nanochat, Dr. GRPO: arXiv 2503.20783). grpo: (r - mean) / (std + 1e-6), std over G, not G - 1
    (arXiv 2402.03300). rloo: r - mean of the other samples (arXiv 2402.14740).
    ValueError: an unknown kind, a reward that is not finite or beyond 1e6, rloo with one sample.
    """
    rewards = np.asarray(rewards, np.float64)
    if kind not in ADVANTAGES:
        raise ValueError(f"--advantage must be one of {', '.join(ADVANTAGES)}, got {kind!r}")
    if rewards.ndim != 2 or not rewards.size:
        raise ValueError(f"rewards must have the shape [prompts, samples], got {rewards.shape}")
    if not (usable := np.abs(rewards) <= MAX_REWARD).all():
        p, g = np.argwhere(~usable)[0]
        raise ValueError(
            f"every reward must be finite and at most {MAX_REWARD:g}, got {rewards[p, g]:g} for sample {g} of prompt "
            f"{p} of this step"
        )
    G = rewards.shape[1]
    if kind == "rloo" and G < 2:
        raise ValueError("--advantage rloo compares a sample with the others: --num-samples must be at least 2, got 1")
    centred = rewards - rewards.mean(1, keepdims=True)
    if kind == "grpo":
        centred = centred / (rewards.std(1, keepdims=True) + 1e-6)
    if kind == "rloo":
        centred = centred * (G / (G - 1))
    return np.where((rewards == rewards[:, :1]).all(1, keepdims=True), 0, centred).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The token loss as a value: `make_train_step(..., token_loss=Objective(...).token_loss)`.

    clip_low, clip_high: the ratio to the policy that sampled counts within 1 - clip_low .. 1 + clip_high only, as in
    PPO (arXiv 1707.06347); unequal bounds as in DAPO (arXiv 2503.14476); one alone leaves the other side open.
    kl_coef: times the k3 estimate of KL(policy || reference) on the sampled tokens, as in GRPO (arXiv 2402.03300).
    is_cap: gradients are weighted by min(policy / sampling distribution, is_cap), truncated importance sampling
    (arXiv 1802.01561), for what the two give different probabilities: temperature and the sampler's rounding. What
    top-k has left out was never sampled, and no weight brings it back: that takes `limits`.
    limits: p is of this distribution; that of the sampling makes the gradient the one of the expected reward.
    ValueError: a value out of range, or two that contradict each other.
    """

    clip_low: float | None = None
    clip_high: float | None = None
    kl_coef: float = 0.0
    is_cap: float | None = None
    limits: Limits = NO_LIMITS

    def __post_init__(self):
        for name, holds, rule in (
            ("clip_low", self.clip_low is None or 0 < self.clip_low <= 1, "above 0 and at most 1"),
            ("clip_high", self.clip_high is None or 0 < self.clip_high < math.inf, "above 0"),
            ("kl_coef", 0 <= self.kl_coef < math.inf, "at least 0"),
            ("is_cap", self.is_cap is None or 0 < self.is_cap < math.inf, "above 0"),
        ):
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} must be {rule}, got {getattr(self, name)}")
        if self.kl_coef and self.limits != NO_LIMITS:
            raise ValueError(
                f"--kl-coef={self.kl_coef} compares whole distributions, and --policy=truncated trains one without its "
                "less likely tokens: give one of the two"
            )

    @property
    def clips(self) -> bool:
        """Whether the ratio of probabilities is bounded on a side."""
        return self.clip_low is not None or self.clip_high is not None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Leaves of the batch that `token_loss` needs beside weights; from the second update on old_logprobs too."""
        return (
            "advantages",
            *(["logprobs"] if self.is_cap is not None else []),
            *(["reference_logprobs"] if self.kl_coef else []),
        )

    @property
    def sampler_field(self) -> str:
        """The sample's log-probabilities under the distribution that p is of."""
        return "policy_logprobs" if self.limits == NO_LIMITS else "logprobs"

    @property
    def fields(self) -> tuple[str, ...]:
        """Arrays of a sample that its rows hold: for the loss, and for `statistics`."""
        return tuple(dict.fromkeys([self.sampler_field, *(["logprobs"] if self.is_cap is not None else [])]))

    @property
    def _bounds(self) -> tuple[float, float]:
        """Of the ratio."""
        low = -math.inf if self.clip_low is None else 1 - self.clip_low
        return low, math.inf if self.clip_high is None else 1 + self.clip_high

    def token_loss(self, logp: jax.Array, aux: dict[str, jax.Array]) -> jax.Array:
        """log p(token) under the policy in training -> its loss, float32, element by element.

        aux: weights (1 / normaliser where the token was sampled, else 0) and advantages; with is_cap logprobs, of the
        sampler under its sampling distribution; with kl_coef reference_logprobs; and old_logprobs, of the policy before
        the first update on these samples: needed from the second update on, until then the policy is its own old one.

            loss = weight * (-is * gain + kl_coef * (e^d - d - 1)),  d = log p_reference - log p
            gain = advantage * log p, or with clipping min(advantage * ratio, advantage * clipped ratio)
            ratio = p / p_old,  is = min(p_old / p_sampler, is_cap) without gradient
        """
        sampled, advantage = aux["weights"] > 0, aux["advantages"]

        def minus(a, b):  # where nothing was sampled the arrays hold no log-probability: exp must not overflow there
            return jnp.where(sampled, a - b, 0.0)

        old = aux["old_logprobs"] if "old_logprobs" in aux else jax.lax.stop_gradient(logp)
        gain = advantage * logp
        if self.clips:  # the lesser of advantage * ratio and advantage * clipped ratio
            ratio, (low, high) = jnp.exp(minus(logp, old)), self._bounds
            gain = advantage * jnp.where(advantage > 0, jnp.minimum(ratio, high), jnp.maximum(ratio, low))
        if self.is_cap is not None:
            gain = gain * jnp.minimum(jnp.exp(minus(old, aux["logprobs"])), self.is_cap)
        loss = -gain
        if self.kl_coef:
            loss = loss + self.kl_coef * k3(minus(aux["reference_logprobs"], logp))
        return aux["weights"] * loss

    def statistics(self, logp: np.ndarray, batch: dict[str, np.ndarray]) -> dict[str, float]:
        """What an update saw, over its sampled tokens; logp and the batch's leaves [A,B,T], as for `token_loss`.

        delta_logp_mean, delta_logp_max: |log p of the trainer - log p of the sampler|, both of `sampler_field`: without
        limits both are without temperature and top-k, so that they are the same quantity whatever the sampling.
        clipped: share of tokens whose gradient the clipping took; capped: share whose importance weight it cut; kl: k3.
        """
        sampled = np.asarray(batch["weights"]) > 0
        take = {name: np.asarray(leaf, np.float64)[sampled] for name, leaf in batch.items()}
        logp = np.asarray(logp, np.float64)[sampled]
        old = take.get("old_logprobs", logp)
        found = {}
        if self.sampler_field in take:
            delta = np.abs(logp - take[self.sampler_field])
            found |= {"delta_logp_mean": _mean(delta), "delta_logp_max": float(delta.max(initial=0))}
        if self.clips:
            ratio, advantage, (low, high) = np.exp(logp - old), take["advantages"], self._bounds
            found["clipped"] = _mean((advantage > 0) & (ratio > high) | (advantage < 0) & (ratio < low))
        if self.is_cap is not None:
            found["capped"] = _mean(old - take["logprobs"] > math.log(self.is_cap))
        if self.kl_coef:
            found["kl"] = _mean(k3(take["reference_logprobs"] - logp))
        return found


def k3(d):
    """e^d - d - 1, d = log(p_reference / p) at a token drawn from p: an estimate of KL(p || p_reference), never below
    0 (Schulman, 2020)."""
    return jnp.expm1(d) - d


def _mean(values) -> float:
    return float(np.mean(values)) if np.size(values) else 0.0


SCORED = ("inputs", "targets", "document_start", "weights")


def make_score(config: GPTConfig, params: Any, mesh: Mesh, *, dtype=jnp.float32, attention: str = "chunked"):
    """-> score(params, batch) -> log p(target), float32 [A,B,T], by the train step's own forward.

    For old_logprobs and reference_logprobs. params: real or abstract, for their shardings. batch: leaves [A,B,T], of
    which SCORED are read; a micro-batch without weight is not computed and gives 0. To be called under
    jax.set_mesh(mesh)."""
    graphdef, _ = abstract_gpt(config, dtype, attention)

    def one(params, micro):
        x, _ = nnx.merge(graphdef, params).hidden(micro["inputs"], document_start=micro["document_start"])
        head, targets = params["lm_head"], micro["targets"]
        return token_logprobs(x, head, targets, cap=config.logit_cap, vocab_size=config.vocab_size)

    def nothing(micro):
        return jnp.zeros(micro["weights"].shape, jnp.float32)

    rows = batch_sharding(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    @partial(jax.jit, in_shardings=(shardings, rows), out_shardings=rows)
    def score(params, batch):
        def micro_batch(micro):
            return jax.lax.cond(jnp.any(micro["weights"] > 0), partial(one, params), nothing, micro)

        return jax.lax.map(micro_batch, batch)

    return lambda params, batch: score(params, {name: batch[name] for name in SCORED})
