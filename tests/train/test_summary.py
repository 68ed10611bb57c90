"""The last lines of a run."""

from pathlib import Path

from nanochat_jax.train.summary import end_lines

FOLDER = Path("/b/chatrl_checkpoints/mine")


def test_best_and_last_are_told_with_intervals_where_the_model_is_and_what_comes_next():
    records = [
        {"step": 0, "pass@1": 0.1, "pass@1_low": 0.05, "pass@1_high": 0.2},
        {"step": 2, "pass@1": 0.5, "pass@1_low": 0.4, "pass@1_high": 0.6},
        {"step": 3, "reward": 0.9, "loss": -1.0},
        {"step": 4, "pass@1": 0.4, "pass@1_low": 0.3, "pass@1_high": 0.5},
    ]
    assert end_lines(records, FOLDER, 4, 90.0) == [
        "Done: 4 steps, 1.5 min since this start",
        "loss: -1.0000 at step 3",
        "held-out pass@1: 0.4000 (0.3000 to 0.5000) at step 4, best 0.5000 (0.4000 to 0.6000) at step 2",
        "The model is in /b/chatrl_checkpoints/mine/4",
        "Next: python -m nanochat_jax.chat --source rl --model-tag mine",
    ]


def test_lower_bits_per_byte_are_better_and_stand_for_the_loss():
    records = [{"step": k, "loss": 1.0, "val_bpb": value} for k, value in ((1, 1.5), (2, 1.25), (3, 1.75))]
    records += [{"step": 4, "val_bpb": None}]
    _, line, *_ = end_lines(records, Path("/b/chatsft_checkpoints/d2"), 4, 8000.0)
    assert line == "validation bits per byte: 1.7500 at step 3, best 1.2500 at step 2"
    assert end_lines([], Path("/b/elsewhere/d2"), 4, 8000.0) == [
        "Done: 4 steps, 2.2 h since this start",
        "The model is in /b/elsewhere/d2/4",
    ]
