"""The train step, written once: SFT, RL and pretraining differ in `token_loss` and in their batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from nanochat_jax.checkpoints import store
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.distributed.sharding import (
    batch_sharding,
    fit_spec,
    flatten_by_path,
    param_shardings,
    path_name,
    replicated,
)
from nanochat_jax.model.gpt import GPT, GPTConfig, abstract_gpt
from nanochat_jax.model.loss import NO_LIMITS, Limits, summed_token_loss, weighted_nll
from nanochat_jax.optim.groups import state_arrays, with_state_arrays


class TrainState(NamedTuple):
    """Everything on the device that the next step depends on."""

    step: Any  # int32: batches seen, also those whose update was skipped
    params: Any  # nested dict of float32
    opt_state: Any
    bad_steps: Any  # int32: updates skipped in a row, because loss or gradient was not finite


class StepMetrics(NamedTuple):
    """What a train step tells of itself, float32."""

    loss: Any  # scalar
    micro_losses: Any  # [A]
    grad_norm: Any  # scalar, of the gradient before the optimizer
    tokens: Any  # scalar: trained ones in the batch
    ok: Any  # scalar: 0 where the update was skipped because something in it was not finite
    logprobs: Any = None  # [A,B,T]: log p(target) before the update, 0 in micro-batches without weight; None: not asked


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before step 1, with an empty optimizer."""
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))


def random_state(config: GPTConfig, tx: optax.GradientTransformation, like: TrainState, seed: int) -> TrainState:
    """The state before step 1 of an untrained model, on the shardings of the abstract state `like`: the same numbers on
    every mesh, and no device ever holds more than its share of them."""

    def fresh():
        return init_state(nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(seed)))), tx)

    return jax.jit(fresh, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()


def abstract_state(config: GPTConfig, tx: optax.GradientTransformation, mesh: Mesh, replicate: bool = False):
    """TrainState of ShapeDtypeStructs with shardings: what to build, to restore into, or to compile for."""
    params = abstract_gpt(config)[1]
    state = jax.eval_shape(lambda p: init_state(p, tx), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, tx, mesh, replicate),
    )


def state_shardings(state: TrainState, tx, mesh: Mesh, replicate: bool = False) -> TrainState:
    """Parameters by the table in `sharding`; optimizer state follows its parameter, as far as its shape divides."""
    params = param_shardings(state.params, mesh, replicate)

    def masked(x):
        return isinstance(x, optax.MaskedNode)

    def follow(leaf, sharding):
        return leaf if masked(leaf) else fit_spec(sharding.spec, leaf.shape, mesh)

    opt_state = optax.tree.map_params(
        tx, follow, state.opt_state, params, transform_non_params=lambda _: replicated(mesh), is_leaf=masked
    )
    return TrainState(replicated(mesh), params, opt_state, replicated(mesh))


def state_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of a state, as `checkpoints.store` takes it: `params` and `optimizer` (its arrays, and
    the count of skipped updates); the step is the folder's name."""
    optimizer = state_arrays(state.opt_state) | {"bad_steps": state.bad_steps}
    return {"params": flatten_by_path(state.params), "optimizer": optimizer}


