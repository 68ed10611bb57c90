"""The last answers of a call: few rows are left of many, and go on in smaller arrays.

A row costs about as much when its answer is over as before, until the call's longest answer ends. So, as soon as no
prompt waits for a row, the rows that are left move together between two device calls, when they fit into one of two
shapes; each shape is a program to be compiled, once. A row stays on its device: no device sends another one keys and
values, and all keep as many rows as the one that needs most.
"""

import collections
from collections.abc import Sequence

import numpy as np

PARTS = (16, 4)  # a sixteenth and a quarter; more of them would save little, and take minutes to compile
FEWEST_ROWS = 4  # of a device
WORTH = 4  # calls; where no answer may take more, rows stay: they would save less than the programs take to compile


def tail_shapes(groups: int, rows: int) -> list[tuple[int, int]]:
    """(groups, rows of each) that a device with so many may go on with, the fewest rows first: about a sixteenth and a
    quarter of all rows.

    More groups make room for a prompt whose rows do not fit into one, so there are up to twice as many as before; that
    bounds the memory that copies of a prompt's keys and values take."""
    shapes = []
    for part in PARTS:
        n = max(-(-groups * rows // part), FEWEST_ROWS)
        each = -(-n // (2 * groups))
        if -(-n // each) * each < groups * rows and (-(-n // each), each) not in shapes:
            shapes.append((-(-n // each), each))
    return shapes


def fewest_rows(prompts: Sequence[int], devices: int, shapes: Sequence[tuple[int, int]]) -> np.ndarray | None:
    """Where the rows that are left go on: int [devices, groups, rows of a group], the number that each had before, -1
    for a row that is idle; None where they fit into none of the shapes.

    prompts: of each row, those of a device after another, the number of its prompt, -1 where the row is free. shapes:
    of `tail_shapes`; the first that has room on every device is taken. A group has rows of one prompt."""
    local, left = len(prompts) // devices, [collections.defaultdict(list) for _ in range(devices)]
    for r, prompt in enumerate(prompts):
        if prompt >= 0:
            left[r // local][prompt].append(r)
    for groups, each in shapes:
        parts = [[rows[i : i + each] for rows in d.values() for i in range(0, len(rows), each)] for d in left]
        if max(map(len, parts)) <= groups:
            table = np.full((devices, groups, each), -1)
            for device, found in zip(table, parts):
                for group, rows in zip(device, found):
                    group[: len(rows)] = rows
            return table
    return None
