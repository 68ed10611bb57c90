"""Converting a nanochat base directory once gives what reading it in place gives, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanochat_jax import nanochat_import, sft
from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.cli.command_line import parse
from nanochat_jax.distributed import sharding
from nanochat_jax.optim import groups as optim
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.train.metrics import read_metrics
from tests.support import tiny
from tests.support.commands import run_command

GOLDEN = Path(os.environ.get("NANOCHAT_GOLDEN", Path(__file__).parents[2] / "shared" / "golden")) / "checkpoints"
MODELS = sorted(p.name for p in GOLDEN.iterdir()) if GOLDEN.is_dir() else []
needs_golden = pytest.mark.skipif(not MODELS, reason="the golden checkpoints are not here")


@pytest.fixture
def source(tmp_path):
    """nanochat's base directory with one random model."""
    tiny.write_nanochat_base(tmp_path / "theirs")
    return tmp_path / "theirs"


@nnx.jit  # one program for the models that are compared, in place of one for each operation
def logits_of(model, ids):
    return model(ids)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*argv) -> int | str:
    return run_command(nanochat_import.main, nanochat_import.ImportConfig, *argv)


def warm(base, tag):
    """(groups, arrays) that a run would start with from the base model in `base`."""
    found = find.find_model("base", tag, base=base)
    model_config, params, _ = find.load_params(found)
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}
    groups = optim.groups_in_use(optim.default_groups(model_config.n_embd, **rates), params)
    return found.ours, model_config, params, find.load_optimizer(found, model_config, groups)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert a.dtype == b.dtype and np.array_equal(a, b), name


@needs_golden
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_and_its_optimizer_are_those_of_the_original(name, tmp_path, monkeypatch):
    theirs, to = GOLDEN / name, tmp_path / "ours"
    before = contents(theirs)
    nanochat_import.convert(theirs, to, log=lambda line: None)
    assert contents(theirs) == before
    tag = next((theirs / "base_checkpoints").iterdir()).name
    ours, config_1, params_1, warm_1 = warm(theirs, tag)
    converted, config_2, params_2, warm_2 = warm(to, tag)
    assert (ours, converted) == (False, True)
    assert config_1 == config_2
    assert_equal(sharding.flatten_by_path(params_1), sharding.flatten_by_path(params_2))
    assert (warm_1 is None) == (warm_2 is None)
    if warm_1:
        assert warm_1[0] == warm_2[0]
        assert_equal(warm_1[1], warm_2[1])
    logits = []
    for base in (theirs, to):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        model, tokenizer, _ = find.load_model("base")
        ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % tokenizer.vocab_size
        logits.append(np.asarray(logits_of(model, ids)))
    assert np.array_equal(*logits)


def test_a_second_conversion_changes_nothing_and_an_unsealed_or_damaged_half_is_done_again(source, tmp_path, capsys):
    to = tmp_path / "ours"
    assert nanochat_import.convert(source, to) == 1
    target = to / "base_checkpoints" / "d2" / "7"
    before = contents(to)
    nanochat_import.convert(source, to)
    assert f"{target} is there already" in capsys.readouterr().out
    assert contents(to) == before
    for damage in (integrity.MANIFEST, next((target / "params").glob("*"))):
        (target / damage).rename(tmp_path / "taken away") if (target / damage).is_file() else shutil.rmtree(damage)
        (target.parent / "7.orbax-checkpoint-tmp-1").mkdir()
        nanochat_import.convert(source, to)
        assert integrity.is_intact(target)
        assert [p.name for p in target.parent.iterdir()] == ["7"]


def test_models_of_every_stage_are_converted_and_can_be_loaded(source, tmp_path, monkeypatch):
    base = source / "base_checkpoints" / "d2"
    for stage in ("chatsft", "chatrl"):
        shutil.copytree(base, source / f"{stage}_checkpoints" / "d2")
    meta = source / "chatrl_checkpoints" / "d2" / "meta_000007.json"
    meta.write_text(json.dumps({"model_config": json.loads(meta.read_text())["model_config"]}))  # all that RL writes
    to = tmp_path / "ours"
    assert nanochat_import.convert(source, to, log=lambda line: None) == 3
    for folder in (source, to):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
        models = [find.load_model(s, "d2", 7)[0] for s in ("base", "sft", "rl")]
        logits = [logits_of(model, jnp.ones((1, 4), jnp.int32)) for model in models]
        assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