def restore_state(folder: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint folder <tag>/<step>, on the shardings of the abstract state `like`."""
    loaded = store.restore(folder, state_items(like))
    params = jax.tree.map_with_path(lambda path, _: loaded["params"][path_name(path)], like.params)
    opt_state = with_state_arrays(like.opt_state, loaded["optimizer"])
    step = jax.device_put(jnp.int32(int(folder.name)), like.step.sharding)
    return TrainState(step, params, opt_state, loaded["optimizer"]["bad_steps"])


def place(arrays: Any, like: Any) -> Any:
    """Host arrays onto the shardings of abstract ones; every process gives the whole of every array.

    ValueError names the leaf whose shape is another."""

    def put(path, array, leaf):
        array = np.asarray(array, leaf.dtype)
        if array.shape != leaf.shape:
            raise ValueError(f"{path_name(path)} must have shape {leaf.shape}, got {array.shape}")
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree.map_with_path(put, arrays, like)


def make_train_step(
    config: GPTConfig,
    tx: optax.GradientTransformationExtraArgs,
    state: TrainState,
    mesh: Mesh,
    *,
    token_loss: Callable = weighted_nll,
    loss_inputs: Sequence[str] | None = None,
    limits: Limits = NO_LIMITS,
    dtype=jnp.float32,
    per_micro_batch: bool = False,
    logprobs: bool = False,
    attention: str = "chunked",
    remat: str = "none",
    scheduled: Sequence[str] = ("lr_multiplier", "muon_momentum"),
):
    """-> jitted train_step(state, batch, *scalars) -> (state, metrics); `state` is donated. To be called under
    jax.set_mesh(mesh), and in `replicated_parameters` where the state is kept so: `Plan.scope` is both.

    scheduled: what the scalars are, names of what the optimizer's `update` takes anew at each step, in their order.
    state: a TrainState, real or abstract, for its shardings, which are pinned on the way in and out (else the
    partitioner may move a weight after step 1, and a resumed run is no longer the same program).
    batch: leaves [A,B,T]: inputs, targets, document_start int32; weights float32 >= 0 (1 where the target is trained);
    and whatever else token_loss(log p(target), aux) reads from aux, which holds all but the first three. loss_inputs:
    their names, where a batch that holds others is to be refused with a ValueError. The weights that the loss sees are
    divided by their sum over all micro-batches and devices, so that the loss, a plain sum, depends on neither (a batch
    with no trained token gives loss 0). per_micro_batch: nanochat's mean of the micro-batches' means instead. limits:
    of the distribution that p is of. Micro-batches without weight at the end cost nothing: a batch may be filled up
    with padding to keep its shape.
    metrics: StepMetrics, its logprobs only where `logprobs` is set.
    """
    graphdef, _ = abstract_gpt(config, dtype, attention)

    def micro_loss(params, micro):
        model = nnx.merge(graphdef, params)
        aux = dict(micro)
        ids, targets, document_start = (aux.pop(name) for name in ("inputs", "targets", "document_start"))
        x, _ = model.hidden(ids, document_start=document_start, remat=remat)
        head, shape = params["lm_head"], {"cap": config.logit_cap, "vocab_size": config.vocab_size}
        return summed_token_loss(token_loss, x, head, targets, aux, **shape, limits=limits)

    loss_and_grads = jax.value_and_grad(micro_loss, has_aux=True)

    def train_step(state: TrainState, batch, *scalars):
        if row_shards() != row_shards(mesh):
            raise ValueError("the train step must be called under jax.set_mesh with the mesh it was made for")
        needed = {"inputs", "targets", "document_start", "weights", *(loss_inputs or ())}
        if loss_inputs is not None and set(batch) != needed:
            raise ValueError(f"a batch must hold {sorted(needed)}, as its plan says, got {sorted(batch)}")
        A = batch["inputs"].shape[0]
        size = jnp.sum(batch["weights"], (1, 2))  # [A]
        total = A * size if per_micro_batch else jnp.broadcast_to(jnp.sum(size), A)
        weights = batch["weights"] / jnp.where(total > 0, total, 1.0)[:, None, None]
        batch = batch | {"weights": weights}

        def accumulate(a, carry):
            total, losses, logp = carry
            (loss, micro_logp), grads = loss_and_grads(state.params, jax.tree.map(lambda b: b[a], batch))
            # else XLA for TPU takes the reduce-scatter out of the loop, and a device adds up whole gradients
            grads = jax.lax.optimization_barrier(grads)
            return jax.tree.map(jnp.add, total, grads), losses.at[a].set(loss), logp.at[a].set(micro_logp)

        if A == 1:
            (loss, logp), grads = loss_and_grads(state.params, jax.tree.map(lambda b: b[0], batch))
            losses, logp = loss[None], logp[None]
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(A), jnp.zeros(weights.shape)
            filled = jnp.max(jnp.where(size != 0, jnp.arange(1, A + 1), 0))
            grads, losses, logp = jax.lax.fori_loop(0, filled, accumulate, zeros)
        loss, grad_norm = jnp.sum(losses), optax.tree.norm(grads)
        now = dict(zip(scheduled, scalars, strict=True))
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **now)
        ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = StepMetrics(
            loss=loss,
            micro_losses=losses * A if per_micro_batch else losses,
            grad_norm=grad_norm,
            tokens=jnp.sum(weights > 0, dtype=jnp.float32),
            ok=ok.astype(jnp.float32),
            logprobs=logp if logprobs else None,
        )
        return TrainState(state.step + 1, params, opt_state, jnp.where(ok, 0, state.bad_steps + 1)), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), *[everywhere] * len(scheduled)),
        out_shardings=(shardings, everywhere),
    )
