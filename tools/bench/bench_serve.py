"""Time the server with 1, 8 and 32 clients at once, and print one line of JSON for each number of clients.

Random weights; every client asks again and again over HTTP, one request after the other, for answers of new_tokens
tokens. Rounds of the numbers of clients alternate, and a line has the medians over the rounds:
- tokens_per_second: generated tokens of all clients together
- first_token_ms: from a request to the first event of its stream
- processor_seconds_per_1000_tokens: of the server's process, which the clients share

python tools/bench/bench_serve.py --head-dim 64 --vocab-size 4096 --max-seq-len 512           # the CPU yardstick
python tools/bench/bench_serve.py --depth 20 --prompt-chars 150 --new-tokens 256              # nanochat's depth 20
"""

import asyncio
import dataclasses
import json
import time
from statistics import median

import httpx
import jax
import tyro

from nanochat_jax.benches.rates import facts
from nanochat_jax.benches.subject import byte_pair_tokenizer, config_of_sizes, random_params
from nanochat_jax.cli.device import compute_dtype
from nanochat_jax.cli.main import run_stage
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.flags.bench import ModelSizes
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.serve import CHUNK
from nanochat_jax.serving.app import ServerSettings, make_app
from nanochat_jax.serving.http import serving
from nanochat_jax.serving.requests import MOST_ALTERNATIVES, Limits
from nanochat_jax.serving.worker import EngineWorker


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(ModelSizes):
    """Time the server."""

    clients: tuple[int, ...] = (1, 8, 32)
    requests: int = 2  # of each client in a round
    prompt_chars: int = 50
    new_tokens: int = 64
    rounds: int = 3
    slots: int = 32


async def ask(client: httpx.AsyncClient, body: dict) -> tuple[int, float]:
    """(tokens of the answer, seconds to its first event) of one request."""
    began, first, usage = time.perf_counter(), None, None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line.removeprefix("data: ")).get("usage") or usage
    return usage["completion_tokens"], first


async def round_of(url: str, cfg: Bench, clients: int, number: int) -> dict:
    """One round with so many clients."""

    async def one(index: int):
        found = []
        for k in range(cfg.requests):
            seed = (number * 1000 + index) * 1000 + k
            prompt = f"{seed:010} ".ljust(cfg.prompt_chars, "x")
            body = {"prompt": prompt, "max_tokens": cfg.new_tokens, "seed": seed, "temperature": 1.0}
            found.append(await ask(client, body | {"stream": True, "stream_options": {"include_usage": True}}))
        return found

    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=clients)) as client:
        began, processor = time.perf_counter(), time.process_time()
        answers = [answer for found in await asyncio.gather(*map(one, range(clients))) for answer in found]
        seconds, processor = time.perf_counter() - began, time.process_time() - processor
    tokens = sum(count for count, _ in answers)
    return {
        "tokens_per_second": tokens / seconds,
        "first_token_ms": 1e3 * median(first for _, first in answers),
        "processor_seconds_per_1000_tokens": 1e3 * processor / tokens,
    }


def main(cfg: Bench) -> None:
    require(min(*cfg.clients, cfg.requests, cfg.rounds, cfg.new_tokens) >= 1, "counts must be at least 1")
    config, mesh = config_of_sizes(cfg), make_mesh("data=1")
    device = mesh.devices.flat[0]
    dtype = compute_dtype(cfg.dtype, device.platform)
    sizes = {"slots": cfg.slots, "chunk": CHUNK, "context": cfg.max_seq_len, "alternatives": MOST_ALTERNATIVES}
    engine = Engine(config, byte_pair_tokenizer(cfg.vocab_size), mesh, dtype=dtype, **sizes)
    worker = EngineWorker(engine, random_params(config), max_waiting=max(cfg.clients))
    began = time.perf_counter()
    worker.warm_up()
    warm_up = time.perf_counter() - began
    worker.start()
    limits = Limits(1, 10**6, 10**6, worker.capacity, SamplingParams())
    compiles: list[int] = []
    rounds: dict[int, list[dict]] = {clients: [] for clients in cfg.clients}
    with serving(make_app(worker, ServerSettings("bench", limits, 1 << 24))) as url:
        for number in range(cfg.rounds + 1):  # the first one compiles
            for clients in cfg.clients:
                rounds[clients].append(asyncio.run(round_of(url, cfg, clients, number)))
            compiles.append(engine.compiles)
    worker.stop()
    for clients, (_, *timed) in rounds.items():
        result = {
            "clients": clients,
            **{name: round(median(found[name] for found in timed), 2) for name in timed[0]},
            "all_tokens_per_second": [round(found["tokens_per_second"], 1) for found in timed],
            "warm_up_seconds": round(warm_up, 2),
            "compiles": compiles[0],
            "compiles_after_warmup": compiles[-1] - compiles[0],
            "platform": device.platform,
            **facts(jax.devices()[0]),
            **{name: value for name, value in dataclasses.asdict(cfg).items() if name != "clients"},
            "dtype": dtype.name,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Bench))
