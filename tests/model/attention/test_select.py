"""Who decides which attention runs, what it says, and that a kernel works under a mesh.

Run: python -m pytest tests/model/attention/test_select.py
"""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from nanochat_jax import eval as eval_stage
from nanochat_jax.cli.device import choose_attention
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.attention import (
    NAMES,
    AttentionShapes,
    attention,
    check_attention_backend,
    choose_attention_backend,
    select,
)
from nanochat_jax.model.attention.sharded import sharded
from nanochat_jax.model.attention.splash import splash
from nanochat_jax.model.gpt import abstract_gpt
from tests.support import tiny

SHAPES = AttentionShapes.of(tiny.CONFIG, 64)
ONE = make_mesh("data=1")


def machine(platform, kind, capability=""):
    """A mesh of one device that is not there."""
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    return SimpleNamespace(devices=np.array([[device]]), shape={"data": 1, "model": 1})


A100 = machine("gpu", "NVIDIA A100-SXM4-40GB", "8.0")
V100 = machine("gpu", "Tesla V100-SXM2-16GB", "7.0")


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_a_cpu_takes_the_blocks_of_xla_without_a_warning_as_it_has_no_kernel():
    assert choose_attention_backend("auto", ONE, "float32", SHAPES) == ("chunked", None)


def test_a_gpu_before_ampere_takes_the_blocks_of_xla_and_says_what_would_be_needed():
    name, why = choose_attention_backend("auto", V100, "bfloat16", SHAPES)
    assert name == "chunked"
    assert why.startswith("mosaic_gpu needs a Hopper GPU (H100, H200), this is Tesla V100-SXM2-16GB; triton needs ")
    assert "compute capability 8.0 or newer, this is Tesla V100-SXM2-16GB: attention runs in blocks of plain" in why


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "10.0", "12.0", "9.0"])
def test_a_kernel_that_other_gpus_have_is_no_reason_for_a_warning(monkeypatch, capability):
    monkeypatch.setattr(select, "refuses", lambda *_: None)
    expected = "mosaic_gpu" if capability == "9.0" else "triton"
    assert choose_attention_backend("auto", machine("gpu", "a GPU", capability), "bfloat16", SHAPES) == (expected, None)


def test_a_gpu_of_another_maker_has_no_compute_capability():
    assert "triton needs a" in select.device_refuses("triton", machine("gpu", "MI300X", "gfx942").devices[0, 0], True)


def test_what_is_asked_for_by_name_needs_no_reason():
    for name in ("reference", "chunked"):
        assert choose_attention_backend(name, A100, "bfloat16", SHAPES) == (name, None)


