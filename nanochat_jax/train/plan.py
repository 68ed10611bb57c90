"""Everything that is compiled for a training run, as one value: what a stage runs, a preflight compiles, a bench times.

A stage makes its `Plan` with one function from its settings and the model's config; nothing else decides what its
train step is. So a preflight cannot differ from the run.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.cli.device import choose_attention, training_dtype
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.collectives import replicated_parameters
from nanochat_jax.distributed.mesh import row_shards
from nanochat_jax.distributed.processes import print0
from nanochat_jax.distributed.sharding import batch_sharding
from nanochat_jax.flags.stage import StageConfig
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.model.loss import NO_LIMITS, Limits, weighted_nll
from nanochat_jax.optim.groups import Groups, make_optimizer
from nanochat_jax.train.remat import choose_remat
from nanochat_jax.train.step import TrainState, abstract_state, make_train_step


class BatchShape(NamedTuple):
    """The shape [A,B,T] of a step's batch, all devices together."""

    micro_batches: int  # A: forward and backward passes, whose gradients are summed
    rows: int  # B: of one pass
    T: int  # tokens of a row

    @property
    def rows_per_step(self) -> int:
        """Rows of all passes together."""
        return self.micro_batches * self.rows

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all passes together, padding included."""
        return self.rows_per_step * self.T


class TokenLoss(NamedTuple):
    """What a token contributes to the loss: function(log p(target) [B,T], leaves of the batch [B,T]) -> float32 [B,T].

    inputs: names of the leaves, float32, that the function reads beside `weights`; the batch must hold exactly these.
    per_micro_batch: average the micro-batches' means, as nanochat's RL does, in place of one mean over all tokens.
    limits: of the distribution that p is of.
    """

    function: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array] = weighted_nll
    inputs: tuple[str, ...] = ()
    per_micro_batch: bool = False
    limits: Limits = NO_LIMITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the compiled programs of a run depend on."""

    model: GPTConfig
    mesh: Mesh
    dtype: Any  # to compute in; parameters are float32
    attention: str  # backend, a name of model.attention
    remat: str  # what the backward pass computes again: none, elementwise or block
    replicate: bool  # whole parameters on every device of the data axis
    batch: BatchShape
    loss: TokenLoss
    scalars: tuple[str, ...]  # what `update` of the optimizer takes anew at each step, by name
    groups: Groups  # the optimizer's learning-rate groups
    logprobs: bool = False  # the train step also returns log p(target)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of these groups and this compute type."""
        return make_optimizer(self.groups, self.dtype)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The train state as ShapeDtypeStructs with shardings."""
        return abstract_state(self.model, self.optimizer, self.mesh, self.replicate)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The leaves [A,B,T] of a batch: inputs, targets, document_start int32; weights and the loss inputs float32."""
        types = dict.fromkeys(("inputs", "targets", "document_start"), jnp.int32)
        types |= dict.fromkeys(("weights", *self.loss.inputs), jnp.float32)
        rows = batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(self.batch, dtype, sharding=rows) for name, dtype in types.items()}

    @property
    def rows_per_device(self) -> int:
        """Rows of a device in one pass."""
        return self.batch.rows // row_shards(self.mesh)

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """While it is entered, the mesh and the way in which parameters are kept are in force."""
        with jax.set_mesh(self.mesh), replicated_parameters(self.replicate):
            yield

    def make_train_step(self) -> Callable:
        """-> train_step(state, batch, scalars) -> (state, metrics): see `train.step.make_train_step`; scalars: a number
        for each of the plan's, by name. To be called in `scope`."""
        step = self._jitted_step()

        def train_step(state, batch, scalars: Mapping[str, float]):
            return step(state, batch, *(np.float32(scalars[name]) for name in self.scalars))

        return train_step

    def compile_train_step(self) -> jax.stages.Compiled:
        """The train step's program, compiled without an array."""
        traced = self.trace_train_step()
        with self.scope():
            return traced.lower().compile()

    def trace_train_step(self) -> jax.stages.Traced:
        """The same, traced only."""
        # Made outside of the scope: the optimizer's state has constants, which no compile-only device can hold.
        state, batch = self.abstract_state, self.abstract_batch
        numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * len(self.scalars)
        with self.scope():
            return self._jitted_step().trace(state, batch, *numbers)

    def _jitted_step(self):
        return make_train_step(
            self.model,
            self.optimizer,
            self.abstract_state,
            self.mesh,
            token_loss=self.loss.function,
            loss_inputs=self.loss.inputs,
            limits=self.loss.limits,
            per_micro_batch=self.loss.per_micro_batch,
            logprobs=self.logprobs,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            scheduled=self.scalars,
        )


def make_plan(
    cfg: StageConfig,
    model: GPTConfig,
    mesh: Mesh,
    *,
    batch: BatchShape,
    loss: TokenLoss,
    scalars: tuple[str, ...],
    groups: Groups,
    packed: bool,
    attention: Mapping[str, str] | None = None,
    logprobs: bool = False,
    log: Callable = print0,
) -> Plan:
    """The plan of a stage with these settings: dtype, attention and rematerialisation are chosen and printed here.

    mesh: of real or compile-only devices. packed: rows hold documents that do not see each other. attention: what the
    checkpoint of a run that goes on records of it. ValueError: a backend that was asked for cannot do it."""
    dtype = training_dtype(cfg.dtype, mesh.devices.flat[0].platform, model.n_embd)
    dtype = jnp.dtype(processes.exchange("the compute type", dtype.name)[0])  # it depends on a machine's processor
    backend = choose_attention(
        cfg.attention,
        model,
        batch.T,
        mesh=mesh,
        dtype=dtype,
        rows=batch.rows // row_shards(mesh),
        packed=packed,
        recorded=attention,
        verbose=cfg.verbose,
        log=log,
    )
    plan = Plan(
        model=model,
        mesh=mesh,
        dtype=dtype,
        attention=backend,
        remat="none",
        replicate=cfg.replicate,
        batch=batch,
        loss=loss,
        scalars=scalars,
        groups=groups,
        logprobs=logprobs,
    )
    remat, why = choose_remat(cfg.remat, model, plan.abstract_state, dtype, plan.rows_per_device, batch.T)
    remat, why = processes.exchange("rematerialisation", [remat, why])[0]  # it depends on a machine's memory
    log(f"{dtype.name}, attention {backend}, rematerialisation {remat} ({why})")
    return dataclasses.replace(plan, remat=remat)
