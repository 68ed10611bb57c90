"""What a case of tools/check/faults.py may do, each in its simplest form."""

import os
import time

import numpy as np


def end_well(_):
    print("said")
    return "result"


def refuse(_):
    raise ValueError("the number of apples must be even, got 3")


def raise_something(_):
    raise KeyError("apples")


def say_nothing(_):
    raise ValueError("")


def hang(_):
    time.sleep(60)


def die(_):
    os.abort()


def take_memory(n):
    return str(len(np.ones(n, np.uint8)))
