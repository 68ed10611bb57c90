"""How many slots, and arrays of which sizes: generation has few sizes, so that few programs are compiled."""

PROMPT_STEP, CONTINUATION_STEP = 16, 32  # tokens; the smallest cache of a prompt and of a continuation
TAIL_STEP = 128  # the same of the rows that are left when most are done
COARSE_STEP = 64  # the same where prompts come and go
PREFILL_TOKENS = 2048  # of one prefill, per device
MIN_GROUP = 4  # rows of a group where there are more samples than slots: a long sample then delays 3 others at most


def arrange_slots(prompts: int, samples: int, slots: int, devices: int = 1) -> tuple[int, int]:
    """(rows of a group, groups): all samples at once where they fit; else small groups, so that rows are soon free.

    A device has one group at least, and the same number as the others: one of few, if that takes no more slots."""
    rows, groups = samples, max(prompts, 1)
    if prompts * samples > slots:
        rows = min(samples, max(MIN_GROUP, slots // prompts), slots)
        groups = min(prompts, max(1, slots // rows))
    each = -(-groups // devices)
    return rows, devices * (padded_size(each) if devices * padded_size(each) * rows <= slots else each)


def prefill_prompts(waiting: int, T: int, groups: int) -> int:
    """How many prompts of up to T tokens a device fills in one prefill, of those that are waiting and with room for so
    many groups: 1, 4, 16, ..., so that there are few programs for each T."""
    most = min(waiting, max(1, PREFILL_TOKENS // T))
    return min(groups, 4 ** -(-(most - 1).bit_length() // 2))


def padded_size(n: int, step: int = 1) -> int:
    """The smallest of step * (1, 2, 3, 4, 6, 8, 12, ...) that is at least n; 0 for 0."""
    steps = -(-n // step)
    power = 1 << max(steps - 1, 0).bit_length()
    return step * (power * 3 // 4 if power >= 4 and power * 3 // 4 >= steps else power) if n else 0


def coarse_size(n: int, most: int | None = None, factor: int = 4, step: int = COARSE_STEP) -> int:
    """The smallest of step * (1, factor, factor^2, ...) that is at least n, or `most` where that is less; for what may
    be of any size at any time, and where each size is a program to be compiled."""
    size = step
    while size < n:
        size *= factor
    return size if most is None else min(size, most)
