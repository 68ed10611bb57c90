"""--base: commands on a model that lies in a repository of the hub, played by a server on loopback, or in a folder.

Run: python -m pytest tests/test_base_flag.py
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import eval, sft
from nanochat_jax.checkpoints import find, locate, store
from nanochat_jax.files import paths
from nanochat_jax.flags.rl import RLConfig
from nanochat_jax.model.gpt import GPTConfig
from nanochat_jax.rollouts.reference import load_reference
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train.base_model import run_tokenizer
from nanochat_jax.train.start import find_start
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.loopback import COMMIT, isolate, serve_model, servers, use_hub
from tests.support.transformers_files import EARLY, write_transformers

SHORT = ["--max-seq-len", "64", "--device-batch-size", "1", "--total-batch-size", "64", "--mesh", "data=1"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """The hub with o/n, a model in the form of transformers; the run's base directory is tmp_path/base."""
    before = jax.config.jax_compilation_cache_dir
    isolate(monkeypatch, tmp_path)
    monkeypatch.setenv(paths.OUTPUT, "")  # what --output-dir sets ends with the test
    write_transformers(tmp_path / "files")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    with servers(1) as (server,):
        use_hub(monkeypatch, server.url)
        serve_model(server, "o/n", files)
        forget()
        yield server
    forget()
    jax.config.update("jax_compilation_cache_dir", before)


def forget():
    """What a process remembers of the hub."""
    locate._on_hub.cache_clear()
    locate._find_on_hub.cache_clear()


def train(tmp_path, *more) -> int | str:
    data = tiny.write_conversations(tmp_path / "train.jsonl", 20)
    argv = [*tiny.FLAGS, *SHORT, "--custom-json", data, "--eval-every", "-1", *more]
    return run_command(sft.main, sft.SFTConfig, *argv)


def test_a_model_of_the_hub_is_trained_on_and_the_run_goes_on_without_the_flag(here, tmp_path, capsys):
    base = tmp_path / "base"
    assert train(tmp_path, "--base", "hub:o/n", "--num-iterations", "2") == 0
    said = capsys.readouterr().out
    assert f"hub:o/n: the form of transformers, base model o--n, step 0; commit {COMMIT}" in said
    assert "came without optimizer state" in said
    meta = store.read_meta(base / "chatsft_checkpoints" / "d2" / "2")
    assert meta["started_from"] == f"hub:o/n@{COMMIT}" and GPTConfig(**meta["model_config"]) == EARLY
    settings = meta["user_config"]
    assert [settings[name] for name in ("base", "source", "model_tag", "model_step")] == ["hub:o/n", "base", "o--n", 0]
    assert Tokenizer.load(base / "tokenizer").digest() == tiny.tokenizer().digest() == meta["tokenizer"]

    asked = len(here.requests)
    forget()
    assert train(tmp_path, "--resume", "--num-iterations", "3") == 0
    assert len(here.requests) == asked  # the model itself is not needed any more
    assert store.read_meta(base / "chatsft_checkpoints" / "d2" / "3")["started_from"] == f"hub:o/n@{COMMIT}"
    assert train(tmp_path, "--resume", "--base", "hub:o/n", "--num-iterations", "4") == 0
    refused = train(tmp_path, "--resume", "--base", "hub:o/other", "--output-tag", "d2", "--num-iterations", "5")
    assert "--base was hub:o/n and is hub:o/other" in refused


def test_a_run_from_the_hub_equals_one_from_the_same_files_on_disk(tmp_path):
    for tag, base in (("hub", "hub:o/n"), ("disk", tmp_path / "files")):
        assert train(tmp_path, "--base", base, "--num-iterations", "2", "--output-tag", tag) == 0
    runs = [find.find_model("sft", tag) for tag in ("hub", "disk")]
    one, other = (store.read_arrays(run.folder / "2", "params") for run in runs)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert store.read_meta(runs[1].folder / "2")["started_from"] == str(tmp_path / "files")


