"""Time the data path on real conversations: building the token cache, opening it, planning rows, making batches.

python tools/bench/bench_data.py --data-dir ../shared/data/hub \\
    --tokenizer ../shared/golden/checkpoints/c1_master/tokenizer
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

from nanochat_jax.cli.device import cpu_name
from nanochat_jax.data.batches import train_batches
from nanochat_jax.data.conversations import ConversationRows, ConversationStore
from nanochat_jax.data.token_cache import TokenCache
from nanochat_jax.tasks import GSM8K, SmolTalk
from nanochat_jax.tokenizer import Tokenizer, split_conversation


def text_bytes(task) -> int:
    """UTF-8 bytes of what a task's conversations say."""
    segments = (segment for i in range(len(task)) for segment in split_conversation(task[i]))
    return sum(len(segment.text.encode()) for segment in segments)


def main(data_dir: Path, tokenizer: Path, seq_len: int = 512, repeats: int = 3) -> None:
    """One JSON line a data set. Times of the cache are medians over the repeats, the others of the last of them."""
    encoder = Tokenizer.load(tokenizer)
    makers = {
        "sgd-dialogues": lambda: SmolTalk("train", repo="sgd-dialogues", data_dir=data_dir),
        "oasst1-en-threads": lambda: SmolTalk("train", repo="oasst1-en-threads", data_dir=data_dir),
        "gsm8k": lambda: GSM8K("train", data_dir=data_dir),
    }
    for name, make in makers.items():
        size, build, warm = text_bytes(make()), [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                TokenCache.open_or_build(make(), encoder, Path(folder), log=lambda _: None)
                build.append(time.perf_counter() - began)
                began = time.perf_counter()
                cache = TokenCache.open_or_build(make(), encoder, Path(folder))
                warm.append(time.perf_counter() - began)
                pairs = np.stack([np.zeros(len(cache), np.int64), np.arange(len(cache))], 1)
                began = time.perf_counter()
                rows = ConversationRows(ConversationStore([cache], pairs), seq_len)
                count = rows.rows_in_epoch(0)
                plan = time.perf_counter() - began
                batches = train_batches(rows, start_row=0, rows_per_step=64)
                next(batches)
                began = time.perf_counter()
                for _ in range(20):
                    next(batches)
                batch = (time.perf_counter() - began) / 20
                batches.close()
        result = {
            "data": name,
            "conversations": len(cache),
            "text_megabytes": round(size / 1e6, 2),
            "build_megabytes_per_second": round(size / 1e6 / statistics.median(build), 2),
            "warm_open_seconds": round(statistics.median(warm), 4),
            "rows": count,
            "fill": round(rows.plan(0).fill, 4),
            "plan_conversations_per_second": round(len(cache) / plan),
            "batch_tokens_per_second": round(64 * seq_len / batch),
            "machine": cpu_name(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
