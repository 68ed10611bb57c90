"""What goes wrong in a run of RL, seen from its statistics while there is time, and what to do about it."""

from collections.abc import Mapping
from typing import NamedTuple

from nanochat_jax.rollouts.statistics import FAR_APART

SPAN = 20  # steps that "lately" is about, and the first ones that it is compared with
WATCHED = ("reward", "entropy", "delta_logp_mean", "cut", "no_signal")  # of a step's statistics


class Trend(NamedTuple):
    """One statistic over the steps of a run, in so few numbers that a checkpoint keeps them."""

    steps: int = 0
    first: float = 0.0  # mean of the first SPAN steps
    recent: float = 0.0  # moving average with that span
    highest: float = 0.0  # of `recent`
    variance: float = 0.0  # of a step around `recent`

    def after(self, value: float) -> "Trend":
        """The trend with the value of one more step."""
        steps = self.steps + 1
        weight = 2 / (SPAN + 1)
        if steps <= SPAN:  # plain means until there are enough
            first = self.first + (value - self.first) / steps
            variance = self.variance + ((value - self.first) * (value - first) - self.variance) / steps
            return Trend(steps, first, first, first, variance)
        recent = self.recent + weight * (value - self.recent)
        variance = self.variance + weight * ((value - recent) ** 2 - self.variance)
        return Trend(steps, self.first, recent, max(self.highest, recent), variance)


class Watch(NamedTuple):
    """What is known of a run after a step."""

    trends: Mapping[str, Trend]
    worse: int = 0  # steps in a row after which more than half of what the reward had gained was lost

    def after(self, found: Mapping[str, float]) -> "Watch":
        """With the statistics of one more step; one that the step does not have, as without an update, is passed
        over."""
        new = {name: self.trends[name].after(found[name]) for name in WATCHED if name in found}
        trends = {**self.trends, **new}
        return Watch(trends, self.worse + 1 if lost(trends["reward"]) else 0)

    def record(self) -> dict:
        """For a checkpoint; `watch_of` reads it."""
        return {"trends": {name: list(trend) for name, trend in self.trends.items()}, "worse": self.worse}


def watch_of(record: Mapping) -> Watch:
    """The watch that a checkpoint has recorded; of a new run where it has none."""
    recorded = record.get("trends", {})
    return Watch({name: Trend(*recorded.get(name, ())) for name in WATCHED}, record.get("worse", 0))


def lost(reward: Trend) -> bool:
    """Whether the reward has lost more than half of what it had gained, and more than noise would.

    An average over SPAN steps varies by 0.22 of a step's deviation, and the highest of a thousand lies three to four
    times that above the mean: so 1.5 deviations."""
    fallen = reward.highest - reward.recent
    return fallen > max((reward.highest - reward.first) / 2, 1.5 * reward.variance**0.5)


def warnings(watch: Watch, dtype: str, cut_answers: str) -> dict[str, str]:
    """{what goes wrong: the sentence about it}, with the flags to turn; dtype: that is computed in."""
    if watch.trends["reward"].steps <= SPAN:
        return {}
    reward, entropy, apart, cut, no_signal = (watch.trends[name] for name in WATCHED)
    slower = "lower the rates (--init-lr-frac)"
    found = {}
    if lost(reward):
        found["reward"] = (
            f"the reward has fallen from {reward.highest:.3f} to {reward.recent:.3f} ({reward.first:.3f} at first): "
            f"{slower} or give --schedule cosine; --stop-when-worse ends such a run, --keep-best keeps its best model"
        )
    if entropy.recent < entropy.first / 5:
        found["entropy"] = (
            f"the entropy of a token has fallen from {entropy.first:.2g} to {entropy.recent:.2g} nats, so that answers "
            f"get alike and there is nothing to compare: {slower}, or hold on to the first model with --kl-coef"
        )
    elif entropy.recent > 2 * entropy.first + 0.05:
        found["entropy"] = (
            f"the entropy of a token has risen from {entropy.first:.2g} to {entropy.recent:.2g} nats: {slower}; and as "
            "what --top-k leaves out is never pushed down, give --policy truncated or --top-k 0"
        )
    if apart.recent > max(3 * apart.first, FAR_APART[dtype] / 10):
        found["dlogp"] = (
            f"trainer and sampler get further apart: dlogp was {apart.first:.1g} and is {apart.recent:.1g}: {slower}, "
            "and bound the effect with --is-cap 2"
        )
    if cut.recent > max(0.2, cut.first + 0.1):
        advice = "--cut-answers wrong makes the model end them" if cut_answers == "keep" else slower
        found["cut"] = (
            f"{cut.recent:.0%} of the answers do not end ({cut.first:.0%} at first): {advice}, or give more "
            "--max-new-tokens if they need the room"
        )
    if no_signal.recent > 0.8:
        found["no_signal"] = (
            f"{no_signal.recent:.0%} of the problems teach nothing, as all answers to them are worth the same (reward "
            f"{reward.recent:.2f}): choose {'harder' if reward.recent > 0.5 else 'easier'} problems, give more "
            "--num-samples, or --resample"
        )
    return found