def test_a_base_directory_with_another_tokenizer_is_not_written_to(tmp_path):
    ranks = {bytes([255 - i]): i for i in range(256)}
    other = Tokenizer("other", r"\w+|\W", ranks, {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    other.save(tmp_path / "base" / "tokenizer")
    for resume in ([], ["--resume=auto"]):
        said = train(tmp_path, "--base", "hub:o/n", "--num-iterations", "1", "--run", "mine", *resume)
        assert f"is another tokenizer than that of --base=hub:o/n@{COMMIT}" in said and "--output-dir" in said
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["tokenizer"]
    out = tmp_path / "out"
    assert train(tmp_path, "--base", "hub:o/n", "--num-iterations", "1", "--output-dir", out) == 0
    assert Tokenizer.load(out / "tokenizer").digest() == tiny.tokenizer().digest()


def test_what_the_hub_refuses_is_an_error_of_the_flag(tmp_path):
    assert train(tmp_path, "--base", "hub:o/none").startswith("error: --base=hub:o/none: model o/none (main) does not")
    assert train(tmp_path, "--base", "hub:o").startswith("error: --base=hub:o must be hub:OWNER/NAME[@REVISION]")
    assert "holds one model only: leave --model-tag=d9 out" in train(tmp_path, "--base", "hub:o/n", "--model-tag", "d9")
    assert not (tmp_path / "base").exists()


def test_a_model_of_the_hub_is_evaluated_and_talked_to(tmp_path):
    assert find.load_chat_model("sft", base="hub:o/n").engine.context == 64
    result = tmp_path / "result.json"
    argv = ["--base", "hub:o/n", "-a", "Arithmetic", "-x", "2", "--max-new-tokens", "4", "--json", result]
    assert run_command(eval.main, eval.EvalConfig, *argv) == 0
    report = json.loads(result.read_text())
    assert report["source"] == "sft" and report["checkpoint"].startswith("o--n, step 0, ")
    kept = list((tmp_path / "base" / "chatsft_checkpoints" / "o--n").iterdir())
    assert [path.name[:11] for path in kept] == ["eval_000000"]


def test_reinforcement_learning_finds_its_model_and_later_its_reference_there(here):
    cfg = RLConfig(base=Path("hub:o/n"), run="mine")
    start = find_start(cfg, "rl", run_tokenizer(cfg), print, cfg.source)
    assert (start.cfg.source, start.cfg.model_tag, start.cfg.model_step) == ("sft", "o--n", 0)
    assert start.started_from == f"hub:o/n@{COMMIT}"
    forget()
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), find.load_params(start.base)[1])
    which = start.cfg.source, start.cfg.model_tag, start.cfg.model_step
    _, digest = load_reference(*which, None, params, base=start.started_from)
    with pytest.raises(ValueError, match="--kl-coef needs the model that the run started from"):
        load_reference(*which, digest, params)


def test_a_folder_of_one_model_is_named_like_a_base_directory(tmp_path, capsys):
    tiny.write_nanochat_base(tmp_path / "theirs")
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "theirs" / "base_checkpoints" / "d2", flat)
    shutil.copyfile(tmp_path / "theirs" / "tokenizer" / "tokenizer.json", flat / "tokenizer.json")
    found = [find.find_model("base", base=folder) for folder in (tmp_path / "theirs", flat)]
    assert [one.tag for one in found] == ["d2", "flat"]
    assert find.identity(found[0]).partition(",")[2] == find.identity(found[1]).partition(",")[2]
    inside = tmp_path / "theirs" / "base_checkpoints" / "d2"
    assert find.find_model("sft", base=inside).source == "base"
    with pytest.raises(ValueError, match=f"--base={inside} names the model d2: leave --model-tag=d4 out"):
        find.find_model("sft", "d4", base=inside)
    assert f"{flat}: nanochat's files of one model, base model, step 7" in capsys.readouterr().out
