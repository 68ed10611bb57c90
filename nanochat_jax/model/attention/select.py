"""Which attention backend runs: the table of backends, and the choice among them by device, type and shape.

A new backend is a module of its own and a row in BACKENDS. Its module has a function of the backend's name,
attend(q, k, v, k_start, scale, window) as `attention` describes it, and for a kernel also `<name>_refuses(q_shape,
kv_heads, dtype)`: why it cannot take such arrays on one device, as a sentence, or None.

A kernel is taken only after a trial on the mesh at hand: it is compiled, and where the devices are real, its values and
gradients are compared with `reference`. What fails falls back to the next backend with a sentence, never to a crash.
Of what passes, "auto" takes the one that timing.py finds to be the fastest on the device of process 0.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import row_axes, row_shards
from nanochat_jax.model.attention import timing
from nanochat_jax.model.attention.sharded import sharded

TRIAL_T = 2048  # the most tokens of a trial's row
TRIAL_ERROR = 0.05  # of the largest entry: several times what bfloat16 rounds


class Gpus(NamedTuple):
    """NVIDIA GPUs by compute capability, the least and the most, and the words for one of them."""

    least: float
    most: float
    name: str


class Backend(NamedTuple):
    """A row of the table: where a backend is, and what it needs."""

    module: str  # in nanochat_jax.model.attention; imported when it is used, as kernels' libraries take a second
    platform: str | None = None  # the one of JAX's platforms whose kernel it is; None: plain XLA, for any
    gpus: Gpus | None = None  # that it needs; None: any that its platform has
    documents: bool = True  # takes packed rows, that is, looks at where k_start lets documents begin
    repeats: bool = True  # gradients repeat bit for bit, as a resumed run must
    needs_shard_map: bool = True  # not split by XLA's partitioner: see `sharded`


BACKENDS = {  # the kernels of a platform: first the one that is preferred where times are equal or cannot be taken
    "reference": Backend("reference", needs_shard_map=False),
    # XLA's partitioner could split it, but then all devices would visit the blocks that any of them needs.
    "chunked": Backend("chunked"),
    "mosaic_gpu": Backend("hopper.forward", "gpu", gpus=Gpus(9.0, 9.0, "a Hopper GPU (H100, H200)")),
    "triton": Backend("triton", "gpu", gpus=Gpus(8.0, 99.0, "an NVIDIA GPU of compute capability 8.0 or newer")),
    "splash": Backend("splash", "tpu"),
    "cudnn": Backend("cudnn", "gpu", documents=False, repeats=False, needs_shard_map=False),
}
NAMES = tuple(BACKENDS)


class AttentionChoice(NamedTuple):
    """The backend, and why it is not a fast one, as a sentence; None where it is, where it was asked for, or where such
    devices have none."""

    name: str
    why: str | None


class AttentionShapes(NamedTuple):
    """What a model asks of attention."""

    n_head: int
    n_kv_head: int
    head_dim: int
    windows: tuple[int, ...]  # of the layers in turn
    T: int  # tokens of the rows that matter most
    rows: int = 1  # of a device in one pass

    @classmethod
    def of(cls, config, T: int, rows: int = 1) -> "AttentionShapes":
        """Those of a GPTConfig in so many rows of T tokens on a device."""
        return cls(config.n_head, config.n_kv_head, config.head_dim, tuple(config.windows), T, rows)

    def heads(self, mesh: Mesh) -> tuple[int, int, int]:
        """Query heads and kv heads of a device, and their size."""
        split = mesh.shape["model"] if self.n_kv_head % mesh.shape["model"] == 0 else 1
        return self.n_head // split, self.n_kv_head // split, self.head_dim


def kernels_of(platform: str) -> tuple[str, ...]:
    """Names of the platform's kernels, in the order of the table."""
    return tuple(name for name, row in BACKENDS.items() if row.platform == platform)


