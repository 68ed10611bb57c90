"""--preflight: what a run would hold, without data, for devices that are here or not.

Run: python -m pytest tests/train/test_preflight.py
"""

import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import base, rl, sft
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import inherit
from nanochat_jax.distributed import sharding
from nanochat_jax.distributed.device_memory import bytes_on_device, device_memory, parse_memory_error
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.train import preflight
from nanochat_jax.train.plan import TokenLoss
from tests.support import tiny

ROOT = Path(__file__).parents[2]
TPU = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: tools/setup.sh --extra aot"
)


SFT = ("--mesh", "data=1", "--device-batch-size", "4", "--chatcore-every", "-1")  # one program for three tests


@pytest.fixture
def home(in_base):
    """A base directory with nothing to train on. A preflight leaves it as it was, so that tests share it."""
    return in_base


@pytest.fixture(scope="module")
def alone(base):
    """SFT on one device: (exit code, what it printed, files before, files after)."""

    def files():
        return {path for path in base.rglob("*") if "compilation_cache" not in path.parts}

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.delenv("NANOCHAT_DATA_DIR", raising=False)
        before, code = files(), run(sft, sft.SFTConfig, *SFT)
    return code, printed.getvalue(), before, files()


def run(stage, cls, *flags):
    return stage.main(parse(cls, ["--preflight", *flags], prog="test"))


def table(text):
    """Name -> number of the last table's lines."""
    lines = text.split("nothing was run")[1].splitlines()  # of a part: two spaces, its name, its size
    parts = [line.rsplit(maxsplit=1) for line in lines if line.startswith("  ") and " total " not in line]
    return {name.strip(): float(number) for name, number in parts}


def test_the_flag_stands_alone_or_names_a_slice(tmp_path):
    def parsed(*argv):
        return parse(sft.SFTConfig, list(argv), prog="test").preflight

    assert parsed() is None
    assert parsed("--preflight") == parsed("--preflight", "--seed", "1") == "here"
    assert parsed("--preflight", "v5e-8") == parsed("--preflight=v5e-8", "--resume") == "v5e-8"
    file = tmp_path / "a.toml"
    file.write_text('preflight = "v6e-8"\n')
    assert parsed("--config", str(file)) == "v6e-8"


def test_sft_is_checked_without_data_and_leaves_nothing_behind(alone):
    code, text, before, after = alone
    assert code == 0 and after == before
    found = table(text)
    assert found["parameters"] == pytest.approx(4 * 159798 / 2**20, abs=1e-3)  # float32
    assert found["gradients"] == found["parameters"] and found["activations and the rest"] > 0
    assert {"optimizer", "batch", "loss"} <= found.keys()


def test_parameters_are_split_over_devices(home, alone, capsys):
    run(sft, sft.SFTConfig, "--mesh", "data=8", "--chatcore-every", "-1")
    assert table(capsys.readouterr().out)["optimizer"] < 0.2 * table(alone[1])["optimizer"]


def test_rl_shows_what_its_answers_take_too(home, capsys):
    sizes = ("--examples-per-step", "2", "--num-samples", "4", "--slots", "8", "--max-new-tokens", "16")
    sizes += ("--eval-every", "-1")
    assert run(rl, rl.RLConfig, "--source", "base", "--mesh", "data=2", *sizes) == 0
    text = capsys.readouterr().out
    rollouts, training = re.findall(r"^\w.* +MiB on a device\n((?:  .*\n)+)", text, re.M)
    found = [dict(re.findall(r"  (\w.*?) +([\d.]+)\n", part)) for part in (rollouts, training)]
    assert float(found[0]["copy of the weights"]) == pytest.approx(4 * 159798 / 2**20, abs=1e-3)  # whole, float32
    assert float(found[0]["caches"]) > 0
    for name, of in zip(("rollouts", "training"), found):
        (line,) = re.findall(rf"^{name} +([\d.]+) +([\d.]+) +([\d.]+) of [\d.]+: fits$", text, re.M)
        assert sum(map(float, line[:2])) == pytest.approx(float(line[2]), abs=0.002)
        assert line[2] == of["total"]


def alive(device) -> int:
    """Bytes of the arrays on a device."""
    gc.collect()
    return bytes_on_device([x for x in jax.live_arrays() if device in x.sharding.device_set])


def test_what_is_alive_while_answers_are_generated_is_what_was_predicted():
    """On 8 devices: parameters split over all, their copy whole on each."""
    cfg = inherit(parse(sft.SFTConfig, [], prog="test"), tiny.SETTINGS, "the test")
    plan = sft.plan_of(cfg, tiny.CONFIG, mesh := make_mesh("data=8"))
    answers = preflight.Answers(16, 1, 16, 44, prompt_tokens=32, chunk=4)
    phase = preflight.generation_phase("answers", plan, answers, "")
    before = alive(mesh.devices.flat[0])
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), plan.abstract_state)
    with_state = alive(mesh.devices.flat[0])
    assert with_state - before == sum(phase.resident.values())

    engine = Engine(plan.model, tiny.tokenizer(), mesh, attention=plan.attention, slots=16, chunk=4, prompt_tokens=32)
    seen = []
    with engine.holding(state.params, mesh) as held:
        prompts = [[1] * 32] * 16
        watch = lambda done, of: seen.append(alive(mesh.devices.flat[0]) - with_state)  # noqa: E731
        ((sample,), *_) = engine.generate(held, prompts, SamplingParams(0.0, 0, 44), progress=watch)
    assert len(sample.tokens) == 44
    predicted = phase.adds["copy of the weights"] + phase.adds["caches"]
    assert max(seen) == pytest.approx(predicted, rel=0.01)


