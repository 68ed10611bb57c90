"""How many slots, and arrays of which sizes: generation has few sizes, so that few programs are compiled."""

PROMPT_STEP, CONTINUATION_STEP = 16, 32  # tokens; the smallest cache of a prompt and of a continuation
COARSE_STEP = 64  # the same where prompts come and go
MIN_GROUP = 4  # rows of a group where there are more samples than slots: a long sample then delays 3 others at most


def arrange_slots(prompts: int, samples: int, slots: int) -> tuple[int, int]:
    """(rows of a group, groups): all samples at once where they fit; else small groups, so that rows are soon free."""
    if prompts * samples <= slots:
        return samples, max(prompts, 1)
    rows = min(samples, max(MIN_GROUP, slots // prompts), slots)
    return rows, min(prompts, max(1, slots // rows))


def padded_size(n: int, step: int = 1) -> int:
    """The smallest of step * (1, 2, 3, 4, 6, 8, 12, ...) that is at least n; 0 for 0."""
    steps = -(-n // step)
    power = 1 << max(steps - 1, 0).bit_length()
    return step * (power * 3 // 4 if power >= 4 and power * 3 // 4 >= steps else power) if n else 0


def coarse_size(n: int, most: int, factor: int = 4) -> int:
    """The smallest of 64 * (1, factor, factor^2, ...) that is at least n, or `most` where that is less; for what may be
    of any size at any time, and where each size is a program to be compiled."""
    size = COARSE_STEP
    while size < n:
        size *= factor
    return min(size, most)
