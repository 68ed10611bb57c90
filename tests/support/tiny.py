"""A base directory that is made in a second: a tokenizer of bytes, a random base model of ours, and conversations."""

import json
import random
import string
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx

from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.distributed import sharding
from nanochat_jax.interop.nanochat_model import nanochat_name
from nanochat_jax.model.gpt import GPT, GPTConfig, window_sizes
from nanochat_jax.optim import groups as optim
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train import step as train
from tests.support.torch_files import write_pt

CONFIG = GPTConfig(
    sequence_len=64,
    vocab_size=265,
    n_layer=2,
    n_head=2,
    n_kv_head=2,
    n_embd=64,
    padded_vocab=320,
    windows=window_sizes("SL", 2, 64),
)
SETTINGS = {"max_seq_len": 64, "device_batch_size": 1, "total_batch_size": 512, "embedding_lr": 0.25, "matrix_lr": 0.01}


def tokenizer() -> Tokenizer:
    specials = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Tokenizer("tiny", r"\w+|\W", {bytes([i]): i for i in range(256)}, specials)


def random_state(config: GPTConfig = CONFIG, seed: int = 0) -> tuple[train.TrainState, optim.Groups]:
    """Parameters and optimizer state with no zeros in them, on the default device."""
    params = nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed))))
    groups = optim.default_groups(config.n_embd, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02)
    state = train.init_state(params, optim.make_optimizer(groups))
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype != np.float32:
            return leaf + 7
        return leaf + np.abs(rng.normal(0, 0.02, leaf.shape)).astype("f4")

    return jax.tree.map(fill, state)._replace(bad_steps=state.bad_steps, step=state.step), groups


def meta(groups: optim.Groups, config: GPTConfig = CONFIG, **more) -> dict:
    """What a checkpoint of ours records, so far as a model needs it."""
    recorded = {name: vars(group) for name, group in groups.items()}
    sizes = json.loads(json.dumps({k: getattr(config, k) for k in config.__dataclass_fields__}))
    return {"model_config": sizes, "user_config": SETTINGS, "optimizer_groups": recorded} | more


def write_base(
    base: Path,
    tag: str = "d2",
    step: int = 7,
    config: GPTConfig = CONFIG,
    seed: int = 0,
    *,
    likely: tuple[str, ...] = (),
) -> Path:
    """tokenizer/ and base_checkpoints/<tag>/<step> -> the checkpoint's folder. likely: special tokens that the model
    draws often."""
    made = tokenizer()
    made.save(base / "tokenizer")
    state, groups = random_state(config, seed)
    for name in likely:
        state.params["lm_head"] = state.params["lm_head"].at[made.special(name)].multiply(2)
    saver = Saver(base / "base_checkpoints" / tag, keep=9)
    saver.save(step, train.state_items(state), lambda: meta(groups, config, step=step, tokenizer=made.digest()))
    saver.wait()
    return saver.folder / str(step)


def write_nanochat_base(base: Path, tag: str = "d2", step: int = 7, seed: int = 0) -> dict:
    """The same as files of nanochat's, without optimizer -> the parameters."""
    tokenizer().save(base / "tokenizer")
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True, exist_ok=True)
    params = jax.tree.map(np.asarray, random_state(seed=seed)[0].params)
    write_pt(
        folder / f"model_{step:06d}.pt",
        {nanochat_name(path): leaf for path, leaf in sharding.flatten_by_path(params).items()},
    )
    fields = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    sizes = {name: getattr(CONFIG, name) for name in fields} | {"window_pattern": "SL"}
    (folder / f"meta_{step:06d}.json").write_text(
        json.dumps({"step": step, "model_config": sizes, "user_config": SETTINGS})
    )
    return params


def write_conversations(path: Path, n: int = 60, seed: int = 0) -> Path:
    """n conversations of up to 60 characters, one a line."""
    rng = random.Random(seed)

    def words():
        return " ".join("".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(rng.randint(1, 5)))

    lines = [
        json.dumps([{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]) for _ in range(n)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_shards(folder: Path, sizes=(40, 40, 20), seed: int = 0) -> Path:
    """Parquet shards of so many documents of 8 to 200 characters -> the folder."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        texts = [" ".join(rng.choices(("one", "two", "three", "four"), k=rng.randint(2, 40))) for _ in range(size)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return folder


# A base model that is trained in seconds, at 8 rows of 64 tokens a step
DIALS = ["--depth", "2", "--aspect-ratio", "32", "--head-dim", "32", "--window-pattern", "SL", "--max-seq-len", "64"]
BASE_FLAGS = [*DIALS, "--total-batch-size", "512", "--device-batch-size", "1", "--sample-every", "-1"]
NO_SPELLING = ["--simple-spelling-rows", "0", "--spelling-bee-rows", "0"]
FLAGS = ["--smoltalk-epochs", "0", "--mmlu-epochs", "0", "--gsm8k-epochs", "0", *NO_SPELLING, "--chatcore-every", "-1"]


def sft_flags(base: Path) -> list[str]:
    """Flags of SFT on conversations that are written into the base directory."""
    files = [write_conversations(base / f"{name}.jsonl", seed=i) for i, name in enumerate(("train", "val"))]
    return [*FLAGS, "--custom-json", str(files[0]), "--val-json", str(files[1]), "--eval-tokens", "512"]


def base_flags(base: Path) -> list[str]:
    """Flags of pretraining on documents that are written into the base directory, with a tokenizer."""
    tokenizer().save(base / "tokenizer")
    return [*BASE_FLAGS, "--data-dir", str(write_shards(base / "shards")), "--eval-tokens", "512"]
