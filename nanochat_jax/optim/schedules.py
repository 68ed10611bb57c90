"""nanochat's schedules: the factor on all learning rates, Muon's momentum, and the factor on Muon's weight decay.

Each is a function of the step, counted from 0, so that a checkpoint has no schedule state to save or restore. A stage
asks `sft_scalars`, `base_scalars` or `rl_scalars` for all the numbers of a step; what they are called is what the
optimizer's `update` takes, and a number added there reaches the train step of the run and of the preflight.
"""

import math


def sft_lr_multiplier(progress: float, *, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Factor on the rates in SFT: linearly up, then 1, then linearly down to final_lr_frac at progress 1.

    progress is the finished share of the run. It is not clipped: beyond 1 the factor falls further, as in nanochat."""
    if progress < warmup_ratio:
        return (progress + 1e-8) / warmup_ratio
    if progress <= 1.0 - warmdown_ratio:
        return 1.0
    decay = (progress - (1.0 - warmdown_ratio)) / warmdown_ratio
    return (1 - decay) + decay * final_lr_frac


def sft_muon_momentum(step: int) -> float:
    """Muon's momentum in SFT: from 0.85 to 0.95 over the first 300 steps."""
    warm = min(step / 300, 1)
    return (1 - warm) * 0.85 + warm * 0.95


def base_lr_multiplier(
    step: int, total: int, *, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float
) -> float:
    """Factor on the rates in pretraining: linearly up over warmup_steps, then 1, then over the last warmdown_ratio of
    the `total` steps linearly down to final_lr_frac, which step `total` itself would have."""
    warmdown = round(warmdown_ratio * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= total - warmdown:
        return 1.0
    left = (total - step) / warmdown
    return left + (1 - left) * final_lr_frac


def base_muon_momentum(step: int, total: int, *, warmdown_ratio: float) -> float:
    """Muon's momentum in pretraining: from 0.85 to 0.97 over 400 steps, and down to 0.90 while the rates fall."""
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    warmdown = round(warmdown_ratio * total)
    done = (step - (total - warmdown)) / warmdown if step >= total - warmdown else 0.0
    return 0.97 + (0.90 - 0.97) * done


def base_decay_multiplier(step: int, total: int) -> float:
    """Factor on Muon's weight decay in pretraining: half a cosine, from 1 at step 0 to 0 at step `total`."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


RL_SCHEDULES = ("linear", "cosine", "constant")


def rl_lr_multiplier(step: int, num_steps: int, *, schedule: str = "linear", warmup_ratio: float = 0.0) -> float:
    """Factor on the rates in RL: from 1 down to 0 at num_steps, linearly (nanochat) or as half a cosine, or always 1;
    in the first warmup_ratio of the steps it is lowered, to rise in equal parts. ValueError: an unknown schedule."""
    if schedule not in RL_SCHEDULES:
        raise ValueError(f"--schedule must be one of {', '.join(RL_SCHEDULES)}, got {schedule!r}")
    done = step / num_steps
    factor = {"linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]
    warmup = round(warmup_ratio * num_steps)
    return factor * min(1.0, (step + 1) / warmup) if warmup else factor


def sft_scalars(
    step: int, total: int, *, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float
) -> dict[str, float]:
    """What the optimizer takes at a step of SFT; total: steps of the run."""
    return {
        "lr_multiplier": sft_lr_multiplier(
            step / total, warmup_ratio=warmup_ratio, warmdown_ratio=warmdown_ratio, final_lr_frac=final_lr_frac
        ),
        "muon_momentum": sft_muon_momentum(step),
    }


def base_scalars(
    step: int, total: int, *, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float
) -> dict[str, float]:
    """What the optimizer takes at a step of pretraining; total: steps of the run."""
    return {
        "lr_multiplier": base_lr_multiplier(
            step, total, warmup_steps=warmup_steps, warmdown_ratio=warmdown_ratio, final_lr_frac=final_lr_frac
        ),
        "muon_momentum": base_muon_momentum(step, total, warmdown_ratio=warmdown_ratio),
        "decay_multiplier": base_decay_multiplier(step, total),
    }


def rl_scalars(step: int, total: int, *, schedule: str = "linear", warmup_ratio: float = 0.0) -> dict[str, float]:
    """What the optimizer takes at a step of RL, where nanochat keeps Muon's momentum; total: steps of the run."""
    multiplier = rl_lr_multiplier(step, total, schedule=schedule, warmup_ratio=warmup_ratio)
    return {"lr_multiplier": multiplier, "muon_momentum": 0.95}