def test_base_needs_neither_model_nor_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run(base, base.BaseConfig, *tiny.BASE_FLAGS, "--mesh", "data=8") == 0
    text = capsys.readouterr().out
    assert "a vocabulary of 32,768 is assumed" in text and "fits" in text


def test_a_depth_is_assumed_where_there_is_no_such_model(home):
    cfg = parse(sft.SFTConfig, ["--model-tag", "d3", "--max-seq-len", "128"], prog="test")
    model, filled = preflight.model_for(cfg, "base", lambda: None)
    assert (model.n_layer, model.n_embd, model.vocab_size, filled.device_batch_size) == (3, 256, 265, 32)
    with pytest.raises(FileNotFoundError, match="name a depth to assume, such as --model-tag d20"):
        preflight.model_for(dataclasses.replace(cfg, model_tag="mine"), "base", lambda: None)


def test_what_does_not_fit_is_a_line_with_the_flags_to_change(home, capsys):
    cfg = parse(sft.SFTConfig, ["--preflight", *SFT], prog="test")
    model, cfg = preflight.model_for(cfg, "base", lambda: None)
    plan = sft.plan_of(cfg, model, make_mesh("data=1", preflight.start(cfg)))
    assert preflight.report(plan, [preflight.update_phase(plan)], memory=10**6) == 1
    said = "DOES NOT FIT: lower --device-batch-size (now 4), or try --max-seq-len, or try --remat block"
    assert said in capsys.readouterr().out


def test_the_program_that_is_compiled_is_the_runs_own(home, monkeypatch, capsys):
    """One place says what a token's loss reads: a preflight compiles it, and the train step takes no other batch."""

    def margin_loss(logp, aux):
        return aux["weights"] * jax.numpy.maximum(aux["margin"] - logp, 0.0)

    cfg = parse(sft.SFTConfig, ["--preflight", *SFT], prog="test")
    model, cfg = preflight.model_for(cfg, "base", lambda: None)
    shown, programs = [], []
    for loss in (TokenLoss(), TokenLoss(margin_loss, ("margin",))):
        monkeypatch.setattr(sft, "TokenLoss", lambda loss=loss: loss)
        plan = sft.plan_of(cfg, model, make_mesh("data=1"))
        preflight.report(plan, [preflight.update_phase(plan)])
        shown.append(table(capsys.readouterr().out)["batch"])
        programs.append(plan.compile_train_step().as_text())
    assert shown[1] == pytest.approx(shown[0] * 5 / 4, abs=0.002) and programs[0] != programs[1]

    def zeros(tree):
        return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), tree)

    batch, scalars = zeros(plan.abstract_batch), {"lr_multiplier": 1.0, "muon_momentum": 0.9}
    with plan.scope():
        _, metrics = plan.make_train_step()(zeros(plan.abstract_state), batch, scalars)
        assert metrics.loss == 0 and metrics.ok
        del batch["margin"]
        with pytest.raises(ValueError, match=r"a batch must hold .*'margin'.* as its plan says"):
            plan.make_train_step()(zeros(plan.abstract_state), batch, scalars)


def test_memory_is_read_from_what_compilers_say():
    for said, numbers in (
        ("needed for HLO temporaries (22.14G) exceeds available HBM (15.75G).", (22.14 * 2**30, 15.75 * 2**30)),
        ("Used 1.50T of 31.24G hbm. Exceeded by", (1.5 * 2**40, 31.24 * 2**30)),
        ("something else", (None, None)),
    ):
        assert parse_memory_error(RuntimeError(said)) == tuple(n if n is None else int(n) for n in numbers)


def test_a_cpu_device_has_its_share_of_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(jax.devices()[0]) == total // 8


def test_bytes_on_a_device_follow_the_sharding():
    mesh = make_mesh("data=8")
    x = jax.ShapeDtypeStruct((16, 4), "float32", sharding=sharding.fit_spec(jax.P("data"), (16, 4), mesh))
    y = jax.ShapeDtypeStruct((16, 4), "float32", sharding=sharding.replicated(mesh))
    assert bytes_on_device([x, y]) == 2 * 4 * 4 + 16 * 4 * 4


COMMANDS = """
import json, runpy, sys

for flags in json.loads(sys.argv[1]):  # each as `python -m nanochat_jax.base` has it
    sys.argv = ["base", *flags]
    try:
        runpy.run_module("nanochat_jax.base", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("exit code", end.code)
"""


@TPU
def test_a_slice_that_is_elsewhere_fits_or_does_not(tmp_path):
    """In a process of their own, as a user has it: libtpu reads its environment once. One for both: it starts once."""
    tiny.tokenizer().save(tmp_path / "tokenizer")  # a small vocabulary, which is compiled in half the time
    rows = 1 << 20
    large = ("--num-iterations=1", f"--device-batch-size={rows}", f"--total-batch-size={64 * rows}")
    commands = [["--preflight", "v5e-1", *tiny.BASE_FLAGS, *flags] for flags in ((), large)]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    fits, between, not_fits = done.stdout.partition("exit code 0\n")
    assert between, done.stdout + done.stderr
    assert "1 x TPU v5 lite" in fits and "of 16128.000: fits" in fits
    assert "DOES NOT FIT: lower --device-batch-size (now 1048576)" in not_fits
    assert not_fits.endswith("exit code 1\n"), done.stdout + done.stderr
