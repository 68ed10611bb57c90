"""How long the SFT step of a depth takes until it is compiled, for devices that are not here: a JSON line a program.

python tools/predict/compile_time.py --cases d12:h100 d20:h100 d20:v5e-8 d34:v5e-8
python tools/predict/compile_time.py --cases d12:h100 --programs gradient update

Seconds of processors, of this process and those it starts, beside those of the clock: on a machine that others use too
only the first can be compared. Nothing is read from a compilation cache.
"""

import dataclasses
import json
import os
import time
from typing import Literal

import tyro
from cases import model_of_depth, parse_case, sft_plan, slice_mesh
from roofline import provenance
from scaling_programs import TRACERS

from nanochat_jax.cli.main import run_stage


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compile for devices that are not here, and tell how long that takes."""

    cases: tuple[str, ...] = ("d12:h100", "d12:v5e-8")  # depth:devices
    programs: tuple[Literal["step", "gradient", "update"], ...] = ("step",)  # the others are its parts, by themselves
    device_batch_size: int = 8
    max_seq_len: int = 2048
    vocab_size: int = 32768
    remat: str = "elementwise"  # chosen here, as choosing may compile too
    compile: bool = True  # False: stop after lowering


class Clock:
    """Tells the seconds since it was asked last."""

    def __init__(self):
        self.last = self._now()

    def _now(self) -> tuple[float, float]:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system, time.perf_counter()

    def lap(self) -> dict[str, float]:
        """{processor: seconds, wall: seconds}"""
        before, self.last = self.last, self._now()
        return dict(zip(("processor", "wall"), (round(b - a, 2) for a, b in zip(before, self.last))))


def measure(settings: Settings, text: str, program: str) -> dict:
    """Seconds of tracing, lowering and compiling, and what a device would hold."""
    case = parse_case(text)
    model = model_of_depth(case.depth, settings.max_seq_len, settings.vocab_size)
    mesh = slice_mesh(case, model)
    plan = sft_plan(model, mesh, passes=1, rows=settings.device_batch_size, remat=settings.remat)
    found: dict = {"case": text, "program": program, "attention": plan.attention, "remat": plan.remat}
    clock = Clock()
    traced = TRACERS[program](plan)
    found["trace"] = clock.lap()
    with plan.scope():
        lowered = traced.lower()
        found["lower"] = clock.lap()
        found["characters"] = len(lowered.as_text())
        clock.lap()
        if settings.compile:
            compiled = lowered.compile()
            found["compile"] = clock.lap()
            memory = compiled.memory_analysis()
            found["temporary_bytes"] = memory.temp_size_in_bytes
    return found


def main(settings: Settings) -> int:
    for text in settings.cases:
        for program in settings.programs:
            print(json.dumps(measure(settings, text, program) | {"compiled": provenance()}), flush=True)
    return 0


if __name__ == "__main__":
    run_stage(main, tyro.cli(Settings))
