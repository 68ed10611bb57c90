"""Muon's parts by themselves; whole steps of it are in test_groups.py and tests/golden/test_optimizer.py."""

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.optim.muon import orthogonalize, reduce_variance


def test_orthogonalized_matrices_have_singular_values_near_one():
    for shape in ((24, 60), (60, 24)):  # a square random matrix may have one near zero, which five iterations leave
        X = jax.jit(orthogonalize)(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
        values = np.linalg.svd(X, compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.4
        np.testing.assert_allclose(np.linalg.norm(X), 24**0.5, rtol=1e-5)


def test_the_iteration_multiplies_in_the_compute_type():
    """Else an accelerator multiplies float32 matrices, at a fraction of its rate; nanochat iterates in bfloat16."""
    for dtype in (jnp.bfloat16, jnp.float32):
        program = jax.make_jaxpr(orthogonalize)(jnp.ones((3, 16, 8), dtype))
        (loop,) = (equation.params for equation in program.eqns if equation.primitive.name == "scan")
        products = [eqn.invars[0].aval.dtype for eqn in loop["jaxpr"].eqns if "dot_general" in str(eqn)]
        assert loop["length"] == 5 and len(products) == 3 and set(products) == {jnp.dtype(dtype)}
        assert str(program).count("dot_general[") == 3  # and none outside of the loop
    U = jax.random.normal(jax.random.key(0), (16, 8))
    rounded = orthogonalize(U.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, orthogonalize(U), atol=0.05)


def test_a_zero_gradient_changes_nothing_but_the_decay():
    assert not np.asarray(jax.jit(orthogonalize)(np.zeros((4, 6), np.float32))).any()
    zeros = np.zeros((1, 4, 6), np.float32), np.zeros((1, 1, 6), np.float32)
    X = np.asarray(jax.jit(reduce_variance)(*zeros, 0.9)[0])
    assert not X.any() and np.isfinite(X).all()


def test_variance_reduction_keeps_the_norm():
    X = np.random.default_rng(0).standard_normal((2, 5, 9)).astype(np.float32)
    Y, second = jax.jit(reduce_variance)(X, np.ones((2, 1, 9), np.float32), 0.9)
    np.testing.assert_allclose(np.linalg.norm(Y, axis=(1, 2)), np.linalg.norm(X, axis=(1, 2)), rtol=1e-5)
    assert second.shape == (2, 1, 9)
