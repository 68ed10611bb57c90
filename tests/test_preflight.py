"""--preflight: what a run would hold, without data, for devices that are here or not.

Run: python -m pytest tests/test_preflight.py
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nanochat_jax import base, config, preflight, rl, sft
from nanochat_jax.memory import asked_and_had, bytes_on_device, device_memory
from tests import tiny

ROOT = Path(__file__).parents[1]
TPU = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: tools/setup.sh --extra aot"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A base directory with a model and a tokenizer, and nothing to train on."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    tiny.write_base(tmp_path)
    return tmp_path


def run(stage, cls, *flags):
    return stage.main(config.parse(cls, ["--preflight", *flags], prog="test"))


def table(text):
    """Name -> number of the last table's lines."""
    lines = text.split("nothing was run")[1].splitlines()
    parts = [line.rsplit(maxsplit=1) for line in lines if line.startswith("  ") and " total " not in line]
    return {name.strip(): float(number) for name, number in parts}


def test_the_flag_stands_alone_or_names_a_slice(tmp_path):
    def parsed(*argv):
        return config.parse(sft.SFTConfig, list(argv), prog="test").preflight

    assert parsed() is None
    assert parsed("--preflight") == parsed("--preflight", "--seed", "1") == "here"
    assert parsed("--preflight", "v5e-8") == parsed("--preflight=v5e-8", "--resume") == "v5e-8"
    file = tmp_path / "a.toml"
    file.write_text('preflight = "v6e-8"\n')
    assert parsed("--config", str(file)) == "v6e-8"


def test_sft_is_checked_without_data_and_leaves_nothing_behind(home, capsys):
    before = {path for path in home.rglob("*") if "compilation_cache" not in path.parts}
    assert run(sft, sft.SFTConfig, "--mesh", "data=1") == 0
    found = table(capsys.readouterr().out)
    assert {path for path in home.rglob("*") if "compilation_cache" not in path.parts} == before
    assert found["parameters"] == pytest.approx(4 * 159798 / 2**20, abs=1e-3)  # float32
    assert found["gradients"] == found["parameters"] and found["activations and the rest"] > 0
    assert {"optimizer", "batch", "loss"} <= found.keys()


def test_parameters_are_split_over_devices(home, capsys):
    run(sft, sft.SFTConfig, "--mesh", "data=1")
    alone = table(capsys.readouterr().out)
    run(sft, sft.SFTConfig, "--mesh", "data=8")
    assert table(capsys.readouterr().out)["optimizer"] < 0.2 * alone["optimizer"]


def test_rl_shows_the_cache_too(home, capsys):
    sizes = ("--examples-per-step", "2", "--num-samples", "4", "--slots", "8", "--max-new-tokens", "16")
    assert run(rl, rl.RLConfig, "--source", "base", "--mesh", "data=1", *sizes) == 0
    text = capsys.readouterr().out
    found = table(text)
    assert text.index("rollouts  ") < text.index("training  ")
    assert found["cache"] > 0 and found["copy of the weights"] == found["parameters"]


def test_base_needs_neither_model_nor_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run(base, base.BaseConfig, *tiny.BASE_FLAGS, "--mesh", "data=8") == 0
    text = capsys.readouterr().out
    assert "a vocabulary of 32,768 is assumed" in text and "fits" in text


def test_a_depth_is_assumed_where_there_is_no_such_model(home):
    cfg = config.parse(sft.SFTConfig, ["--model-tag", "d3", "--max-seq-len", "128"], prog="test")
    model, filled = preflight.model_for(cfg, "base", sft.INHERITED, lambda: None)
    assert (model.n_layer, model.n_embd, model.vocab_size, filled.device_batch_size) == (3, 256, 265, 32)
    with pytest.raises(FileNotFoundError, match="name a depth to assume, such as --model-tag d20"):
        preflight.model_for(dataclasses.replace(cfg, model_tag="mine"), "base", sft.INHERITED, lambda: None)


def test_what_does_not_fit_is_a_line_with_the_flags_to_change(home, capsys):
    cfg = config.parse(sft.SFTConfig, ["--preflight", "--mesh", "data=1", "--device-batch-size", "4"], prog="test")
    place = preflight.start(cfg)._replace(memory=10**6)
    model, cfg = preflight.model_for(cfg, "base", sft.INHERITED, lambda: None)
    assert preflight.rows_fit(cfg, place, model, sft.plan_batches(cfg, place.mesh, print)) == 1
    said = "DOES NOT FIT: lower --device-batch-size (now 4), or try --max-seq-len, or try --remat block"
    assert said in capsys.readouterr().out


def test_an_unknown_slice_is_a_sentence():
    for name in ("v5e-7", "h100", "v5e", "v4-8", "", "v5e:2by4"):
        with pytest.raises(ValueError, match=r"--preflight must name no device .* or a TPU slice \(v5e-\{1,4,8"):
            preflight.slice_devices(name)


def test_memory_is_read_from_what_compilers_say():
    for said, numbers in (
        ("needed for HLO temporaries (22.14G) exceeds available HBM (15.75G).", (22.14 * 2**30, 15.75 * 2**30)),
        ("Used 1.50T of 31.24G hbm. Exceeded by", (1.5 * 2**40, 31.24 * 2**30)),
        ("something else", (None, None)),
    ):
        assert asked_and_had(RuntimeError(said)) == tuple(n if n is None else int(n) for n in numbers)


def test_a_cpu_device_has_its_share_of_the_machine():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(jax.devices()[0]) == total // 8


def test_bytes_on_a_device_follow_the_sharding():
    mesh = sft.sharding.make_mesh("data=8")
    x = jax.ShapeDtypeStruct((16, 4), "float32", sharding=sft.sharding.fit(jax.P("data"), (16, 4), mesh))
    y = jax.ShapeDtypeStruct((16, 4), "float32", sharding=sft.sharding.replicated(mesh))
    assert bytes_on_device([x, y]) == 2 * 4 * 4 + 16 * 4 * 4


@TPU
def test_a_slice_that_is_elsewhere_fits_or_does_not():
    """In a process of its own, as a user has it: libtpu reads its environment once."""

    def preflight_of(*flags):
        command = [sys.executable, "-m", "nanochat_jax.base", "--preflight", "v5e-1", *tiny.BASE_FLAGS, *flags]
        environment = os.environ | {"NANOCHAT_BASE_DIR": "/nonexistent", "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    done = preflight_of()
    assert done.returncode == 0, done.stderr
    assert "1 x TPU v5 lite" in done.stdout and "of 16128.000: fits" in done.stdout
    rows = 1 << 20
    done = preflight_of("--num-iterations=1", f"--device-batch-size={rows}", f"--total-batch-size={64 * rows}")
    assert done.returncode == 1, done.stderr
    assert "DOES NOT FIT: lower --device-batch-size (now 1048576)" in done.stdout
