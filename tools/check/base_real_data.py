"""Pretrain a small model on real documents that lie in ../shared: a new tokenizer, 300 steps at depth 4, one JSON line.

python tools/check/base_real_data.py --out /tmp/pretrained
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import tyro

from nanochat_jax.checkpoints import integrity, store
from nanochat_jax.data.shards import Documents, find_shards
from nanochat_jax.tokenizer import train_tokenizer
from nanochat_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def main(
    out: Path,
    data: Path = ROOT.parent / "shared/data/corpus",
    vocab_size: int = 4096,
    depth: int = 4,
    num_iterations: int = 300,
    total_batch_size: int = 8192,
    max_seq_len: int = 512,
    seed: int = 42,
) -> None:
    """out: base directory to make (must not exist); data: folder of parquet shards."""
    out.mkdir(parents=True)
    began = time.perf_counter()
    texts = (documents[i] for documents in map(Documents, find_shards(data)[:-1]) for i in range(len(documents)))
    train_tokenizer(texts, vocab_size).save(out / "tokenizer")
    tokenizer_seconds, began = time.perf_counter() - began, time.perf_counter()
    command = [
        *(sys.executable, "-m", "nanochat_jax.base", "--data-dir", data, "--depth", depth, "--seed", seed),
        *("--num-iterations", num_iterations, "--total-batch-size", total_batch_size, "--max-seq-len", max_seq_len),
        *("--eval-every", 50, "--eval-tokens", 65536, "--save-every", 100),
    ]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(out.absolute())}
    run = subprocess.run([str(part) for part in command], env=environment, cwd=ROOT, stdout=sys.stderr)
    if run.returncode:
        raise SystemExit(run.returncode)
    folder = out / "base_checkpoints" / f"d{depth}"
    records = read_metrics(folder / "metrics.jsonl")
    speeds = sorted(r["tokens_per_second"] for r in records if "loss" in r)
    bits = {r["step"]: round(r["val_bpb"], 4) for r in records if "val_bpb" in r}
    result = {
        "val_bpb": bits,
        "falling": list(bits.values()) == sorted(bits.values(), reverse=True),
        "final_loss": round([r["smoothed_loss"] for r in records if "loss" in r][-1], 4),
        "samples": [r["samples"] for r in records if "samples" in r][-1],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        "tokenizer_seconds": round(tokenizer_seconds, 1),
        "training_seconds": round(time.perf_counter() - began, 1),
        "checkpoint": str(folder / str(integrity.newest_intact(folder))),
        "settings": store.read_meta(folder / str(num_iterations))["user_config"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
