"""Whole fine-tuning runs of nanochat's own script, step by step with this project's flags, tasks, optimizer and step.

Data come in nanochat's endless stream (rows do not end with an epoch, a conversation that is too long blocks its place)
and the documents of a row see each other; everything else is what `python -m nanochat_jax.sft` runs.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import sft
from nanochat_jax.cli.command_line import parse
from nanochat_jax.data.packing import BUFFER_SIZE
from nanochat_jax.distributed import mesh as distributed_mesh
from nanochat_jax.distributed import sharding
from nanochat_jax.evals.bits_per_byte import make_bits_per_byte
from nanochat_jax.files import paths
from nanochat_jax.optim import schedules
from nanochat_jax.tasks import TaskMixture
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.plan import TokenLoss
from nanochat_jax.train.start import find_start, initial_state
from tests.golden import data, models
from tests.golden.test_packing import nanochat_batches
from tests.support import tiny

TRACE = "sft_run/trace.json"


def recorded() -> dict[str, dict]:
    """The runs of the trace; its other entries are losses from disturbed weights."""
    trace = data.load_json(TRACE) if (data.GOLDEN / TRACE).exists() else {}
    return {name: run for name, run in trace.items() if "arguments" in run}


RUNS = sorted(recorded()) or ["(none)"]


def recording(name: str) -> dict:
    """What nanochat recorded of a run; skips where there is none."""
    data.path(TRACE)
    return recorded()[name]


def base_directory(tag: str | None, model_config: dict) -> Path:
    """The folder of the checkpoint that a run started from: it has the tag and the sizes.

    The length may differ: that of the run is written into its own meta file.
    """

    def sizes(meta):
        return {key: value for key, value in meta.items() if key != "sequence_len"}

    for name in data.checkpoints():
        folder = data.GOLDEN / "checkpoints" / name
        tagged = (folder / "base_checkpoints" / (tag or "")).is_dir()
        if tagged and sizes(models.load(name)[2]["model_config"]) == sizes(model_config):
            return folder
    return pytest.skip(f"the base model of the run, {tag} with {model_config}, is not in {data.GOLDEN}")


def entries(run: dict, key: str) -> list[dict]:
    """Those of the trace that hold `key`: train_loss at optimizer steps, val_bpb at evaluations."""
    return [entry for entry in run["trace"] if key in entry]


@functools.cache
def replay(name: str, attention: str = "chunked", steps: int | None = None) -> dict:
    """Drive our train step with the recorded multipliers and momenta, so many steps or all -> what it measured."""
    run = recording(name)
    arguments, task_data = run["arguments"], data.path("sft_run/task_data")
    cfg = dataclasses.replace(parse(sft.SFTConfig, [*arguments, *tiny.NO_SPELLING]), data_dir=task_data)
    with pytest.MonkeyPatch.context() as patch:
        folder = base_directory(cfg.model_tag, run["final_meta"]["model_config"])
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tokenizer = Tokenizer.load(paths.base_dir() / "tokenizer")
        start = find_start(cfg, "sft", tokenizer, lambda *_: None)
        cfg, mesh = start.cfg, distributed_mesh.make_mesh("data=1")
        plan = sft.plan_of(cfg, start.model_config(), mesh)
        plan = dataclasses.replace(plan, attention=attention, loss=TokenLoss(per_micro_batch=True))
        plan, state = initial_state(start, plan, lambda *_: None)

    def batches(tasks, split):
        mixture = TaskMixture(tasks)
        conversations = [mixture[i] for i in range(len(mixture))]
        rendered = tokenizer.render_many(conversations)
        how = {"world_size": 1, "rank": 0, "device_batch_size": cfg.device_batch_size, "split": split}
        how["num_iterations"] = cfg.num_iterations
        for inputs, targets, entry in nanochat_batches(rendered, tokenizer.bos, how, cfg.max_seq_len + 1, BUFFER_SIZE):
            batch = {"inputs": inputs, "targets": np.maximum(targets, 0), "weights": np.float32(targets >= 0)}
            yield batch | {"document_start": np.zeros_like(inputs)}, entry

    count = cfg.eval_tokens // (cfg.device_batch_size * cfg.max_seq_len)
    stream = batches(sft.validation_tasks(cfg), "val")
    validation = [batch for (batch, _), _ in zip(stream, range(count))]
    bits_per_byte = make_bits_per_byte(plan.model, tokenizer.token_bytes(), attention=attention)

    @jax.jit
    def norms(params):
        return jax.tree.map(jnp.linalg.norm, params)

    with plan.scope():
        train_step = plan.make_train_step()
        stream = batches(sft.training_tasks(cfg), "train")
        first, ended = next(stream), False
        result = {"loss": [], "norms": [], "seen": [], "bpb": {0: bits_per_byte(state.params, validation)}}
        evaluated = {entry["step"] for entry in entries(run, "val_bpb")}
        for entry in entries(run, "train_loss")[:steps]:
            micro = [first]  # nanochat fetches a batch ahead: what a step knows of the progress is that batch's
            while len(micro) < plan.batch.micro_batches + 1:
                micro.append(next(stream))
            *used, first = micro
            ended = ended or any(seen["last_step"] for _, seen in micro)
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(batch for batch, _ in used))
            state, metrics = train_step(state, sharding.to_global(batch, mesh), entry)
            result["loss"].append(float(metrics.micro_losses[-1]))
            result["seen"].append({"progress": first[1]["approx_progress"], "epoch": first[1]["epoch"], "last": ended})
            result["norms"].append({p: float(n) for p, n in models.by_name(norms(state.params)).items()})
            if entry["step"] in evaluated:
                result["bpb"][entry["step"]] = bits_per_byte(state.params, validation)
    return result | {"cfg": cfg, "groups": plan.groups, "count": count, "params": models.by_name(state.params)}


@pytest.mark.parametrize("name", RUNS)
def test_flags_inheritance_and_groups_are_nanochats(name):
    ours = replay(name)
    run, cfg = recording(name), ours["cfg"]
    for flag, value in run["final_meta"]["user_config"].items():  # as typed: None was inherited later
        assert value is None or getattr(cfg, flag) == value, flag
    for entry in entries(run, "train_loss"):
        *adamw, matrix = ours["groups"].items()
        table = [group for _, group in adamw] + [matrix[1]] * (len(entry["groups"]) - len(adamw))
        for group, golden in zip(table, entry["groups"], strict=True):
            np.testing.assert_allclose(group.lr, golden["initial_lr"], rtol=1e-9)
            np.testing.assert_allclose(group.lr * entry["lr_multiplier"], golden["lr"], rtol=1e-9)
            assert group.weight_decay == golden["weight_decay"]
            assert golden["betas"] is None or golden["betas"] == [group.b1, group.b2]
            assert golden["beta2"] is None or golden["beta2"] == group.b2


@pytest.mark.parametrize("name", RUNS)
def test_progress_schedule_and_the_number_of_steps_are_nanochats(name):
    ours, steps = replay(name), entries(recording(name), "train_loss")
    ratios = {key: getattr(ours["cfg"], key) for key in ("warmup_ratio", "warmdown_ratio", "final_lr_frac")}
    for step, (seen, entry) in enumerate(zip(ours["seen"], steps)):
        assert seen == {"progress": entry["progress"], "epoch": entry["epoch"], "last": step == len(steps) - 1}
        multiplier = schedules.sft_lr_multiplier(entry["progress"], **ratios)
        np.testing.assert_allclose(multiplier, entry["lr_multiplier"], rtol=1e-9)
        np.testing.assert_allclose(schedules.sft_muon_momentum(step), entry["muon_momentum"], rtol=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_nanochats(name):
    golden = [entry["train_loss"] for entry in entries(recording(name), "train_loss")]
    ours = replay(name)["loss"]
    np.testing.assert_allclose(ours[0], golden[0], rtol=1e-4)
    np.testing.assert_allclose(ours, golden, rtol=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_validation_bits_per_byte_are_nanochats(name):
    golden, ours = entries(recording(name), "val_bpb"), replay(name)
    assert [ours["count"]] * len(golden) == [entry["eval_steps"] for entry in golden]
    for entry in golden:
        np.testing.assert_allclose(ours["bpb"][entry["step"]], entry["val_bpb"], rtol=1e-3, err_msg=str(entry))


@pytest.mark.parametrize("name", RUNS)
def test_norms_of_all_weights_are_nanochats_at_every_step(name):
    run, ours = recording(name), replay(name)["norms"]
    for norms, entry in zip(ours, entries(run, "train_loss"), strict=True):
        got = [norms[p] for p in run["param_names"]]
        np.testing.assert_allclose(got, entry["param_norms"], rtol=1e-4, err_msg=f"step {entry['step']}")


@pytest.mark.parametrize("name", RUNS[-1:])  # which run it is has no bearing on attention
def test_the_first_steps_are_nanochats_with_the_definition_of_attention_too(name):
    """In place of the backend that is in force here, of which the other tests are."""
    run, ours = recording(name), replay(name, "reference", 3)
    golden = entries(run, "train_loss")[:3]
    for loss, norms, entry in zip(ours["loss"], ours["norms"], golden, strict=True):
        np.testing.assert_allclose(loss, entry["train_loss"], rtol=1e-4)
        got = [norms[p] for p in run["param_names"]]
        np.testing.assert_allclose(got, entry["param_norms"], rtol=1e-4, err_msg=f"step {entry['step']}")
    np.testing.assert_allclose(ours["bpb"][0], entries(run, "val_bpb")[0]["val_bpb"], rtol=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_final_weights_are_nanochats(name):
    """Rounding errors grow over the steps to some 5e-6 of a tensor's largest entry, and average out in large sums."""
    golden = models.under(f"{name}/", data.arrays("sft_run/final_params.npz"))
    ours, sums = replay(name)["params"], models.under("sums/", golden)
    assert sums.keys() == ours.keys()
    for parameter, expected in golden.items():
        if not parameter.startswith("sums/"):
            bound = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(ours[parameter], expected, atol=bound, rtol=0, err_msg=parameter)
    for parameter, expected in sums.items():  # of the values and of their magnitudes
        p = ours[parameter].astype(np.float64)
        bound = (1e-4 if p.size < 1024 else 1e-5) * expected[1]
        np.testing.assert_allclose([p.sum(), np.abs(p).sum()], expected, atol=bound, rtol=0, err_msg=parameter)