@pytest.mark.parametrize(
    ("wanted", "mesh", "packed", "said"),
    [
        ("splash", ONE, True, "--attention=splash cannot be used: splash needs a TPU, this is a CPU"),
        ("mosaic_gpu", ONE, True, "--attention=mosaic_gpu cannot be used: mosaic_gpu needs a GPU, this is a CPU"),
        ("mosaic_gpu", A100, True, "mosaic_gpu needs a Hopper GPU .*, this is NVIDIA A100"),
        ("triton", V100, True, "triton needs an NVIDIA GPU of compute capability 8.0 or newer, this is Tesla V100"),
        ("cudnn", A100, True, "cudnn takes one document a row, .*--no-document-mask"),
        ("magic", ONE, True, "--attention must be auto, reference, .* or cudnn, got 'magic'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(wanted, mesh, packed, said):
    with pytest.raises(ValueError, match=said):
        check_attention_backend(wanted, mesh, packed=packed)
    with pytest.raises(ValueError, match=said):
        choose_attention_backend(wanted, mesh, "bfloat16", SHAPES, packed=packed)


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("mosaic_gpu", "float32", "float32"),
        ("triton", "float8_e4m3fn", "triton takes bfloat16, float16 or float32, got float8_e4m3fn"),
        ("cudnn", "float32", "cudnn takes bfloat16, this is float32"),
        ("splash", "float16", "splash takes bfloat16 or float32, this is float16"),
    ],
)
def test_kernels_refuse_the_types_that_they_do_not_take(name, dtype, said):
    assert said in select.shape_refuses(name, ONE, dtype, AttentionShapes(4, 2, 64, (-1,), 128))


def test_a_kernel_is_asked_about_a_devices_share_of_the_heads():
    seen = []
    mesh = SimpleNamespace(shape={"data": 2, "model": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat_jax.model.attention.splash.splash_refuses", lambda *args: seen.append(args))
        for shapes in (AttentionShapes(8, 4, 64, (-1,), 128), AttentionShapes(3, 1, 64, (-1,), 128)):
            select.shape_refuses("splash", mesh, "bfloat16", shapes)
    assert [(shape, kv_heads) for shape, kv_heads, _ in seen] == [((1, 128, 4, 64), 2), ((1, 128, 3, 64), 1)]


def take_splash_for_a_kernel_of_cpus(monkeypatch):
    monkeypatch.setitem(select.BACKENDS, "splash", select.BACKENDS["splash"]._replace(platform="cpu"))


def test_a_kernel_that_does_not_compile_falls_back_with_a_warning(monkeypatch):
    """Splash on a CPU that is taken for a TPU: its compiler refuses."""
    take_splash_for_a_kernel_of_cpus(monkeypatch)
    lines = []
    how = {"mesh": ONE, "dtype": jnp.float32, "log": lines.append}
    assert choose_attention("auto", tiny.CONFIG, 64, **how) == "chunked"
    (text,) = lines
    assert text.startswith("WARNING: attention is chunked: splash does not compile for this cpu (ValueError: ")
    assert text.endswith("plain XLA (exact, but slower)")
    with pytest.raises(ValueError, match="--attention=splash cannot be used: splash does not compile"):
        choose_attention("splash", tiny.CONFIG, 64, **how)
    assert len(lines) == 1


def test_a_library_that_is_missing_falls_back_with_a_warning(monkeypatch):
    take_splash_for_a_kernel_of_cpus(monkeypatch)
    monkeypatch.setitem(sys.modules, "nanochat_jax.model.attention.splash", None)
    name, why = choose_attention_backend("auto", ONE, "float32", SHAPES)
    assert name == "chunked" and "splash does not compile for this cpu (ModuleNotFoundError: " in why


@pytest.mark.parametrize(("factor", "chosen"), [(1.0, "splash"), (1.1, "chunked"), (np.nan, "chunked")])
def test_a_kernel_must_give_the_values_of_the_definition_where_it_can_be_run(monkeypatch, factor, chosen):
    take_splash_for_a_kernel_of_cpus(monkeypatch)
    monkeypatch.setattr(
        "nanochat_jax.model.attention.splash.splash", lambda *args: factor * splash(*args, interpret=True)
    )
    monkeypatch.setattr(select.timing, "time_backends", lambda attends, *_: dict.fromkeys(attends, 1.0))
    name, why = choose_attention_backend("auto", ONE, "float32", SHAPES)
    assert name == chosen
    assert (why is None) == (chosen == "splash")
    assert why is None or "splash gives other values than plain XLA on this cpu (error " in why


def test_cudnn_is_only_taken_for_single_documents_and_without_training(monkeypatch):
    monkeypatch.setattr(select, "refuses", lambda name, *_: None if name == "cudnn" else f"no {name}")
    for packed, training in ((True, True), (False, True), (True, False)):
        name, why = choose_attention_backend("auto", A100, "bfloat16", SHAPES, packed=packed, training=training)
        assert name == "chunked" and why.endswith(
            "no triton: attention runs in blocks of plain XLA (exact, but slower)"
        )
    assert choose_attention_backend("auto", A100, "bfloat16", SHAPES, packed=False, training=False) == (
        "cudnn",
        "no triton: cudnn is used",
    )


def test_a_stage_refuses_before_it_looks_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="--attention=splash cannot be used: splash needs a TPU"):
        eval_stage.main(eval_stage.EvalConfig(attention="splash", device_type="cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# From the choice to the call


def kernels_of(**how):
    """How many Pallas kernels the forward pass of the model has."""
    graphdef, params = abstract_gpt(tiny.CONFIG, **how)

    def run(params, ids):
        return nnx.merge(graphdef, params).hidden(ids)[0]

    return str(jax.make_jaxpr(run)(params, jax.ShapeDtypeStruct((2, 64), jnp.int32))).count("pallas_call[")


def test_the_model_calls_the_backend_that_it_was_made_with():
    assert kernels_of(attention="splash") == tiny.CONFIG.n_layer
    assert kernels_of() == 0


def test_a_backend_is_a_module_and_a_row_of_the_table(monkeypatch):
    name = "nanochat_jax.model.attention.doubled"
    module = SimpleNamespace(doubled=lambda *arrays: 2 * select.backend("reference")(*arrays))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(select.BACKENDS, "doubled", select.Backend("doubled"))
    q, k, v, k_start = draw(4, 4, 2)
    with jax.set_mesh(make_mesh("data=2,model=2")):
        got, want = (attention(q, k, v, k_start, impl=impl) for impl in ("doubled", "reference"))
    np.testing.assert_allclose(got, 2 * want, atol=1e-5)


def test_kernels_are_not_imported_before_they_are_used():
    kernels = "('splash', 'hopper', 'attention.triton')"
    code = f"import sys, nanochat_jax.model.gpt; print([m for m in sys.modules if m.endswith({kernels})])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_attention_of_an_unknown_name_is_an_error_that_names_the_others():
    with pytest.raises(ValueError, match=f"must be one of {', '.join(NAMES)}, got 'magic'"):
        select.backend("magic")


# ---------------------------------------------------------------------------------------------------------------------
# Under a mesh


def draw(B, N, K, T=40, H=16):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    k_start = np.maximum.accumulate(np.where(rng.random((B, T)) < 0.1, np.arange(T), 0), -1)
    return q, k, v, k_start.astype(np.int32)


def gradients(attend, q, k, v, k_start):
    """[y, dq, dk, dv]"""
    y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, k_start, 0.3, -1), q, k, v)
    return [y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))]