def backend(name: str) -> Callable:
    """The function attend(q, k, v, k_start, scale, window) of this name, for one device and under a mesh."""
    if name not in BACKENDS:
        raise ValueError(f"the attention backend must be one of {', '.join(NAMES)}, got {name!r}")
    attend = _import(name, name)
    return sharded(attend) if BACKENDS[name].needs_shard_map else attend


def _import(name: str, function: str) -> Callable:
    return getattr(import_module(f"nanochat_jax.model.attention.{BACKENDS[name].module}"), function)


def check_attention_backend(wanted: str, mesh: Mesh, *, packed: bool) -> None:
    """ValueError where --attention=`wanted` cannot work on these devices, whatever the model.

    packed: rows may hold several documents."""
    if wanted not in ("auto", *NAMES):
        raise ValueError(f"--attention must be auto, {', '.join(NAMES[:-1])} or {NAMES[-1]}, got {wanted!r:.60}")
    if wanted != "auto" and (why := device_refuses(wanted, mesh.devices.flat[0], packed)):
        raise ValueError(f"--attention={wanted} cannot be used: {why}")


def choose_attention_backend(
    wanted: str,
    mesh: Mesh,
    dtype: Any,
    shapes: AttentionShapes,
    *,
    packed: bool = True,
    training: bool = True,
    before: str | None = None,
    tell: Callable[[str], Any] | None = None,
) -> AttentionChoice:
    """The backend for --attention=`wanted` ("auto" or a name) on a mesh of real or compile-only devices; the same on
    all processes.

    packed: rows may hold several documents. training: gradients are needed. before: the backend that a run which goes
    on has had; it stays wherever it still passes its trial, so that neither noise nor a tie changes a run. tell: called
    with the lines of the table of times, where times are taken. ValueError: the backend asked for cannot do it."""
    check_attention_backend(wanted, mesh, packed=packed)
    if wanted != "auto":
        if BACKENDS[wanted].platform and (why := refuses(wanted, mesh, dtype, shapes, packed)):
            raise ValueError(f"--attention={wanted} cannot be used: {why}")
        return AttentionChoice(wanted, None)
    device, found, failed, missing = mesh.devices.flat[0], [], [], []  # missing: what such a device cannot have
    if before in BACKENDS:
        why = refused_by_one(before, mesh, dtype, shapes, packed) if BACKENDS[before].platform else None
        if why is None:
            return AttentionChoice(before, None)
        failed.append(why)
    for name in kernels_of(device.platform):
        if name == before or (packed and not BACKENDS[name].documents) or (training and not BACKENDS[name].repeats):
            continue
        if why := device_refuses(name, device, packed):
            missing.append(why)
        elif why := refused_by_one(name, mesh, dtype, shapes, packed):
            failed.append(why)
        else:
            found.append(name)
    if not kernels_of(device.platform):  # as on a CPU
        return AttentionChoice("chunked", None)
    if not found:
        said = "; ".join(missing + failed) or f"no flash-attention kernel of {device.platform} can do this"
        return AttentionChoice("chunked", f"{said}: attention runs in blocks of plain XLA (exact, but slower)")
    name = found[0]
    if is_real(device) and (seconds := seconds_of_backends([*found, "chunked"], mesh, dtype, shapes, packed, training)):
        name = timing.fastest(seconds)
        for line in timing.table(seconds) if tell else ():
            tell(line)
    return AttentionChoice(name, f"{'; '.join(failed)}: {name} is used" if failed else None)


def seconds_of_backends(
    names: list[str], mesh: Mesh, dtype: Any, shapes: AttentionShapes, packed: bool, training: bool
) -> dict[str, float]:
    """Seconds of the attention of a pass with each backend that can run it, on the first device of process 0, which
    tells the others. They are kept for later runs by device, versions, code and shapes."""
    seconds = None
    if not processes.index():
        device = mesh.local_devices[0]
        heads, name_of_type = shapes.heads(mesh), jnp.dtype(dtype).name
        work = timing.Work(shapes.rows, shapes.T, heads, shapes.windows, name_of_type, packed, training)
        key = {
            "device": device.device_kind,
            "platform": device.client.platform_version,
            "versions": processes.versions(),
            "code": processes.code_hash(),
            "work": work,
            "backends": names,
        }
        seconds = timing.recall(key)
        if seconds is None:
            seconds = timing.time_backends({name: _import(name, name) for name in names}, work, device)
            timing.keep(key, seconds)
    return processes.exchange("the times of attention", seconds)[0]


