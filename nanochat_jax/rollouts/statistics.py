"""What a step's rollouts show, in the numbers that are logged."""

from collections.abc import Mapping

import numpy as np

from nanochat_jax.rollouts.pack import Groups

FIRST_STEPS = 3  # by which a run is judged to have too little to learn from
LITTLE_SIGNAL = 0.2  # share of groups with a signal below which there is a warning

# Mean |log p of the trainer - log p of the sampler| of a token above which a step is warned of. Rounding alone gave a
# tiny model 1e-7 in float32; the limit for bfloat16, which keeps 8 bits, is a guess that no run has tested.
FAR_APART = {"float32": 1e-3, "bfloat16": 0.1}


def step_statistics(samples: Groups, rewards: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
    """What a step's samples [P][G], rewards and advantages [P,G] show, as logged.

    reward: mean; pass_rate: share of samples with a reward above 0; no_signal: share of groups without an advantage;
    length_mean, length_max: generated tokens; cut: share not ended by an end token; turns: mean number of answers in a
    sample; tool_calls, tool_failed, tool_timeouts: shares of samples with a call, with one that has no result, with one
    that was given up; entropy: of the sampling distribution, in nats a sampled token, estimated by the mean of -log p
    over what was sampled.
    """
    rewards = np.asarray(rewards, np.float64)
    flat = [sample for group in samples for sample in group]
    lengths = np.array([len(sample.tokens) for sample in flat])
    sampled = np.concatenate([sample.logprobs[sample.mask > 0] for sample in flat]).astype(np.float64)
    return {
        "reward": float(rewards.mean()),
        "pass_rate": float((rewards > 0).mean()),
        "no_signal": 1 - float(np.any(advantages, 1).mean()),
        "length_mean": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "cut": float(np.mean([not sample.ended for sample in flat])),
        "turns": float(np.mean([sample.turns for sample in flat])),
        "tool_calls": float(np.mean([bool(sample.tool_calls) for sample in flat])),
        "tool_failed": float(np.mean([any(call.result is None for call in sample.tool_calls) for sample in flat])),
        "tool_timeouts": float(np.mean([any(call.timed_out for call in sample.tool_calls) for sample in flat])),
        "entropy": float(-sampled.mean()) if sampled.size else 0.0,
    }


def little_signal(first_steps: list[tuple[float, float]]) -> str:
    """The warning that a run has little to learn from, empty where it has enough; first_steps: for each the share
    of groups with a signal, and the pass rate."""
    share, passed = np.mean(first_steps, 0)
    if share >= LITTLE_SIGNAL:
        return ""
    return (
        f"WARNING: of the first {FIRST_STEPS} steps' groups of answers {share:.0%} differ in reward (pass rate "
        f"{passed:.1%}), too little to learn from: train SFT longer, or choose "
        f"{'harder' if passed > 0.5 else 'easier'} problems"
    )


def far_apart(found: Mapping[str, float], dtype: str) -> str:
    """The warning that sampler and trainer disagree, empty where they do not; found: a step's statistics, dtype: that
    is computed in."""
    mean = found.get("delta_logp_mean", 0.0)
    if mean <= FAR_APART[dtype]:
        return ""
    advice = "" if dtype == "float32" else " or --dtype float32"
    return (
        f"WARNING: the trainer's log-probabilities are {mean:.1g} apart from the sampler's on average (dlogp; more "
        f"than rounding makes of {dtype}), so the updates are of another policy than the one that answers: try another "
        f"--attention{advice}, and bound the effect with --is-cap 2"
    )
