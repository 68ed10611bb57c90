"""The whole network in float64 NumPy, one row of tokens at a time: nanochat's formulas, independent of gpt.py.

`c` is a GPTConfig, `p` its parameter tree as NumPy arrays. A matrix is (out, in) and applied as x W^T.
"""

import numpy as np


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1.1920929e-07)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, base):
    """Turn the pair (x[j], x[j + d/2]) of the head vector at time t by MINUS t / base^(2j/d). x [T,heads,d]."""
    T, _, d = x.shape
    angle = np.arange(T)[:, None, None] / base ** (2 * np.arange(d // 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)], -1)


def attention(c, p, h, ids, starts, layer):
    """h [T,D] -> [T,D]. Query t sees key u where starts[t] <= u <= t and t - u <= the layer's window."""
    T, d = len(h), c.n_embd // c.n_head
    q, k, v = (h @ p[name].T for name in ("c_q", "c_k", "c_v"))
    q, k, v = q.reshape(T, c.n_head, d), k.reshape(T, c.n_kv_head, d), v.reshape(T, c.n_kv_head, d)
    if c.value_embed_scale and layer % 2 == (c.n_layer - 1) % 2:
        gate = c.value_embed_scale * sigmoid(h[:, : c.value_gate_channels] @ p["ve_gate"].T)
        v = v + gate[:, :, None] * p["value_embed"][ids].reshape(v.shape)
    q, k = (c.qk_scale * rms(rotate(x, c.rope_base)) for x in (q, k))
    t, u, window = np.arange(T)[:, None], np.arange(T), c.windows[layer]
    seen = (starts[:, None] <= u) & (u <= t) & ((t - u <= window) | (window < 0))
    y = np.zeros_like(q)
    for n in range(c.n_head):
        kv = n // (c.n_head // c.n_kv_head)
        weights = np.where(seen, np.exp(q[:, n] @ k[:, kv].T / d**0.5), 0)
        y[:, n] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
    return y.reshape(T, -1) @ p["c_proj"].T


def logits(c, p, ids, starts):
    """ids [T], starts [T] (where each token's document begins) -> [T,V]."""
    e = rms(p["wte"][ids])
    x = e.copy()
    if c.smear:
        for t in range(len(ids)):
            if t > starts[t]:
                x[t] += p["smear_lambda"][0] * sigmoid(p["smear_gate"][0] @ e[t, :24]) * e[t - 1]
    x0 = x
    for i in range(c.n_layer):
        block = p["blocks"][i]
        if c.residual_lambdas:
            x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0
        x = x + attention(c, block["attn"], rms(x), ids, starts, i)
        x = x + np.maximum(rms(x) @ block["mlp"]["c_fc"].T, 0) ** 2 @ block["mlp"]["c_proj"].T
        if i == c.n_layer // 2:
            halfway = x
    if c.backout:
        x = x - p["backout_lambda"][0] * halfway
    z = (rms(x) @ p["lm_head"].T)[:, : c.vocab_size]
    return c.logit_cap * np.tanh(z / c.logit_cap)


def losses(logits, targets):
    """Cross entropy of each token, [T]."""
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
