"""Time rollouts whose answers have forced lengths, with fewer rows for the last ones and without, and print JSON.

Random weights; lengths, each of which is a case of two lines:
- uniform: every answer has decode_tokens
- uneven: 19 of 20 have a tenth to a fifth of that, the others all of it
- geometric: a fifth on average, as if any token were the last with the same probability; at most all of it
Rounds with and without alternate, in changing order; a line has the medians over the rounds, of warm calls:
- tokens_per_second: generated tokens of whole calls of `generate`
- processor_seconds: of this process, which others on the machine disturb less than seconds
- row_steps: the rows of a device call times the steps that it made, all calls together
- same_tokens: whether both gave the same answers; largest_difference: of a token's log-probabilities

python tools/bench/bench_rollouts.py --head-dim 64 --vocab-size 4096 --max-seq-len 512        # the CPU yardstick
"""

import contextlib
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
    decode_tokens: int = 128
    slots: int = 256
    chunk: int = 16
    rounds: int = 5
    mesh: str = "data=1"


def lengths_of(kind: str, shape: tuple[int, int], most: int) -> np.ndarray:
    """int [prompts, samples]: tokens of each answer."""
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return np.full(shape, most)
    if kind == "geometric":
        return np.minimum(rng.geometric(5 / most, shape), most)
    return np.where(rng.random(shape) < 0.05, most, rng.integers(max(1, most // 10), most // 5 + 1, shape))


@contextlib.contextmanager
def forced(lengths: np.ndarray, fewer_rows: bool):
    """While it is entered, answer s to prompt p ends after lengths[p, s] tokens -> a list that gets the row steps of
    each device call."""
    row_steps, start_sample, decode = [], SlotScheduler._start_sample, GenerationPrograms.decode

    def start_limited(self, r, prompt, number):
        start_sample(self, r, prompt, number)
        self.rows[r].remaining = self.slots.remaining[r] = lengths[prompt.number, number]

    def decode_counted(self, *args):
        output, fresh = decode(self, *args)
        row_steps.append(len(output.count) * int(output.count.max()))
        return output, fresh

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(SlotScheduler, "_start_sample", start_limited))
        stack.enter_context(patch.object(GenerationPrograms, "decode", decode_counted))
        if not fewer_rows:
            stack.enter_context(patch.object(scheduler, "tail_shapes", lambda groups, rows: []))
        yield row_steps


def compare(cfg: Bench, kind: str, params) -> list[dict]:
    """The two lines of a case."""
    config, mesh = config_of_sizes(cfg), make_mesh(cfg.mesh)
    lengths = lengths_of(kind, (cfg.prompts, cfg.samples), cfg.decode_tokens)
    prompts = np.random.default_rng(1).integers(0, 256, (cfg.prompts, cfg.prompt_tokens), dtype=np.int32)
    sampling = SamplingParams(1.0, 50, cfg.decode_tokens)
    dtype = compute_dtype(cfg.dtype, mesh.devices.flat[0].platform)
    tokenizer, sizes = byte_pair_tokenizer(cfg.vocab_size), {"slots": cfg.slots, "chunk": cfg.chunk}
    engines = {fewer_rows: Engine(config, tokenizer, mesh, dtype=dtype, **sizes) for fewer_rows in (False, True)}

    def generate(fewer_rows: bool, step: int) -> tuple[dict[str, float], list[Sample]]:
        with forced(lengths, fewer_rows) as row_steps:
            began, processor = time.perf_counter(), time.process_time()
            answers = engines[fewer_rows].generate(params, prompts, sampling, samples=cfg.samples, step=step)
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
        samples = [sample for group in answers for sample in group]
        tokens = sum(len(sample.tokens) for sample in samples)
        found = {"tokens_per_second": tokens / seconds, "seconds": seconds, "processor_seconds": processor}
        return found | {"row_steps": sum(row_steps), "tokens": tokens}, samples

    with jax.set_mesh(mesh):
        params = engines[True].cast_params(params)
        warm_up = {fewer_rows: generate(fewer_rows, 0) for fewer_rows in engines}
        compiles = {fewer_rows: engine.compiles for fewer_rows, engine in engines.items()}
        timed = {fewer_rows: [] for fewer_rows in engines}
        for step in range(1, cfg.rounds + 1):
            for fewer_rows in (False, True) if step % 2 else (True, False):
                timed[fewer_rows].append(generate(fewer_rows, step)[0])
    pairs = list(zip(warm_up[False][1], warm_up[True][1], strict=True))
    same = all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
    difference = max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in pairs) if same else None
    return [
        {
            "lengths": kind,
            "fewer_rows": fewer_rows,
            **{name: round(median(found[name] for found in runs), 3) for name in runs[0]},
            "all_seconds": [round(found["seconds"], 3) for found in runs],
            "all_processor_seconds": [round(found["processor_seconds"], 3) for found in runs],
            "warm_up_seconds": round(warm_up[fewer_rows][0]["seconds"], 1),
            "compiles": compiles[fewer_rows],
            "compiles_after_warm_up": engines[fewer_rows].compiles - compiles[fewer_rows],
            "same_tokens": same,
            "largest_difference": difference,
            "dtype": dtype.name,
        }
        for fewer_rows, runs in timed.items()
    ]


def main(cfg: Bench) -> None:
    require(set(cfg.lengths) <= set(LENGTHS), f"--lengths must be some of {', '.join(LENGTHS)}, got {cfg.lengths}")
    params = random_params(config_of_sizes(cfg))
    for kind in cfg.lengths:
        for line in compare(cfg, kind, params):
            print(json.dumps(dataclasses.asdict(cfg) | facts(jax.devices()[0]) | line), flush=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Bench))
