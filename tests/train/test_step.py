"""The train step: the same numbers on any devices and any split of the batch, and nothing learnt from a NaN."""

import functools
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nanochat_jax.distributed.collectives import replicated_parameters
from nanochat_jax.distributed.mesh import choose_replicas, make_mesh
from nanochat_jax.distributed.sharding import PARAM_SPECS, map_by_path, param_shardings, path_name, to_global
from nanochat_jax.model.gpt import abstract_gpt
from nanochat_jax.optim.groups import default_groups, make_optimizer
from nanochat_jax.train.step import abstract_state, init_state, make_train_step, place, random_state
from tests.support.models import DESCENT, random_batch, random_params, tiny_config

# Without backout, which with two layers has no gradient but rounding, and Adam would follow that.
CONFIG = tiny_config(n_layer=2, windows=(7, -1), backout=False)
GROUPS = default_groups(64, embedding_lr=0.1, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.1)


ODD = tiny_config(n_layer=2, windows=(7, -1), backout=False, n_embd=60, n_head=3, n_kv_head=3)  # no mesh divides it


@functools.cache  # compiling takes seconds: tests share their steps
def build(spec, replicate, tx=None, model=CONFIG, **options):
    tx, mesh = tx or make_optimizer(GROUPS), make_mesh(spec, n_embd=model.n_embd)
    with jax.set_mesh(mesh):
        like = abstract_state(model, tx, mesh, replicate)
        return tx, mesh, like, make_train_step(model, tx, like, mesh, **options)


def run(batches, spec="data=1", replicate=False, model=CONFIG, **options):
    """Losses, last metrics and final state of a few steps."""
    tx, mesh, like, step = build(spec, replicate, model=model, **options)
    with jax.set_mesh(mesh), replicated_parameters(replicate):
        state, losses, compiled = place(init_state(random_params(model), tx), like), [], None
        for batch in batches:
            state, metrics = step(state, to_global(batch, mesh), np.float32(1.0), np.float32(0.9))
            losses.append(float(metrics.loss))
            compiled = compiled or step._cache_size()
        assert step._cache_size() == compiled, "the step was compiled again"
    return losses, metrics, state


def batches(A=1, B=8, count=3):
    return [random_batch(CONFIG, A, B, seed=seed) for seed in range(count)]


def regroup(batch, A):
    return {k: v.reshape(A, -1, v.shape[-1]) for k, v in batch.items()}


def test_the_loss_falls_on_a_repeated_batch():
    losses, _, state = run(batches(count=1) * 8)
    assert losses[-1] < 0.7 * losses[0] and state.step == 8


@functools.cache
def one_device():
    return run(batches(A=2, count=10))


