"""Compile splash attention for TPUs that are not there, and print a JSON line for each. A process of its own: libtpu
reads the environment once, and takes over signals.

python -m tests.tpu_compiler v5e:1x1 v6e:2x2
"""

import json
import os
import sys

os.environ.pop("XLA_FLAGS", None)
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.attention import AttentionShapes, attention, choose_attention_backend


def spec(mesh, shape, dtype=jnp.bfloat16, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def chosen(topology: str, spec_of_mesh: str) -> dict:
    """What `choose_attention_backend` makes of packed bfloat16 rows of 2048 tokens, and of others that no tile divides.

    Few heads: the more there are, the longer the compiler takes."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = make_mesh(spec_of_mesh, devices)
    # A trial's arrays, which nobody looks at here: threefry's bits cut up over data and model take the compiler three
    # times as long as all of the attention. One device compiles them as users do.
    jax.config.update("jax_default_prng_impl", "threefry2x32" if mesh.size == 1 else "rbg")
    name, why = choose_attention_backend("auto", mesh, "bfloat16", AttentionShapes(4, 2, 128, (512, 2048), 2048))
    small, _ = choose_attention_backend("auto", mesh, "bfloat16", AttentionShapes(2, 2, 64, (-1,), 300))
    return {"topology": topology, "kind": devices[0].device_kind, "name": name, "why": why, "small": small}


def prefill(topology: str) -> dict:
    """As the engine calls it: every device alone, inside of a shard_map."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = make_mesh("", devices)
    rows = P(("data", "model"))

    def local(q, k, v, k_start):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return attention(q, k, v, k_start, impl="splash")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    q, k_start = (
        spec(mesh, shape, dtype, ("data", "model"))
        for shape, dtype in (
            ((2 * mesh.size, 48, 4, 64), jnp.bfloat16),
            ((2 * mesh.size, 48), jnp.int32),
        )
    )
    text = jax.jit(mapped).lower(q, q, q, k_start).compile().as_text()
    return {"topology": "prefill", "kernels": text.count("tpu_custom_call"), "collectives": text.count("all-gather")}


if __name__ == "__main__":
    for topology, mesh in zip(sys.argv[1::2], sys.argv[2::2]):
        print(json.dumps(chosen(topology, mesh)), flush=True)
    print(json.dumps(prefill("v5e:2x2")), flush=True)
