"""Schedules at their corners."""

import pytest

from nanochat_jax.optim import schedules


def test_schedules_have_their_corners_where_they_should():
    ratios = {"warmup_ratio": 0.1, "warmdown_ratio": 0.5, "final_lr_frac": 0.2}
    values = [schedules.sft_lr_multiplier(p, **ratios) for p in (0.05, 0.1, 0.5, 0.75, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2], rel=1e-6)
    assert schedules.sft_lr_multiplier(0.7, warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=0.0) == 1
    assert [schedules.sft_muon_momentum(s) for s in (0, 150, 300, 900)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert schedules.rl_lr_multiplier(3, 10) == pytest.approx(0.7)


def test_rl_rates_fall_linearly_or_as_half_a_cosine_or_not_at_all_and_may_rise_first():
    def rates(**how):
        return [schedules.rl_lr_multiplier(step, 8, **how) for step in range(8)]

    assert rates() == [1 - step / 8 for step in range(8)]
    assert rates(schedule="constant") == [1] * 8
    cosine = rates(schedule="cosine")
    assert cosine[0] == 1 and cosine[4] == pytest.approx(0.5) and cosine == sorted(cosine, reverse=True)
    assert cosine[1] + cosine[7] == pytest.approx(1)
    assert rates(schedule="constant", warmup_ratio=0.5) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates(warmup_ratio=0.25)[:3] == pytest.approx([0.5, 1 - 1 / 8, 1 - 2 / 8])
    with pytest.raises(ValueError, match="--schedule must be one of linear, cosine, constant, got 'step'"):
        rates(schedule="step")


def test_pretraining_rates_rise_by_steps_and_fall_over_the_last_part():
    shape = {"warmup_steps": 4, "warmdown_ratio": 0.5, "final_lr_frac": 0.1}
    values = [schedules.base_lr_multiplier(step, 20, **shape) for step in (0, 3, 4, 10, 11, 15, 19, 20)]
    assert values == pytest.approx([0.25, 1.0, 1.0, 1.0, 0.91, 0.55, 0.19, 0.1])
    never = {"warmup_steps": 0, "warmdown_ratio": 0.0, "final_lr_frac": 0.1}
    assert [schedules.base_lr_multiplier(step, 20, **never) for step in (0, 19, 20)] == [1.0, 1.0, 1.0]


def test_pretraining_momentum_rises_for_400_steps_and_falls_with_the_rates():
    values = [
        schedules.base_muon_momentum(step, 2000, warmdown_ratio=0.5) for step in (0, 200, 400, 999, 1000, 1500, 2000)
    ]
    assert values == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.97, 0.935, 0.90])
    assert schedules.base_muon_momentum(300, 301, warmdown_ratio=0.65) == pytest.approx(
        0.94
    )  # a short run never gets there
    assert schedules.base_muon_momentum(500, 501, warmdown_ratio=0.0) == pytest.approx(0.97)


def test_pretraining_decay_falls_along_half_a_cosine():
    values = [schedules.base_decay_multiplier(step, 12) for step in (0, 4, 6, 8, 12)]
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
