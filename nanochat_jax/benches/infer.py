"""Generating as nanochat's infer_bench does it: one prompt, and batches of its continuations.

- ttft_seconds: from the call to the first token of every answer; the prompt goes through the network once, and what is
  left of its keys and values is shared by the answers.
- seconds_per_token: the time of a decode step for the whole batch, over the tokens after the first --chunk.
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
    temperature, repeats, chunk = cfg.temperature or 0.0, cfg.repeats or 3, engine.programs.chunk

    def generate(tokens: int) -> tuple[float, float, GenerationStats, list[int]]:
        """(seconds, seconds after the first chunk, ...) of so many tokens"""
        stats: list[GenerationStats] = []
        times = [time.perf_counter()]  # of the beginning, and of the end of each chunk
        (samples,) = engine.generate(
            params,
            [prompt],
            SamplingParams(temperature, cfg.top_k, tokens),
            samples=batch,
            progress=lambda done, total: times.append(time.perf_counter()),
            report=stats.append,
        )
        return times[-1] - times[0], times[-1] - times[1], stats[0], [len(sample.tokens) for sample in samples]

    began = time.perf_counter()
    generate(1)
    *_, lengths = generate(cfg.decode_tokens)
    warm_up, compiles = time.perf_counter() - began, engine.compiles
    first = median(generate(1)[0] for _ in range(repeats))
    whole, later, stats, _ = zip(*(generate(cfg.decode_tokens) for _ in range(repeats)))
    steps = stats[0].decode_steps
    after_first = max(1, steps - 1)
    # The first chunk holds the prompt too; an answer that ends within it leaves only what one token does not take.
    per_token = median(later) / (steps - chunk) if steps > chunk else max(median(whole) - first, 1e-9) / after_first
    keys = kv_tokens(engine.config, len(prompt), lengths, batch) - kv_tokens(engine.config, len(prompt), [1], batch)
    return {
        "ttft_seconds": first,
        "seconds_per_token": per_token,
        "tokens_per_second": (sum(lengths) - batch) / (per_token * after_first),
        "decode_steps": steps,
        "host_share": median(one.host_seconds / one.seconds for one in stats),
        "warm_up_seconds": warm_up,
        "compiles_after_warm_up": engine.compiles - compiles,
        "decode_seconds": per_token * after_first,
        "bytes_read": bytes_to_read(engine, after_first, keys),
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