@pytest.mark.parametrize(
    ("B", "N", "K", "share"),
    [
        (4, 4, 2, ((1, 40, 2, 16), (1, 40, 1, 16))),
        (8, 6, 6, ((2, 40, 3, 16), (2, 40, 3, 16))),
        (3, 4, 2, ((3, 40, 2, 16), (3, 40, 1, 16))),  # rows that the devices do not divide
        (4, 3, 1, ((1, 40, 3, 16), (1, 40, 1, 16))),  # one kv head for two devices
    ],
)
def test_under_a_mesh_a_kernel_gets_a_devices_rows_and_heads(B, N, K, share):
    arrays, seen = draw(B, N, K), set()

    def kernel(q, k, v, k_start, scale, window):
        seen.add((q.shape, k.shape))
        assert k_start.shape == q.shape[:2] and (scale, window) == (0.3, -1)
        return select.backend("chunked")(q, k, v, k_start, scale, window)

    expected = jax.jit(partial(gradients, select.backend("reference")))(*arrays)
    with jax.set_mesh(make_mesh("data=4,model=2")):
        got = jax.jit(partial(gradients, sharded(kernel)))(*arrays)
    assert seen == {share}
    for y, want in zip(got, expected):
        np.testing.assert_allclose(y, want, atol=2e-5)


def test_splash_runs_under_a_mesh():
    arrays = draw(4, 4, 2)
    expected = jax.jit(partial(gradients, select.backend("reference")))(*arrays)
    with jax.set_mesh(make_mesh("data=2,model=2")):
        got = jax.jit(partial(gradients, sharded(partial(splash, interpret=True))))(*arrays)
    for y, want in zip(got, expected):
        np.testing.assert_allclose(y, want, atol=2e-5)


def test_without_a_mesh_and_where_a_device_is_alone_the_kernel_is_called_as_it_is():
    arrays, mesh, seen = draw(4, 4, 2), make_mesh("data=4,model=2"), []

    def kernel(q, k, v, k_start, scale, window):
        seen.append(q.shape)
        return q

    def alone(*arrays):  # as the engine's programs do
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return sharded(kernel)(*arrays, 0.3, -1)

    sharded(kernel)(*arrays, 0.3, -1)
    with jax.set_mesh(make_mesh("data=1")):
        jax.jit(lambda *arrays: sharded(kernel)(*arrays, 0.3, -1))(*arrays)
    rows = P(("data", "model"))
    mapped = jax.shard_map(alone, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    with jax.set_mesh(mesh):
        jax.jit(mapped)(*(np.concatenate([x, x]) for x in arrays))
    assert seen == [(4, 40, 4, 16), (4, 40, 4, 16), (1, 40, 4, 16)]


# ---------------------------------------------------------------------------------------------------------------------
# Lowered for machines that are not there


@pytest.mark.parametrize(
    ("impl", "platform", "kernel"),
    [
        ("reference", "cuda", ""),
        ("reference", "tpu", ""),
        ("chunked", "cuda", ""),
        ("chunked", "tpu", ""),
        ("splash", "tpu", "tpu_custom_call"),
        ("mosaic_gpu", "cuda", "mosaic_gpu"),
        ("triton", "cuda", "xla.gpu.triton"),
        ("cudnn", "cuda", "cudnn$fmha"),
    ],
)
@pytest.mark.parametrize("window", [-1, 128])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_every_backend_is_lowered_with_its_gradients(monkeypatch, impl, platform, kernel, window):
    if impl == "cudnn":  # it asks the library for its version; the one here is nowhere
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k = (jax.ShapeDtypeStruct((2, 300, n, 64), jnp.bfloat16) for n in (4, 2))

    def loss(q, k, v, k_start):
        return attention(q, k, v, k_start, window=window, impl=impl).astype(jnp.float32).sum()

    f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    k_start = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    # Triton wants to know the GPU
    a100 = AbstractDevice(device_kind=A100.devices[0, 0].device_kind, num_cores=108, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=a100) if impl == "triton" else AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(mesh):
        text = f.trace(q, k, k, k_start).lower(lowering_platforms=(platform,)).as_text()
    assert kernel in text and ("custom_call" in text) >= bool(kernel)
