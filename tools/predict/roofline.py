"""How long a compiled program takes on TPU chips or NVIDIA GPUs at the least and at the most, from what hlo_cost.py
counts. For the tools beside it.

Computing: each operation takes as long as its products or its memory traffic need, whichever is longer; attention
kernels, which are opaque, as long as the products of all visible pairs (forward 2 products, backward 7). Sending: what
a chip sends in a collective goes over those of its links that lead to others of its group, counted for the chip that
has the fewest (the corner of a slice that is no torus), and each collective waits once for the longest way, 1
microsecond a hop. In an all-to-all everything travels the mean distance. The GPUs of a host, joined by NVLink or PCIe,
are a ring, each as near to any other. Rates are the vendor's peaks, so no number here is a measurement. `at_least` is
the longer of computing and sending (one wholly hidden behind the other), `at_most` their sum (nothing hidden). Real
programs do not reach the peaks, so a run takes longer than `at_least`, and may take longer than `at_most`.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.cli.settings import require
from nanochat_jax.distributed.compile_only import GPUS, GPUS_A_HOST
from nanochat_jax.model.gpt import GPTConfig

# Bytes/s of a chip's memory, and of one of its links in one direction, by the kind of chip. From Google's pages on TPU
# v6e (v5e and v6e: 800 and 1600 GB/s, 4 ports of together 1600 and 3200 Gbit/s; older versions of the page say 819 and
# 1640 GB/s, 3584 Gbit/s) and on TPU v5p (2765 GB/s, 6 links of together 4800 Gbit/s, on newer versions 1200 GB/s in
# both directions). Read in November 2026.
RATES = {"TPU v5 lite": (800e9, 50e9), "TPU v5": (2765e9, 100e9), "TPU v6 lite": (1600e9, 100e9)}
# Of a GPU in one direction: NVLink where the vendor's data sheets have one, else PCIe 4.0 or 5.0 with 16 lanes.
GPU_LINKS = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "l4": 32e9, "rtx4090": 32e9, "rtx5090": 64e9}
RATES |= {GPUS[name].kind: (GPUS[name].bandwidth, link) for name, link in GPU_LINKS.items()}
HOP_SECONDS = 1e-6  # of a message to the neighbour, by "How To Scale Your Model" (2025), the part on sharding


@dataclasses.dataclass(frozen=True)
class Span:
    """The chips that a collective goes over."""

    links: float  # that a chip sends on at once, of the chip that has the fewest; halves where groups share them
    hops: float  # of the longest way
    mean_hops: float  # of all ways


ALONE = Span(1.0, 0.0, 0.0)


def wraps(kind: str, shape: Sequence[int]) -> list[bool]:
    """Which axes of a slice are rings: all of a v5p slice made of whole cubes, of v5e and v6e those of 16 chips."""
    if kind == "TPU v5":
        return [all(n % 4 == 0 for n in shape)] * len(shape)
    return [n == 16 for n in shape]


def span(kind: str, group: np.ndarray, shape: Sequence[int]) -> Span:
    """group: coordinates [n,3] of chips at even distances in a slice of this shape."""
    links = hops = mean = 0.0
    for axis, (size, ring) in enumerate(zip(shape, wraps(kind, shape))):
        at = np.unique(group[:, axis])
        n = len(at)
        if n == 1:
            continue
        stride = int(at[1] - at[0])
        ring = ring and n * stride == size
        links += (2 if ring else 1) / stride
        hops += stride * (n // 2 if ring else n - 1)
        mean += stride * (n / 4 if ring else (n * n - 1) / (3 * n))
    return Span(links, hops, mean) if links else ALONE


def spans(mesh: Any) -> dict[str, Span]:
    """Of the groups along each axis of a mesh of TPU devices or of one host's GPUs, and along all of them ("all")."""
    devices = mesh.devices
    if devices.flat[0].platform != "tpu":
        require(mesh.size <= GPUS_A_HOST, f"--cases: GPUs must be of one host, {GPUS_A_HOST} at most, got {mesh.size}")
        sizes = {"all": mesh.size, **mesh.shape}
        return {name: Span(1.0, n - 1, 1.0) if n > 1 else ALONE for name, n in sizes.items()}
    coords = np.array([device.coords for device in devices.flat])
    kind, shape = devices.flat[0].device_kind, coords.max(0) + 1
    groups, grid = {"all": coords}, coords.reshape(*devices.shape, -1)
    for axis, name in enumerate(mesh.axis_names):
        others = [0 if other != axis else slice(None) for other in range(devices.ndim)]
        groups[name] = grid[tuple(others)]
    return {name: span(kind, group, shape) for name, group in groups.items()}


def axis_of(size: int, distance: int, mesh: Mapping[str, int]) -> str:
    """Which axis of a mesh {"data": n, "model": m} a group of `size` devices at this distance lies along."""
    if size == math.prod(mesh.values()):
        return "all"
    between = 1  # neighbours along an axis
    for name, n in reversed(mesh.items()):
        if n == size and between == distance:
            return name
        between *= n
    return "data"


def sending(groups: Mapping[tuple[str, int, int], Sequence[float]], mesh: Mapping[str, int], spans, rate: float):
    """Seconds of collectives (`Cost.groups`) of a program on one device, links of `rate` bytes/s."""
    seconds = 0.0
    for (kind, size, distance), (count, sent) in groups.items():
        if kind == "collective-permute":  # to one other chip, over one link
            seconds += sent / rate + count * HOP_SECONDS
            continue
        way = spans[axis_of(size, distance, mesh)]
        distance = max(1.0, way.mean_hops) if kind == "all-to-all" else 1.0
        seconds += sent * distance / (way.links * rate)
        seconds += count * way.hops * HOP_SECONDS * (2 if kind == "all-reduce" else 1)
    return seconds


def bounds(operations: float, kernels: float, links: float) -> dict[str, float]:
    """The seconds of a program, of its parts and in all."""
    parts = {"operations": operations, "attention_kernels": kernels, "links": links}
    return parts | {"at_least": max(operations + kernels, links), "at_most": operations + kernels + links}


def attention_flops(model: GPTConfig, T: int, rows: int, products: int) -> float:
    """Of `products` products over all visible pairs of one document a row."""
    pairs = sum(sum(min(t, w if w >= 0 else T) + 1 for t in range(T)) for w in model.windows)
    return 2.0 * products * pairs * rows * model.n_head * model.head_dim


def head_split(model: GPTConfig, mesh: Mapping[str, int]) -> int:
    """Devices that share the heads of a row in the attention kernels."""
    return mesh["model"] if model.n_kv_head % mesh["model"] == 0 else 1


def provenance() -> dict[str, Any]:
    """Where a line comes from."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu") if find_spec(name)}
    return {"versions": versions, "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv)}


def append(path: Path, line: dict[str, Any]) -> None:
    """A line of JSON at the end of a file, on a line of its own also behind one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as f:
        f.seek(max(0, f.tell() - 1))
        cut_off = f.read(1) not in (b"", b"\n")
        f.write((b"\n" if cut_off else b"") + json.dumps(line).encode() + b"\n")
