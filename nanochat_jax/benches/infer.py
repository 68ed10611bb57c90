"""Generating as nanochat's infer_bench does it: one prompt, and batches of its continuations.

- ttft_seconds: from the call to the first token of every answer; the prompt goes through the network once, and what is
  left of its keys and values is shared by the answers.
- seconds_per_token: of the tokens after the first, the time of a decode step for the whole batch, without that.
- mbu: the fewest bytes that these steps must read (see `decoding`) over their time and the vendor's memory bandwidth;
  memory_share: the same over what a triad on large arrays reaches in this run. nanochat counts the prompt's keys again
  for each answer, because its engine copies them; so its MBU of large batches is larger at the same speed.
- mfu: floating-point operations at the middle of the answer (`model.cost`) over their time and the vendor's peak.

mbu and mfu are null where the vendor's figures are not known, as of every CPU.
"""

import time
from statistics import median
from typing import Any

import jax

from nanochat_jax.benches.decoding import bytes_to_read, kv_tokens
from nanochat_jax.benches.rates import memory_rate
from nanochat_jax.benches.subject import Subject
from nanochat_jax.cli.device import choose_attention, compute_dtype, peak_bandwidth, peak_flops
from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.distributed.processes import print0
from nanochat_jax.flags.bench import BenchConfig
from nanochat_jax.inference.engine import Engine, GenerationStats
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.model.cost import flops_per_token, kv_bytes_per_token

PROMPT_TOKENS = 2048  # nanochat's
COLUMNS = ("batch", "TTFT ms", "ms/token", "tokens/s", "MBU %", "MFU %")


def bench_infer(cfg: BenchConfig, subject: Subject) -> dict[str, Any]:
    """Print a table, a line for each batch -> all numbers. ValueError: the sizes do not fit together."""
    sizes, context = batch_sizes(cfg.batch_sizes), subject.config.sequence_len
    room = context - cfg.decode_tokens
    require(room > 0, f"--decode-tokens={cfg.decode_tokens} must be fewer than the context of {context}")
    wanted = cfg.prompt_tokens or PROMPT_TOKENS
    prompt = subject.prompt(min(wanted, room))
    if len(prompt) < wanted:
        print0(f"NOTE: the prompt has {len(prompt):,} tokens: it must fit into the context with the answer")
    mesh = make_mesh(cfg.mesh or "data=1")
    device = mesh.devices.flat[0]
    dtype = compute_dtype(cfg.dtype, device.platform)
    attention = choose_attention(
        cfg.attention, subject.config, len(prompt), mesh=mesh, dtype=dtype, packed=False, training=False
    )
    flops, bandwidth = peak_flops(device.device_kind), peak_bandwidth(device.device_kind)
    rate = memory_rate() * mesh.size
    print0(" ".join(f"{name:>9}" for name in COLUMNS))
    batches = []
    for batch in sizes:
        engine = Engine(
            subject.config,
            subject.tokenizer,
            mesh,
            dtype=dtype,
            attention=attention,
            slots=batch,
            chunk=cfg.chunk,
            tools=None,
            prompt_tokens=len(prompt),
        )
        with jax.set_mesh(mesh):
            found = time_batch(cfg, engine, engine.cast_params(subject.params), prompt, batch)
        seconds, read = found.pop("decode_seconds"), found.pop("bytes_read")
        steps = max(1, found["decode_steps"] - 1)
        needed = batch * steps * flops_per_token(subject.config, len(prompt) + cfg.decode_tokens // 2, "decode")
        found |= {
            "mbu": read / seconds / bandwidth / mesh.size if bandwidth else None,
            "mfu": needed / seconds / flops / mesh.size if flops else None,
            "memory_share": read / seconds / rate,
        }
        batches.append({"batch": batch, **found})
        print0(line(batches[-1]))
    first = batches[0]["ttft_seconds"]
    prefill = len(prompt) * flops_per_token(subject.config, len(prompt), "prefill")
    return {
        "prompt_tokens": len(prompt),
        "decode_tokens": cfg.decode_tokens,
        "batches": batches,
        "prefill_tokens_per_second": len(prompt) / first,
        "prefill_mfu": prefill / first / flops / mesh.size if flops else None,
        "kv_bytes_per_token": kv_bytes_per_token(subject.config, engine.programs.layout.dtype),
        "memory_gb_per_second": rate / 1e9,
        "attention": attention,
        "devices": mesh.size,
        "dtype": dtype.name,
    }


def batch_sizes(text: str) -> list[int]:
    """The numbers of a flag like 1,8,32. ValueError: it is not like that."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    require(min(found) >= 1, f"--batch-sizes must be numbers of at least 1, like 1,8,32, got {text!r:.60}")
    return found


def time_batch(cfg: BenchConfig, engine: Engine, params: Any, prompt: list[int], batch: int) -> dict[str, Any]:
    """Medians of the repetitions, after one that compiles."""
    temperature, repeats = cfg.temperature or 0.0, cfg.repeats or 3

    def generate(tokens: int) -> tuple[float, GenerationStats, list[int]]:
        stats: list[GenerationStats] = []
        sampling = SamplingParams(temperature, cfg.top_k, tokens)
        began = time.perf_counter()
        (samples,) = engine.generate(params, [prompt], sampling, samples=batch, report=stats.append)
        return time.perf_counter() - began, stats[0], [len(sample.tokens) for sample in samples]

    began = time.perf_counter()
    generate(1)
    _, _, lengths = generate(cfg.decode_tokens)
    warm_up, compiles = time.perf_counter() - began, engine.compiles
    first = median(generate(1)[0] for _ in range(repeats))
    runs = [generate(cfg.decode_tokens) for _ in range(repeats)]
    steps = runs[0][1].decode_steps
    seconds = max(median(run[0] for run in runs) - first, 1e-9)
    keys = kv_tokens(engine.config, len(prompt), lengths, batch) - kv_tokens(engine.config, len(prompt), [1], batch)
    generated = sum(lengths) - batch
    return {
        "ttft_seconds": first,
        "seconds_per_token": seconds / max(1, steps - 1),
        "tokens_per_second": generated / seconds,
        "decode_steps": steps,
        "host_share": median(run[1].host_seconds / run[1].seconds for run in runs),
        "warm_up_seconds": warm_up,
        "compiles_after_warm_up": engine.compiles - compiles,
        "decode_seconds": seconds,
        "bytes_read": bytes_to_read(engine, steps - 1, keys),
    }


def line(found: dict[str, Any]) -> str:
    """A batch's row of the table."""
    cells = [
        f"{found['batch']:,}",
        f"{1e3 * found['ttft_seconds']:,.1f}",
        f"{1e3 * found['seconds_per_token']:,.2f}",
        f"{found['tokens_per_second']:,.0f}",
        *(f"{100 * found[name]:.2f}" if found[name] is not None else "-" for name in ("mbu", "mfu")),
    ]
    return " ".join(f"{cell:>9}" for cell in cells)
