"""What a model costs: its parameters by kind, floating-point operations per token, bytes of the cache per token."""

import jax
import jax.numpy as jnp

from nanochat_jax.model.gpt import GPTConfig, abstract_gpt


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters by kind and in `total`; `matrices` are those of the blocks, gates included."""
    counts = {"wte": 0, "value_embeds": 0, "lm_head": 0, "matrices": 0, "scalars": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_gpt(config)[1]):
        name = path[-1].key
        if name == "value_embed":
            kind = "value_embeds"
        elif name in counts:
            kind = name
        else:
            kind = "matrices" if path[0].key == "blocks" else "scalars"
        counts[kind] += leaf.size
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: GPTConfig, seq_len: int, kind: str = "train") -> int:
    """FLOPs per token: 2 per weight of a matrix product and pass, and those of attention's scores and values.

    kind: "train" (forward and backward: 3 passes) and "prefill" (1 pass) count min(window, seq_len) keys for every
    token, as nanochat's estimate does (causality is not subtracted); "decode" is one token at position seq_len - 1.
    """
    counts, passes = parameter_counts(config), {"train": 3, "prefill": 1, "decode": 1}[kind]
    reach = [seq_len if w < 0 else min(w + (kind == "decode"), seq_len) for w in config.windows]
    return passes * (2 * (counts["matrices"] + counts["lm_head"]) + 4 * config.n_embd * sum(reach))


def kv_bytes_per_token(config: GPTConfig, dtype=jnp.bfloat16) -> int:
    """Bytes of keys and values that one more token takes in the cache, all layers together."""
    return 2 * config.n_layer * config.kv_dim * jnp.dtype(dtype).itemsize
