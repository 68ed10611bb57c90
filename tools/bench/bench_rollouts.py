"""Time rollouts whose answers have forced lengths, with fewer rows for the last ones and without, and print JSON.

Random weights; lengths, of which each is a case:
- uniform: every answer has decode_tokens
- uneven: 19 of 20 have a tenth to a fifth of that, the others all of it
- geometric: a fifth on average, as when every token may be the last with the same probability; at most all of it
Rounds with and without alternate, and so does their order; a line has the medians over the rounds, of warm calls:
- tokens_per_second: generated tokens of a whole call of `generate`
- processor_seconds: of this process, which others on the machine disturb less
- row_steps: rows that the device calls had, times the steps that they made
- same_tokens: whether both gave the same answers; largest_difference: of their log-probabilities

python tools/bench/bench_rollouts.py --head-dim 64 --vocab-size 4096 --max-seq-len 512        # the CPU yardstick
"""

import dataclasses
import json
import time
from statistics import median
from unittest.mock import patch

import jax
import numpy as np
import tyro

from nanochat_jax.benches.rates import facts
from nanochat_jax.benches.subject import byte_pair_tokenizer, config_of_sizes, random_params
from nanochat_jax.cli.device import compute_dtype
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.flags.bench import ModelSizes
from nanochat_jax.inference import scheduler
from nanochat_jax.inference.decode import GenerationPrograms
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.samples import Sample
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.scheduler import SlotScheduler

LENGTHS = ("uniform", "uneven", "geometric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(ModelSizes):
    """Time rollouts of forced lengths."""

    lengths: tuple[str, ...] = LENGTHS
    prompts: int = 16
    samples: int = 16
    prompt_tokens: int = 100
    decode_tokens: int = 256
    slots: int = 256
    chunk: int = 16
    rounds: int = 3
    mesh: str = "data=1"


def lengths_of(kind: str, shape: tuple[int, int], most: int) -> np.ndarray:
    """int [prompts, samples]: tokens of each answer."""
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return np.full(shape, most)
    if kind == "geometric":
        return np.clip(rng.geometric(5 / most, shape), 1, most)
    require(kind == "uneven", f"--lengths must be some of {', '.join(LENGTHS)}, got {kind}")
    return np.where(rng.random(shape) < 0.05, most, rng.integers(most // 10, most // 5 + 1, shape))


class Call:
    """Calls of `generate` in which answer s to prompt p ends after lengths[p][s] tokens, and what they take."""

    def __init__(self, engine: Engine, params, prompts: np.ndarray, lengths: np.ndarray, smaller: bool):
        self.engine, self.params, self.prompts, self.lengths, self.smaller = engine, params, prompts, lengths, smaller

    def __call__(self, step: int) -> tuple[dict[str, float], list[Sample]]:
        row_steps, start, decode = [], SlotScheduler._start_sample, GenerationPrograms.decode

        def limited(self_, r, prompt, number):
            start(self_, r, prompt, number)
            self_.rows[r].remaining = self_.slots.remaining[r] = self.lengths[prompt.number, number]

        def counted(self_, *args):
            output, fresh = decode(self_, *args)
            row_steps.append(len(output.count) * int(output.count.max()))
            return output, fresh

        without = patch.object(scheduler, "tail_shapes", lambda groups, rows: [])
        most = int(self.lengths.max())
        with patch.object(SlotScheduler, "_start_sample", limited), patch.object(GenerationPrograms, "decode", counted):
            began, processor = time.perf_counter(), time.process_time()
            if not self.smaller:
                without.start()
            answers = self.engine.generate(
                self.params, self.prompts, SamplingParams(1.0, 50, most), samples=self.lengths.shape[1], step=step
            )
            if not self.smaller:
                without.stop()
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
        samples = [sample for group in answers for sample in group]
        tokens = sum(len(sample.tokens) for sample in samples)
        found = {"seconds": seconds, "tokens_per_second": tokens / seconds, "processor_seconds": processor}
        return found | {"row_steps": sum(row_steps), "tokens": tokens}, samples


def compare(cfg: Bench, kind: str, params) -> list[dict]:
    """The two lines of a case."""
    config, mesh = config_of_sizes(cfg), make_mesh(cfg.mesh)
    lengths = lengths_of(kind, (cfg.prompts, cfg.samples), cfg.decode_tokens)
    prompts = np.random.default_rng(1).integers(0, 256, (cfg.prompts, cfg.prompt_tokens), dtype=np.int32)
    dtype = compute_dtype(cfg.dtype, mesh.devices.flat[0].platform)
    calls, timed, compiles, samples = {}, {False: [], True: []}, {}, {}
    with jax.set_mesh(mesh):
        for smaller in (False, True):
            engine = Engine(
                config, byte_pair_tokenizer(cfg.vocab_size), mesh, dtype=dtype, slots=cfg.slots, chunk=cfg.chunk
            )
            calls[smaller] = Call(engine, engine.cast_params(params), prompts, lengths, smaller)
            first, samples[smaller] = calls[smaller](0)
            compiles[smaller] = {"warm_up_seconds": first["seconds"], "compiles": engine.compiles}
        for step in range(1, cfg.rounds + 1):
            for smaller in (False, True) if step % 2 else (True, False):
                timed[smaller].append(calls[smaller](step)[0])
    pairs = list(zip(samples[False], samples[True], strict=True))
    same = all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
    difference = max(np.abs(a.logprobs - b.logprobs).max() for a, b in pairs) if same else None
    return [
        {
            "what": "rollouts of forced lengths",
            "lengths": kind,
            "fewer_rows": smaller,
            **{name: median(found[name] for found in timed[smaller]) for name in timed[smaller][0]},
            "all_seconds": [round(found["seconds"], 3) for found in timed[smaller]],
            "all_processor_seconds": [round(found["processor_seconds"], 3) for found in timed[smaller]],
            **compiles[smaller],
            "compiles_after_warm_up": calls[smaller].engine.compiles - compiles[smaller]["compiles"],
            "same_tokens": same,
            "largest_difference": None if difference is None else float(difference),
        }
        for smaller in (False, True)
    ]


def main(cfg: Bench) -> None:
    params = random_params(config_of_sizes(cfg))
    for kind in cfg.lengths:
        for line in compare(cfg, kind, params):
            print(json.dumps(dataclasses.asdict(cfg) | facts(jax.devices()[0]) | line), flush=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Bench))