def test_another_tokenizer_in_the_destination_is_refused_and_kept(source, tmp_path):
    ranks = {bytes([255 - i]): i for i in range(256)}
    other = Tokenizer("other", r"\w+|\W", ranks, {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    other.save(tmp_path / "ours" / "tokenizer")
    before = contents(tmp_path)
    message = run(source, "--to", tmp_path / "ours")
    assert message.startswith("error: ") and "is another tokenizer: convert to another folder with --to" in message
    assert contents(tmp_path) == before


def test_a_model_of_our_own_in_the_destination_is_not_replaced(source, tmp_path):
    """The same tag and step, but not this model: whoever trained it there keeps it, intact or not."""
    to = tmp_path / "ours"
    tiny.write_base(to, seed=5)
    before = contents(to)
    for _ in range(2):
        message = run(source, "--to", to)
        assert message.startswith("error: ") and "base_checkpoints/d2/7 is another model: remove it, or" in message
        assert contents(to) == before
        (to / "base_checkpoints" / "d2" / "7" / "meta" / "data.json").write_text("damaged")
        before = contents(to)


def test_wrong_folders_are_refused_with_a_sentence_and_nothing_is_written(source, tmp_path):
    for wrong in (tmp_path / "nowhere", source / "base_checkpoints", source / "base_checkpoints" / "d2"):
        message = run(wrong, "--to", tmp_path / "ours")
        assert message.startswith("error: ") and "it must be a base directory" in message
    file = tmp_path / "file"
    file.write_text("mine")
    assert run(source, "--to", file).startswith("error: ")
    assert not (tmp_path / "ours").exists() and file.read_text() == "mine"


def test_converting_in_place_only_adds_files(source):
    before = contents(source)
    for _ in range(2):
        assert run(source, "--to", source) == 0
    after = contents(source)
    assert before.items() <= after.items()
    assert find.find_model("base", base=source).ours


def test_a_damaged_model_is_named_and_those_before_it_stay(source, tmp_path):
    shutil.copytree(source / "base_checkpoints" / "d2", source / "base_checkpoints" / "d3")
    model = source / "base_checkpoints" / "d3" / "model_000007.pt"
    model.write_bytes(model.read_bytes()[:1000])
    message = run(source, "--to", tmp_path / "ours")
    assert message.startswith(f"error: {model}")
    assert integrity.is_intact(tmp_path / "ours" / "base_checkpoints" / "d2" / "7")


@needs_golden
def test_fine_tuning_a_converted_model_gives_the_same_numbers_as_the_original(tmp_path, monkeypatch):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(GOLDEN / "c1_master", theirs, copy_function=shutil.copyfile)
    for folder in (theirs, *theirs.rglob("*/")):
        folder.chmod(0o755)
    nanochat_import.convert(theirs, ours, log=lambda line: None)
    file = tiny.write_conversations(tmp_path / "train.jsonl", 40)
    argv = [*tiny.FLAGS, "--custom-json", str(file), "--num-iterations", "2", "--mesh", "data=1", "--output-tag", "x"]
    argv += ["--max-seq-len", "64", "--device-batch-size", "1", "--total-batch-size", "64", "--eval-every", "-1"]
    before = jax.config.jax_compilation_cache_dir
    results = []
    try:
        for base in (theirs, ours):
            monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
            assert sft.main(parse(sft.SFTConfig, argv)) == 0
            folder = base / "chatsft_checkpoints" / "x"
            losses = [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]
            results.append((losses, *(store.read_arrays(folder / "2", k) for k in ("params", "optimizer"))))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(results[0][0]) == 2 and results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])
    assert_equal(results[0][2], results[1][2])
