"""A run that goes wrong is told so, once it is sure, with the flag to turn."""

import json

import numpy as np
import pytest

from nanochat_jax.rollouts.watch import SPAN, WATCHED, Trend, warnings, watch_of

GOOD = {"reward": 0.5, "entropy": 0.4, "delta_logp_mean": 1e-7, "cut": 0.01, "no_signal": 0.3}


def watched(steps):
    """The watch after steps with these values in place of GOOD's."""
    watch = watch_of({})
    for values in steps:
        watch = watch.after(GOOD | values)
    return watch


def told(steps, cut_answers="wrong"):
    return warnings(watched(steps), "float32", cut_answers)


def noisy(means, deviation=0.03, name="reward"):
    noise = np.random.default_rng(0).normal(0, deviation, len(means))
    return [{name: float(mean + n)} for mean, n in zip(means, noise)]


def test_a_run_that_gets_better_hears_nothing():
    assert told(noisy(np.linspace(0.3, 0.9, 300))) == {}


def test_noise_around_one_reward_is_no_loss():
    for deviation in (0.0, 0.02, 0.3):
        assert "reward" not in told(noisy(np.full(600, 0.5), deviation))


def test_a_reward_that_has_lost_more_than_half_of_its_gain_is_told_with_the_steps_that_it_has_lasted():
    up_and_down = noisy([*np.linspace(0.3, 0.8, 200), *np.linspace(0.8, 0.3, 200)])
    assert "the reward has fallen from 0.7" in told(up_and_down)["reward"]
    assert 60 < watched(up_and_down).worse < 140
    assert watched(up_and_down[:280]).worse == 0  # 0.6: less than half is lost
    recovered = [*up_and_down, *noisy(np.linspace(0.3, 0.8, 60))]
    assert watched(recovered).worse == 0


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("entropy", np.geomspace(0.4, 0.01, 200), "entropy of a token has fallen from 0."),
        ("entropy", np.linspace(0.4, 1.2, 200), "the entropy of a token has risen from 0.44 to 1.2 nats"),
        ("delta_logp_mean", np.geomspace(1e-7, 1e-2, 200), "--is-cap 2"),
        ("cut", np.linspace(0, 0.9, 200), "% of the answers do not end (4% at first)"),
        ("no_signal", np.full(100, 0.95), "choose easier problems"),
    ],
)
def test_each_fault_has_its_own_sentence(name, values, said):
    steps = [{name: float(value)} for value in values]
    found = told(steps)
    assert [*found] == [{"delta_logp_mean": "dlogp"}.get(name, name)]
    assert all(said in sentence for sentence in found.values())


def test_whoever_keeps_cut_answers_is_told_of_the_other_rule():
    steps = [{"cut": float(c)} for c in np.linspace(0, 0.9, 200)]
    assert "--cut-answers wrong" in told(steps, "keep")["cut"] and "--cut-answers" not in told(steps)["cut"]


def test_the_first_steps_say_nothing_yet():
    assert told([{"no_signal": 1.0, "cut": 1.0}] * SPAN) == {}


def test_a_step_without_an_update_has_no_dlogp_and_changes_nothing_there():
    watch = watched([{}] * 30)
    without = {name: value for name, value in GOOD.items() if name != "delta_logp_mean"}
    after = watch.after(without)
    assert after.trends["delta_logp_mean"] == watch.trends["delta_logp_mean"]
    assert after.trends["reward"].steps == 31


def test_a_checkpoint_keeps_all_of_it():
    rng = np.random.default_rng(1)
    steps = [{name: float(rng.random()) for name in WATCHED} for _ in range(90)]
    watch = watched(steps[:50])
    again = watch_of(json.loads(json.dumps(watch.record())))
    assert again == watch
    for step in steps[50:]:
        watch, again = watch.after(step), again.after(step)
    assert again == watch


def test_the_first_steps_are_averaged_and_their_spread_is_their_variance():
    values = np.random.default_rng(2).random(SPAN)
    trend = Trend()
    for value in values:
        trend = trend.after(float(value))
    np.testing.assert_allclose(
        (trend.first, trend.recent, trend.variance), (values.mean(), values.mean(), values.var())
    )
