"""Which backend runs: the one place that decides, by device, type and shape, and says why where it is not the fast one.

A kernel is taken only after a trial on the mesh at hand: it is compiled, and where the devices are real, its values and
gradients are compared with `reference`. What fails falls back to the next backend with a sentence, never to a crash.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import row_axes, row_shards
from nanochat_jax.model.attention.chunked import chunked
from nanochat_jax.model.attention.reference import reference
from nanochat_jax.model.attention.sharded import sharded

NAMES = ("reference", "chunked", "mosaic_gpu", "splash", "cudnn")
KERNELS = {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("splash",)}  # by platform, the best first
SLOWER = "attention runs in blocks of plain XLA (exact, but slower)"
TRIAL_T = 2048  # the most tokens of a trial's row
TRIAL_ERROR = 0.05  # of the largest entry: several times what bfloat16 rounds


class Choice(NamedTuple):
    """The backend, and why it is not the fast one, as a sentence; None where it is, or where it was asked for."""

    name: str
    why: str | None


class Shapes(NamedTuple):
    """What a model asks of attention."""

    n_head: int
    n_kv_head: int
    head_dim: int
    windows: tuple[int, ...]
    T: int  # tokens of the rows that matter most

    @classmethod
    def of(cls, config, T: int) -> "Shapes":
        """Of a GPTConfig."""
        return cls(config.n_head, config.n_kv_head, config.head_dim, tuple(dict.fromkeys(config.windows)), T)


def backend(name: str) -> Callable:
    """attend(q, k, v, k_start, scale, window) of this name, for one device or under a mesh; ValueError: no such name.

    Kernels are imported here, not earlier: their libraries take a second."""
    if name == "reference":
        return lambda q, k, v, k_start, scale, window: reference(q, k, v, k_start, scale)
    if name == "cudnn":  # it has partitioning rules of its own
        from nanochat_jax.model.attention.cudnn import cudnn

        return cudnn
    if name == "chunked":  # the partitioner could look into it, but would make all devices visit what one of them must
        kernel = chunked
    elif name == "splash":
        from nanochat_jax.model.attention.splash import splash as kernel
    elif name == "mosaic_gpu":
        from nanochat_jax.model.attention.hopper.forward import mosaic_gpu as kernel
    else:
        raise ValueError(f"the attention backend must be one of {', '.join(NAMES)}, got {name!r}")
    return sharded(kernel)


def check(wanted: str, mesh: Mesh, *, packed: bool) -> None:
    """ValueError where --attention=`wanted` cannot work on these devices, whatever the model.

    packed: rows may hold several documents."""
    if wanted not in ("auto", *NAMES):
        raise ValueError(f"--attention must be auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {wanted!r:.60}")
    if wanted != "auto" and (why := device_refuses(wanted, mesh.devices.flat[0], packed)):
        raise ValueError(f"--attention={wanted} cannot be used: {why}")


def choose(wanted: str, mesh: Mesh, dtype, shapes: Shapes, *, packed: bool = True, training: bool = True) -> Choice:
    """The backend for --attention=`wanted` ("auto" or a name) on a mesh of real or compile-only devices.

    packed: rows may hold several documents. training: gradients are needed. ValueError: the backend asked for cannot
    do it."""
    check(wanted, mesh, packed=packed)
    device = mesh.devices.flat[0]
    if wanted in ("reference", "chunked"):
        return Choice(wanted, None)
    if wanted != "auto":
        if why := refuses(wanted, mesh, dtype, shapes, packed):
            raise ValueError(f"--attention={wanted} cannot be used: {why}")
        return Choice(wanted, None)
    kernels = KERNELS.get(device.platform, ())
    if packed or training:  # cuDNN's gradients do not repeat bit for bit, and a resumed run must
        kernels = tuple(name for name in kernels if name != "cudnn")
    reasons = []
    for name in kernels:
        why = refuses(name, mesh, dtype, shapes, packed)
        if why is None:
            return Choice(name, f"{'; '.join(reasons)}: {name} is used" if reasons else None)
        reasons.append(why)
    return Choice("chunked", f"{'; '.join(reasons) or f'no flash-attention kernel for {device.platform}'}: {SLOWER}")


def refuses(name: str, mesh: Mesh, dtype, shapes: Shapes, packed: bool) -> str | None:
    """Why this kernel cannot do it, as a sentence without a full stop; None where it can."""
    device = mesh.devices.flat[0]
    if why := device_refuses(name, device, packed):
        return why
    try:
        return shape_refuses(name, mesh, dtype, shapes) or trial(name, mesh, dtype, shapes)
    except Exception as e:  # a compiler or a library that is missing or broken may raise anything
        said = " ".join(str(e).split())
        return f"{name} does not compile for this {device.device_kind} ({type(e).__name__}: {said:.200})"


def device_refuses(name: str, device, packed: bool) -> str | None:
    """Why this backend cannot run on such a device, or on rows of several documents."""
    wanted = next((platform for platform, names in KERNELS.items() if name in names), device.platform)
    if device.platform != wanted:
        return f"{name} needs a {wanted.upper()}, this is a {device.platform.upper()}"
    capability = getattr(device, "compute_capability", "")
    if name == "mosaic_gpu" and capability != "9.0":
        return f"mosaic_gpu needs a Hopper GPU (H100, H200), this is {device.device_kind}"
    if name == "cudnn" and packed:
        return "cudnn takes one document a row, but rows hold several (training: --no-document-mask)"
    return None


def shape_refuses(name: str, mesh: Mesh, dtype, shapes: Shapes) -> str | None:
    """Why this kernel does not take a device's share of such arrays."""
    split = mesh.shape["model"] if shapes.n_kv_head % mesh.shape["model"] == 0 else 1
    q_shape, kv_heads = (1, shapes.T, shapes.n_head // split, shapes.head_dim), shapes.n_kv_head // split
    if name == "splash":
        from nanochat_jax.model.attention.splash import splash_refuses as refuse
    elif name == "mosaic_gpu":
        from nanochat_jax.model.attention.hopper.forward import mosaic_gpu_refuses as refuse
    else:
        from nanochat_jax.model.attention.cudnn import cudnn_refuses as refuse
    return refuse(q_shape, kv_heads, jnp.dtype(dtype))


def trial(name: str, mesh: Mesh, dtype, shapes: Shapes) -> str | None:
    """Compile the kernel, values and gradients, for every window on the mesh, a row a device; where the devices are
    real, compare with `reference`. A sentence where they differ; whatever a compiler raises is let through."""
    T, rows = min(shapes.T, TRIAL_T), row_shards(mesh)
    real = mesh.devices.flat[0] in jax.devices()  # not of a topology to compile for

    def worst():
        """The largest error of y, dq, dk, dv over all windows, in parts of the largest entry."""
        heads = (shapes.n_head, shapes.n_kv_head, shapes.n_kv_head, shapes.n_head)
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(key, (rows, T, n, shapes.head_dim), jnp.dtype(dtype)) for key, n in zip(keys, heads)
        ]
        arrays = [jax.lax.with_sharding_constraint(x, P(row_axes(mesh))) for x in arrays]
        return jnp.max(jnp.stack([error(window, *arrays) for window in shapes.windows]))

    def error(window, q, k, v, dy):
        k_start = jnp.zeros((rows, T), jnp.int32)
        if window >= 0:
            k_start = jnp.maximum(k_start, jnp.arange(T, dtype=jnp.int32)[None] - window)

        def run(name):
            attend = backend(name)
            y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, k_start, shapes.head_dim**-0.5, window), q, k, v)
            return [x.astype(jnp.float32) for x in (y, *pull(dy))]

        def size(x):  # XLA's maximum may lose a NaN
            return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)))

        got = run(name)
        want = run("reference") if real else [jnp.zeros(())] * len(got)
        return jnp.max(jnp.stack([size(a - b) / jnp.maximum(size(b), 1e-3) for a, b in zip(got, want)]))

    with jax.set_mesh(mesh):
        compiled = jax.jit(worst, out_shardings=NamedSharding(mesh, P())).lower().compile()
        found = float(compiled()) if real else 0.0
    if found <= TRIAL_ERROR:
        return None
    return f"{name} gives other values than plain XLA on this {mesh.devices.flat[0].device_kind} (error {found:.2g})"