@pytest.mark.parametrize(
    ("spec", "replicate"),
    [
        ("data=8", False),
        ("data=8", True),
        ("data=4,model=2", False),
        ("data=1,model=8", False),
        ("replica=2,data=2,model=2", False),
    ],
)
def test_eight_devices_train_like_one(spec, replicate):
    alone = one_device()
    compiled_step(spec, replicate)  # before it runs, to see what the compiler says
    together = run(batches(A=2, count=10), spec, replicate)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(together[1].grad_norm, alone[1].grad_norm, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiled step sends


@functools.cache
def compiled_step(spec, replicate=False, model=CONFIG):
    """(text of the step that `run` takes for two passes on this mesh, what the compiler wrote to stderr)."""
    _, mesh, like, step = build(spec, replicate, model=model)
    batch = to_global(random_batch(model, 2), mesh)
    with jax.set_mesh(mesh), replicated_parameters(replicate), tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            text = step.lower(like, batch, np.float32(1.0), np.float32(0.9)).compile().as_text()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        return text, said.read().decode()


def collectives(text):
    """(kind, elements of the largest result, where it comes from) of every collective of a compiled module."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", line)
        if match:
            sizes = [
                int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", match[1])
            ]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], max(sizes), name[1] if name else ""))
    return found


def block_matrices(model):
    """Elements of each matrix of attention and MLP."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_gpt(model)[1]["blocks"])
    return [leaf.size for path, leaf in leaves if path_name(path).split("/")[-1].startswith("c_")]


@pytest.mark.parametrize("spec", ["data=8", "data=4,model=2"])
def test_the_compiled_step_gathers_weights_scatters_their_gradients_and_never_holds_a_whole_one(spec):
    text, said = compiled_step(spec)
    found, model = collectives(text), make_mesh(spec).shape["model"]
    matrices = block_matrices(CONFIG)
    matrix = min(matrices) // model  # the smallest, as the model axis leaves it
    scattered = [size for _, size, name in found if "transpose" in name and "shard_map/reduce_scatter" in name]
    assert sorted(scattered) == sorted(size // 8 for size in matrices)
    gathers = [(name, size) for kind, size, name in found if kind == "all-gather" and size >= matrix]
    weights = [name for name, _ in gathers if "gathered" in name]
    assert len(weights) == 2 * len(scattered), "each matrix, for the forward and for the backward pass"
    if model == 1:  # a model axis cuts up activations too, and those are put together
        lm_head = "jit(train_step)/while/body/jvp()/shard_map", CONFIG.padded_vocab * CONFIG.n_embd
        moments = "jit(train_step)/shard_map/all_gather", 8 * 4 * CONFIG.n_embd  # Muon's second ones, 8 rows of them
        assert {found for found in gathers if found[0] not in weights} == {lm_head, moments}
        reduced = [name for kind, size, name in found if kind == "all-reduce" and size >= matrix]
        assert not reduced, "what is summed over the devices is scattered"
    sent = [size for kind, size, _ in found if kind == "all-to-all"]
    assert max(sent) <= 8 * max(matrices) // model, "of the matrices that Muon works on, a device has its share"
    assert "Involuntary full rematerialization" not in said


def test_whole_copies_are_neither_cut_up_nor_gathered():
    found = collectives(compiled_step("data=8", replicate=True)[0])
    large = {(kind, name) for kind, size, name in found if size >= min(block_matrices(CONFIG))}
    assert not any("gathered" in name or kind == "reduce-scatter" for kind, name in large), large
    assert any(kind == "all-reduce" for kind, _ in large), "gradients are summed"


def test_between_replicas_only_parts_of_gradients_are_summed():
    assert dict(build("", False, model=ODD)[1].shape) == {"replica": 2, "data": 4, "model": 1}
    found, matrices = collectives(compiled_step("", model=ODD)[0]), block_matrices(ODD)
    part = max(matrices) // 4  # what a device holds of the largest
    reduced = [size for kind, size, name in found if kind == "all-reduce" and "lm_head" not in name]
    assert part in reduced and max(reduced) <= part, reduced
    scattered = [size for _, size, name in found if "transpose" in name and "shard_map/reduce_scatter" in name]
    assert sorted(scattered) == sorted(size // 4 for size in matrices)
    weights = [name for kind, _, name in found if kind == "all-gather" and "gathered" in name]
    assert len(weights) == 2 * len(scattered)


@functools.cache
def losses_of_odd(spec):
    compiled_step(spec, model=ODD)
    return run([random_batch(ODD, 2, seed=seed) for seed in range(4)], spec, model=ODD)[0]


@pytest.mark.parametrize("spec", ["data=8", "data=4,model=2", ""])
def test_a_width_that_no_axis_divides_trains_as_on_one_device(spec):
    np.testing.assert_allclose(losses_of_odd(spec), losses_of_odd("data=1"), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, numbers that are none, and the state


def test_accumulation_does_not_change_the_numbers():
    whole = run(batches(A=1))
    split = run([regroup(batch, 2) for batch in batches(A=1)])
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-5)


def test_the_mean_per_micro_batch_weighs_micro_batches_alike():
    batch = batches(A=2, count=1)
    batch[0]["weights"][0, 1:] = 0  # few trained tokens in the first
    (loss,), metrics, _ = run(batch, tx=DESCENT, per_micro_batch=True)
    alone = [run([{k: v[i : i + 1] for k, v in batch[0].items()}])[0][0] for i in range(2)]
    np.testing.assert_allclose(metrics.micro_losses, alone, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(alone), rtol=1e-5)
    assert abs(run(batch)[0][0] - loss) > 1e-4  # the global mean is another number


def test_a_batch_without_a_trained_token_costs_nothing():
    empty = batches(count=1)
    empty[0]["weights"][:] = 0
    losses, metrics, _ = run(empty)
    assert losses == [0.0] and metrics.ok == 1 and metrics.tokens == 0


def test_padding_at_the_end_changes_no_number_and_log_probabilities_are_those_before_the_update():
    (full,) = batches(A=2, count=1)
    padded = {name: np.concatenate([leaf, np.zeros_like(leaf)]) for name, leaf in full.items()}
    losses, metrics, state = run([full], tx=DESCENT, logprobs=True)
    others, more, other = run([padded], tx=DESCENT, logprobs=True)
    assert others == losses and more.tokens == metrics.tokens
    logp, weights = np.asarray(metrics.logprobs), full["weights"]
    np.testing.assert_array_equal(np.asarray(more.logprobs), np.concatenate([logp, np.zeros_like(logp)]))
    assert losses[0] == pytest.approx(-np.sum(weights * logp) / weights.sum(), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, other.params)


def test_a_step_that_is_not_finite_changes_no_parameter_and_is_counted():
    good, bad = batches(count=1)[0], batches(count=1)[0]
    bad["weights"][0, 0, 0] = np.inf
    before = run([good])[2]
    _, metrics, after = run([good, bad, bad])
    assert metrics.ok == 0 and after.bad_steps == 2 and after.step == 3
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert run([good, bad, good])[2].bad_steps == 0


def test_a_step_outside_its_mesh_is_refused():
    _, mesh, like, step = build("data=8", False)
    with pytest.raises(ValueError, match=r"jax\.set_mesh"):
        step.lower(like, to_global(batches(A=2, count=1)[0], mesh), np.float32(1.0), np.float32(0.9))


def test_the_new_state_takes_the_memory_of_the_old_one():
    _, mesh, like, step = build("data=1", False)
    with jax.set_mesh(mesh):
        batch = to_global(batches(A=1, count=1)[0], mesh)
        memory = step.lower(like, batch, np.float32(1.0), np.float32(0.9)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))


def test_two_runs_are_equal_bit_for_bit_on_eight_devices():
    first, second = (run(batches(A=2), "data=4,model=2")[2] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_large_leaves_are_sharded_and_their_optimizer_state_with_them():
    state = run(batches(A=2, count=1), "data=4,model=2")[2]
    w = state.params["blocks"][0]["mlp"]["c_fc"]
    assert w.sharding.spec == P("model", "data") and w.addressable_shards[0].data.size == w.size // 8
    momentum = state.opt_state.inner_states["matrix"].inner_state[0].momentum["blocks"][0]["mlp"]["c_fc"]
    assert momentum.sharding == w.sharding


def test_every_parameter_has_a_rule_and_an_unknown_one_is_named():
    specs = map_by_path(random_params(CONFIG), PARAM_SPECS)
    assert specs["wte"] == P("model", "data")
    with pytest.raises(ValueError, match="'odd/one'"):
        param_shardings({"odd": {"one": jnp.zeros(3)}}, make_mesh("data=8"))


def test_a_mesh_that_cannot_be_built_is_refused():
    for spec in ("data=3,model=4", "rows=2", "data=x", "data=0", "data=1,data=2", "replica=0", "replica=3,data=4"):
        with pytest.raises(ValueError, match="--mesh"):
            make_mesh(spec)
    assert dict(make_mesh("model=2").shape) == {"data": 4, "model": 2}
    assert dict(make_mesh("replica=2").shape) == {"replica": 2, "data": 4, "model": 1}


def test_a_mesh_is_chosen_by_the_width_where_it_is_not_given():
    def shape(n_embd, spec=""):
        return dict(make_mesh(spec, n_embd=n_embd).shape)

    assert shape(64) == shape(None) == {"data": 8, "model": 1}
    assert shape(60) == {"replica": 2, "data": 4, "model": 1}
    assert shape(60, "model=2") == {"data": 4, "model": 2}
    assert shape(62, "model=2") == {"replica": 2, "data": 2, "model": 2}
    assert shape(60, "data=8") == {"data": 8, "model": 1}, "what is asked for is not changed"
    assert shape(60, "replica=4") == {"replica": 4, "data": 2, "model": 1}


@pytest.mark.parametrize(
    ("n_embd", "devices", "expected"),
    [
        *((1280, 8, (1, 8)), (2176, 8, (1, 8)), (768, 6, (1, 6)), (1280, 32, (1, 32))),
        *((63, 8, (8, 1)), (4, 8, (8, 1)), (32, 8, (2, 4)), (512, 6, (3, 2)), (1, 1, (1, 1))),  # equal parts of 8
        *((1280, 64, (2, 32)), (1280, 256, (2, 128)), (2176, 256, (2, 128)), (1664, 1024, (8, 128))),
    ],
)
def test_the_parts_of_a_matrix_are_as_many_as_suit_its_width(n_embd, devices, expected):
    assert choose_replicas(n_embd, devices) == expected


def test_an_array_of_another_shape_is_named():
    tx, mesh = make_optimizer(GROUPS), make_mesh("data=1")
    like = abstract_state(CONFIG, tx, mesh)
    params = random_params(CONFIG)
    params["wte"] = params["wte"][:5]
    with pytest.raises(ValueError, match="wte must have shape"):
        place(params, like.params)


def test_bfloat16_compute_trains_float32_weights():
    losses, _, state = run(batches(count=1) * 6, tx=DESCENT, dtype=jnp.bfloat16)
    assert losses[-1] < 0.8 * losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_scalars_reach_the_optimizer_by_the_names_that_were_given():
    scheduled = ("lr_multiplier", "muon_momentum", "decay_multiplier")
    tx, mesh, like, step = build("data=1", False, scheduled=scheduled)
    with jax.set_mesh(mesh):
        batch, ends = to_global(batches(count=1)[0], mesh), []
        for decay in (1.0, 0.0):
            state = place(init_state(random_params(CONFIG), tx), like)
            ends.append(step(state, batch, np.float32(1.0), np.float32(0.9), np.float32(decay))[0].params)
    plain = run(batches(count=1))[2].params
    same = [jax.tree.map(lambda a, b: bool((a == b).all()), plain, end) for end in ends]
    assert same[0]["blocks"][0]["mlp"]["c_fc"] and not same[1]["blocks"][0]["mlp"]["c_fc"] and same[1]["wte"]


def test_an_untrained_model_is_the_same_on_every_mesh():
    states = []
    for spec in ("data=1", "data=8", "data=4,model=2"):
        tx, mesh, like, _ = build(spec, False)
        with jax.set_mesh(mesh):
            states.append(random_state(CONFIG, tx, like, seed=5))
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    first = states[0]
    assert first.step == 0 and not np.asarray(first.params["blocks"][0]["attn"]["c_proj"]).any()
    assert 0.7 < np.asarray(first.params["wte"]).std() < 0.9
    with jax.set_mesh(make_mesh("data=1")):
        tx, _, like, _ = build("data=1", False)
        other = random_state(CONFIG, tx, like, seed=6)
    assert (np.asarray(other.params["wte"]) != np.asarray(first.params["wte"])).mean() > 0.99
