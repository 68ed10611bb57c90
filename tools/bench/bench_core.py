"""Time CORE's scoring on made-up examples of four shapes that its tasks have, and print a line of JSON for each.

Random weights and tokens. Two ways take turns, and a line has the medians over the rounds, of what is compiled:
- scored: span_scores, which reads what the texts of an example have in common once, and many examples in a pass
- one_by_one: the texts of one example at a time, padded to the same few lengths, with the logits of all their tokens
Each has its wall and its processor seconds for 100 examples, and speedup is the wall seconds of one_by_one over scored.

python tools/bench/bench_core.py --head-dim 64 --vocab-size 4096 --max-seq-len 512            # the CPU yardstick
python tools/bench/bench_core.py --depth 20 --examples 500                                    # nanochat's depth 20
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from statistics import median

import jax
import numpy as np
import tyro
from flax import nnx

from nanochat_jax.benches.rates import facts
from nanochat_jax.benches.subject import config_of_sizes, random_params
from nanochat_jax.cli.device import choose_attention, compute_dtype
from nanochat_jax.cli.main import run_stage
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.evals.span_scores import Span, make_span_scores
from nanochat_jax.flags.bench import ModelSizes
from nanochat_jax.inference.shapes import padded_size
from nanochat_jax.model.gpt import abstract_gpt
from nanochat_jax.model.loss import pick_logprob

SHAPES = {  # texts of an example, tokens that they have in common, and that each has of its own: from, to
    "ten shots, four choices": (4, (300, 480), (2, 24)),
    "no shots, four choices": (4, (30, 90), (5, 40)),
    "ten shots, two choices": (2, (300, 480), (2, 16)),
    "ten shots, a continuation": (1, (300, 480), (1, 5)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(ModelSizes):
    """Time CORE's scoring."""

    examples: int = 48
    rounds: int = 3
    attention: str = "auto"


def made_up(rng: np.random.Generator, cfg: Bench, texts: int, common, own) -> list[list[Span]]:
    """Examples of so many texts."""

    def example() -> list[Span]:
        size = int(rng.integers(*common))
        ids = rng.integers(0, cfg.vocab_size, size, dtype=np.int32)
        rests = [rng.integers(0, cfg.vocab_size, rng.integers(*own), dtype=np.int32) for _ in range(texts)]
        return [Span(np.append(ids, rest), size, size + len(rest)) for rest in rests]

    return [example() for _ in range(cfg.examples)]


def make_one_by_one(graphdef: nnx.GraphDef) -> Callable:
    """-> one_by_one(params, examples): each example's losses, float32 [texts]."""

    @jax.jit
    def losses(params, ids, start, end):  # ids int32 [M,T], start and end [M]
        logprobs = pick_logprob(nnx.merge(graphdef, params)(ids[:, :-1]), ids[:, 1:])[0]
        at = np.arange(1, ids.shape[1])[None]
        return -(logprobs * ((at >= start[:, None]) & (at < end[:, None]))).sum(-1)

    def one_by_one(params, examples: Sequence[Sequence[Span]]) -> list[np.ndarray]:
        found = []
        for spans in examples:
            T = padded_size(max(span.end for span in spans), 32)
            ids = np.stack([np.pad(span.ids, (0, T - len(span.ids))) for span in spans])
            starts, ends = (np.array(numbers) for numbers in zip(*(span[1:] for span in spans)))
            found.append(np.asarray(losses(params, ids, starts, ends)))
        return found

    return one_by_one


def main(cfg: Bench) -> None:
    config, mesh = config_of_sizes(cfg), make_mesh("data=1")
    device = mesh.devices.flat[0]
    dtype = compute_dtype(cfg.dtype, device.platform)
    sizes = {"mesh": mesh, "dtype": dtype, "packed": False, "training": False}
    attention = choose_attention(cfg.attention, config, cfg.max_seq_len, **sizes)
    params = random_params(config)
    span_scores = make_span_scores(config, mesh, 0, dtype=dtype, attention=attention)
    one_by_one = make_one_by_one(abstract_gpt(config, dtype, attention)[0])
    ways = {"scored": span_scores, "one_by_one": one_by_one}
    rng = np.random.default_rng(0)
    for shape, sizes_of in SHAPES.items():
        examples = made_up(rng, cfg, *sizes_of)
        timed: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(cfg.rounds + 1):  # the first one compiles
            for way, run in ways.items():
                began, processor = time.perf_counter(), time.process_time()
                run(params, examples)
                timed[way].append((time.perf_counter() - began, time.process_time() - processor))
        scores = [
            [score.mean_loss * (s.end - s.start) for score, s in zip(*both)]
            for both in zip(span_scores(params, examples), examples)
        ]
        for found, alone in zip(scores, one_by_one(params, examples), strict=True):
            np.testing.assert_allclose(found, alone, rtol=1e-2 if dtype.itemsize < 4 else 1e-4)
        line = {"shape": shape, "tokens": sum(span.end for spans in examples for span in spans)}
        for way, (_, *rest) in timed.items():
            wall, processor = (100 * median(values) / cfg.examples for values in zip(*rest))
            line[way] = {"seconds": round(wall, 3), "processor_seconds": round(processor, 3)}
        line["speedup"] = round(line["one_by_one"]["seconds"] / line["scored"]["seconds"], 2)
        settings = {"platform": device.platform, **facts(device), **dataclasses.asdict(cfg)}
        print(json.dumps(line | settings | {"dtype": dtype.name, "attention": attention}), flush=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Bench))