def refused_by_one(name: str, mesh: Mesh, dtype: Any, shapes: AttentionShapes, packed: bool) -> str | None:
    """`refuses`, of the first process that has something against it."""
    found = processes.exchange(f"the trial of {name}", refuses(name, mesh, dtype, shapes, packed))
    return next(filter(None, found), None)


def is_real(device: Any) -> bool:
    """Whether programs can run on it: not one of a topology to compile for."""
    return device in jax.devices()


def refuses(name: str, mesh: Mesh, dtype: Any, shapes: AttentionShapes, packed: bool) -> str | None:
    """Why this kernel cannot do it, as a sentence without a full stop; None where it can."""
    device = mesh.devices.flat[0]
    if why := device_refuses(name, device, packed):
        return why
    try:
        return shape_refuses(name, mesh, dtype, shapes) or trial(name, mesh, dtype, shapes, packed)
    except Exception as e:  # a compiler or a library that is missing or broken may raise anything
        said = " ".join(str(e).split())
        return f"{name} does not compile for this {device.device_kind} ({type(e).__name__}: {said:.200})"


def device_refuses(name: str, device: Any, packed: bool) -> str | None:
    """Why this backend cannot run on such a device, or on rows of several documents."""
    needs = BACKENDS[name]
    if needs.platform not in (None, device.platform):
        return f"{name} needs a {needs.platform.upper()}, this is a {device.platform.upper()}"
    if needs.gpus and not needs.gpus.least <= _compute_capability(device) <= needs.gpus.most:
        return f"{name} needs {needs.gpus.name}, this is {device.device_kind}"
    if packed and not needs.documents:
        return f"{name} takes one document a row, but rows hold several (training: --no-document-mask)"
    return None


def _compute_capability(device: Any) -> float:
    """Of an NVIDIA GPU; 0 for one of another maker."""
    try:
        return float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's have names in its place
        return 0.0


def shape_refuses(name: str, mesh: Mesh, dtype: Any, shapes: AttentionShapes) -> str | None:
    """Why this kernel cannot take a device's share of such arrays."""
    N, K, H = shapes.heads(mesh)
    return _import(name, f"{name}_refuses")((1, shapes.T, N, H), K, jnp.dtype(dtype))


def trial(name: str, mesh: Mesh, dtype: Any, shapes: AttentionShapes, packed: bool) -> str | None:
    """Compile the kernel, values and gradients, for every window on the mesh, a row a device; where the devices are
    real, compare with `reference`. A sentence where they differ; whatever a compiler raises is let through.

    packed: the row holds several documents."""
    T, rows, real = min(shapes.T, TRIAL_T), row_shards(mesh), is_real(mesh.devices.flat[0])

    def largest_error():
        """Of y, dq, dk and dv over all windows, in parts of the largest entry."""
        heads = (shapes.n_head, shapes.n_kv_head, shapes.n_kv_head, shapes.n_head)
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(key, (rows, T, n, shapes.head_dim), jnp.dtype(dtype)) for key, n in zip(keys, heads)
        ]
        arrays = [jax.lax.with_sharding_constraint(x, P(row_axes(mesh))) for x in arrays]
        return jnp.max(jnp.stack([error(window, *arrays) for window in dict.fromkeys(shapes.windows)]))

    def error(window, q, k, v, dy):
        k_start = jnp.broadcast_to(timing.first_keys(T, window, packed), (rows, T))

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
        compiled = jax.jit(largest_error, out_shardings=NamedSharding(mesh, P())).lower().compile()
        found = float(compiled()) if real else 0.0
    if found <= TRIAL_ERROR:
        return None
    return f"{name} gives other values than plain XLA on this {mesh.devices.flat[0].device_kind} (error {found:.2g})"
