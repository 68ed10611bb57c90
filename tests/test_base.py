"""Pretraining from the command line to a fine-tuned model, on a tiny text: what it says, saves, and refuses."""

import dataclasses
import math
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import base as stage
from nanochat_jax import sft
from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import require
from nanochat_jax.evals.samples import printable
from nanochat_jax.optim import groups as optim
from nanochat_jax.train import scaling_laws
from nanochat_jax.train.metrics import read_metrics
from tests.support import columns, tiny
from tests.support.commands import run_command

STEPS = 6
pytestmark = pytest.mark.usefixtures("in_base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    base = tmp_path_factory.mktemp("base")
    tiny.tokenizer().save(base / "tokenizer")
    tiny.write_shards(base / "base_data")
    tiny.write_conversations(base / "train.jsonl")
    yield base
    jax.config.update("jax_compilation_cache_dir", before)


def flags(*more):
    steps = ["--num-iterations", str(STEPS), "--warmup-steps", "0", "--save-every", "2", "--keep-checkpoints", "3"]
    return [*tiny.BASE_FLAGS, *steps, "--eval-tokens", "512", "--eval-every", "3", "--mesh", "data=1", *more]


def run(argv, module=stage, settings=stage.BaseConfig) -> int | str:
    return run_command(module.main, settings, *argv)


@pytest.fixture(scope="module")
def trained(base):
    """(folder, output) of a run that nothing interrupted."""
    import contextlib
    import io

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        assert run(flags("--sample-every", "6")) == 0
    return base / "base_checkpoints" / "d2", said.getvalue()


def copy_of(trained, tag, steps):
    """The trained run's folder under another tag, with these of its checkpoints."""
    folder = shutil.copytree(trained[0], trained[0].with_name(tag))
    for step in set(integrity.steps(folder)) - set(steps):
        integrity.discard(folder / str(step))
    return folder


def differing(one, other, step=STEPS):
    found = []
    for item in ("params", "optimizer"):
        ours, theirs = (store.read_arrays(folder / str(step), item) for folder in (one, other))
        found += [f"{item}/{name}" for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What a run says and leaves behind


def test_every_column_of_metrics_is_told_in_the_documentation(trained):
    assert columns.unknown(trained[0]) == set()


def test_the_console_tells_what_follows_from_the_depth(trained):
    for part in (
        "Total batch size: 512 tokens, as 8 micro-batches of 1 x 64",
        "Model: depth 2, width 64, 2 heads of 32, windows 128, 64, vocabulary 265",
        "6 steps of 512 tokens from --num-iterations=6: 3,072 tokens, ",
        "Learning rates x 0.0312 for this batch, Muon's weight decay ",
        "base_data, 80 documents",
        " of them end with a document that is cut to fill them, which leaves out ",
        "step 00006/00006 | loss ",
        f"step 00006 | saving {trained[0]}/6",
    ):
        assert part in trained[1], part


def test_the_text_is_learned_and_sampled_from(trained):
    records = read_metrics(trained[0] / "metrics.jsonl")
    bits = {r["step"]: r["val_bpb"] for r in records if "val_bpb" in r}
    assert list(bits) == [0, 3, 6] and bits[0] > bits[3] > bits[6]
    assert [r["trained_tokens"] for r in records if "loss" in r] == [512] * STEPS  # every token is trained
    (texts,) = (r["samples"] for r in records if "samples" in r)
    assert [text.startswith(prompt) for text, prompt in zip(texts, stage.PROMPTS, strict=True)] == [True] * len(texts)
    assert f"step 00006 | samples | {texts[0]}" in trained[1]


def test_the_checkpoint_is_a_base_model_with_what_fine_tuning_inherits(trained):
    found = find.find_model("base")
    assert (found.folder, found.step, found.ours) == (trained[0], STEPS, True)
    meta = find.peek_meta(found)
    assert (meta["max_seq_len"], meta["device_batch_size"], meta["total_batch_size"]) == (64, 1, 512)
    assert (meta["rows_consumed"], meta["total_steps"], meta["user_config"]["embedding_lr"]) == (48, STEPS, 0.3)
    config = find.load_params(found)[0]
    assert (config.n_embd, config.windows, config.smear, config.padded_vocab) == (
        64,
        (128, 64),
        True,
        320,
    )
    dials = {"aspect_ratio": 32, "head_dim": 32, "window_pattern": "SL", "max_seq_len": 64, "vocab_size": 265}
    growth = scaling_laws.scaling_params(config) / scaling_laws.scaling_params(
        scaling_laws.config_of_depth(12, **dials)
    )
    decay = 0.28 * math.sqrt(512 / 2**19) / growth * 0.5 * (1 + math.cos(math.pi * 5 / 6))  # the last step's
    groups = meta["optimizer_groups"]
    assert groups["matrix"]["weight_decay"] == pytest.approx(decay)
    assert groups["matrix"]["lr"] == pytest.approx(0.02 / 32)
    assert groups["embedding"]["lr"] == pytest.approx(0.3 / 32 * math.sqrt(768 / 64))
    assert groups["smear"]["lr"] == 0.2  # fixed


def test_sft_finds_it_goes_on_from_its_optimizer_and_keeps_the_last_decay(base, trained, capsys):
    argv = [*tiny.FLAGS, "--custom-json", str(base / "train.jsonl"), "--num-iterations", "2", "--eval-every", "-1"]
    assert run([*argv, "--mesh", "data=1"], sft, sft.SFTConfig) == 0
    said = capsys.readouterr().out
    for line in (f"Base model: {trained[0]}/6", "total_batch_size 512", "Loaded the optimizer state of the base model"):
        assert line in said
    folder = base / "chatsft_checkpoints" / "d2"
    ours, theirs = (store.read_meta(f)["optimizer_groups"] for f in (folder / "2", trained[0] / "6"))
    assert ours["matrix"]["weight_decay"] == theirs["matrix"]["weight_decay"] > 0
    assert ours["matrix"]["lr"] == pytest.approx(0.8 * 0.02)  # as nanochat: the flag's rate, not the scaled one
    assert store.read_arrays(folder / "2", "optimizer")["count/embedding"] == STEPS + 2


# ---------------------------------------------------------------------------------------------------------------------
# Going on, elsewhere and not at all


def losses(folder):
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_a_resumed_run_ends_bit_identical(trained, capsys):
    folder = copy_of(trained, "again", [2])
    assert run(["--resume", "--model-tag", folder.name, "--mesh", "data=1"]) == 0  # what is not given is the run's own
    assert f"Resuming {folder} from step 2" in capsys.readouterr().out
    assert differing(folder, trained[0]) == []
    assert losses(folder) == losses(trained[0])


def test_a_run_is_made_longer_by_a_stretch_with_its_own_schedule_and_ends_the_same_if_that_is_interrupted(
    trained, capsys
):
    folder = copy_of(trained, "longer", [6])
    longer = ["--resume", "--mesh", "data=1", "--model-tag"]
    assert run([*longer, "longer", "--num-iterations", "9"]) == 0
    assert "Stretches of the run, each with its own schedule: steps 0 to 6, 6 to 9" in capsys.readouterr().out
    assert (losses(folder) | losses(trained[0]), len(losses(folder))) == (losses(folder), 9)
    meta = store.read_meta(folder / "9")
    assert (meta["stretches"], meta["total_steps"], meta["rows_consumed"]) == ([[0, 6], [6, 9]], 9, 72)
    multipliers = [r["lr_multiplier"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert multipliers[6:] == [1.0, 1.0, pytest.approx((1 + 0.05) / 2)]  # round(0.65 * 3) steps of them fall
    decay = [store.read_meta(folder / step)["optimizer_groups"]["matrix"]["weight_decay"] for step in ("6", "8", "9")]
    cosines = [0.5 * (1 + math.cos(math.pi * done)) for done in (5 / 6, 1 / 3, 2 / 3)]  # of each stretch from its start
    assert [d / decay[0] for d in decay] == pytest.approx([c / cosines[0] for c in cosines])

    interrupted = copy_of((folder, ""), "interrupted", [8])
    assert run([*longer, "interrupted"]) == 0
    assert differing(interrupted, folder, 9) == [] and losses(interrupted) == losses(folder)
    copy_of(trained, "falling", [4])
    assert (
        "--num-iterations: the run in" in (said := run([*longer, "falling", "--num-iterations", "9"]))
        and "before step 2, from which its rates fall, or when it has ended, at step 6" in said
    )


def test_eight_devices_train_like_one(base, trained):
    assert run(flags("--model-tag", "eight", "--mesh", "data=8")) == 0
    folder = base / "base_checkpoints" / "eight"
    one, eight = (list(losses(f).values()) for f in (trained[0], folder))
    np.testing.assert_allclose(eight, one, rtol=1e-5)  # of a fresh model some gradients are rounding errors only
    ours, theirs = (store.read_arrays(f / str(STEPS), "params") for f in (folder, trained[0]))
    for name in ("wte", "blocks/1/mlp/c_fc", "blocks/0/attn/c_q"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3, err_msg=name)


def test_other_settings_and_other_data_are_not_the_same_run(base, trained, tmp_path):
    copy_of(trained, "kept", [4])
    how = ["--resume", "--model-tag", "kept"]
    assert "--matrix-lr was 0.02 and is 0.03; use another --model-tag" in run([*how, "--matrix-lr", "0.03"])
    assert "--depth was 2 and is 4" in run([*how, "--depth", "4"])
    other = tiny.write_shards(tmp_path / "other", seed=3)
    sentence = run([*how, "--data-dir", str(other)])
    assert "the data of" in sentence and "has changed since step 4" in sentence and "--model-tag" in sentence


def test_resume_alone_means_the_only_run(base, trained, tmp_path, monkeypatch):
    def tag(*argv):
        return stage.tag_of(parse(stage.BaseConfig, [*argv]))

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert tag("--resume") == tag() == "d20"  # there is none
    runs = tmp_path / "base_checkpoints"
    shutil.copytree(trained[0], runs / "d2")
    (runs / "d32").mkdir()
    (runs / "d32" / "model_000001.pt").write_bytes(b"nanochat's")
    assert tag("--resume") == "d2"
    (tmp_path / "file.toml").write_text("depth = 20")
    given = ["--depth", "20"], ["--model-tag", "x"], ["--config", str(tmp_path / "file.toml")]
    assert [tag("--resume", *argv) for argv in given] == ["d20", "x", "d20"]
    assert tag() == "d20"
    shutil.copytree(trained[0], runs / "other")
    with pytest.raises(ValueError, match="which run\\? Name one of d2, other with --model-tag"):
        tag("--resume")


def test_a_damaged_shard_costs_no_step_and_can_be_repaired(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny.write_shards(tmp_path / "shards", (30, 40, 20))
    whole = pq.read_table(folder / "shard_00001.parquet")
    broken = pa.array([b"\xff"] * len(whole), pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), folder / "shard_00001.parquet")
    argv = flags("--model-tag", "damaged", "--data-dir", "shards", "--num-iterations", "9", "--save-every", "-1")
    assert "shard_00001.parquet, row 0 cannot be rendered: UnicodeDecodeError" in run([*argv, "--eval-every", "-1"])
    checkpoints = base / "base_checkpoints" / "damaged"
    (step,) = integrity.steps(checkpoints)
    assert step == max(losses(checkpoints)) > 1
    meta = store.read_meta(checkpoints / str(step))
    assert (meta["shards_reached"], meta["user_config"]["data_dir"]) == (1, str(folder))
    pq.write_table(whole, folder / "shard_00001.parquet")
    monkeypatch.chdir(base)  # the folder was given relative to another one, and is not given again
    assert run(["--resume", "--model-tag", "damaged", "--mesh", "data=1"]) == 0
    assert f"data_dir {folder}" in capsys.readouterr().out
    assert list(losses(checkpoints)) == list(range(1, 10))
    pq.write_table(whole.slice(1), folder / "shard_00001.parquet")
    assert "has changed since step 9" in run(["--resume", "--model-tag", "damaged"])


def test_a_batch_that_was_rounded_for_the_devices_stays_when_they_change(base, monkeypatch, capsys):
    argv = ["--depth", "1", *tiny.DIALS[2:-2], "--max-seq-len", "48", "--model-tag", "odd", "--eval-every", "-1"]
    argv += ["--sample-every", "-1", "--warmup-steps", "0", "--num-iterations", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(scaling_laws, "REFERENCE_BATCH", 1024)
        assert run([*argv, "--mesh", "data=8"]) == 0
    said = capsys.readouterr().out
    total = store.read_meta(base / "base_checkpoints" / "odd" / "1")["total_batch_size"]
    assert total % (8 * 48) == 0 and f"1 steps of {total:,} tokens from --num-iterations=1" in said
    monkeypatch.setattr(stage, "print_model", lambda *args: require(False, "enough is known"))
    assert run(["--resume", "--model-tag", "odd", "--mesh", "data=1"]) == "error: enough is known"
    assert f"Total batch size: {total:,} tokens, as " in capsys.readouterr().out


def test_a_run_is_not_overwritten_unless_told_so(base, trained):
    assert "holds checkpoints of another run (steps 2, 4, 6): --resume goes on" in run(flags())
    assert "--model-tag names another folder" in run(flags())
    theirs = base / "base_checkpoints" / "d3"
    theirs.mkdir(parents=True)
    (theirs / "model_000001.pt").write_bytes(b"x")
    try:
        assert "checkpoints of nanochat's own: choose another folder with --model-tag" in run(["--depth", "3"])
    finally:
        shutil.rmtree(theirs)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--depth", "0"], "--depth must be from 1 to"),
        (["--num-iterations", "-1", "--target-param-data-ratio", "-1"], "how long to train?"),
        (["--num-iterations", "-1", "--target-flops", "1"], "gives 0 steps of --total-batch-size=512 tokens"),
        (["--target-param-data-ratio", "nan"], "--target-param-data-ratio must be a finite number"),
        (["--total-batch-size", "100"], "--total-batch-size=100 must be a multiple of 64 tokens"),
        (["--total-batch-size", "0"], "--total-batch-size must be at least 1, or -1"),
        (["--warmup-steps", "-1"], "--warmup-steps must be at least 0"),
        (["--warmdown-ratio", "1.5"], "--warmdown-ratio must be between 0 and 1"),
        (["--seed", "4294967296"], "--seed must be from 0 to 4294967295"),
        (["--model-tag", "../other"], "--model-tag must be the name of one folder, got '../other'"),
        (["--window-pattern", "Q"], "--window-pattern must be made of the letters S and L"),
        (["--data-dir", "/nowhere"], "no pretraining data, /nowhere does not exist: give --data-dir FOLDER"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
    ],
)
def test_what_cannot_work_ends_with_a_sentence(base, more, sentence):
    said = run(flags("--model-tag", "new", *more))
    assert isinstance(said, str) and said.startswith("error: ") and sentence in said and "\n" not in said
    assert not (base / "base_checkpoints" / "new").exists()


def test_a_run_takes_the_shards_it_downloads_else_all_of_the_folder(base, tmp_path, monkeypatch):
    asked = []

    def fetch_shards(n, folder, log):
        asked.append((n, folder))
        return ["first", "held out"]

    monkeypatch.setattr("nanochat_jax.data.shards.fetch_shards", fetch_shards)
    assert stage.shards_of(stage.BaseConfig(download=3)) == ["first", "held out"]
    assert stage.shards_of(stage.BaseConfig(download=1, data_dir=tmp_path)) == ["first", "held out"]
    assert asked == [(3, base / "base_data_climbmix"), (1, tmp_path)]
    assert len(stage.shards_of(stage.BaseConfig())) == 3


@pytest.mark.parametrize(
    ("total", "T", "devices", "given", "rows", "rounded"),
    [
        (524_288, 2048, 1, None, 32, 524_288),
        (8192, 2048, 1, None, 4, 8192),  # fewer than 32: all of it at once
        (40 * 512, 512, 1, None, 20, 40 * 512),  # the largest that divides 40
        (8192, 512, 8, None, 2, 8192),
        (512, 2048, 1, None, 1, 2048),  # at least one pass
        (65_536, 100, 1, None, 5, 131 * 500),
        (524_288, 2048, 6, None, 21, 2 * 6 * 21 * 2048),
        (8192, 512, 1, 3, 3, 5 * 3 * 512),
    ],
)
def test_a_device_takes_32_rows_or_as_many_as_divide_the_batch(total, T, devices, given, rows, rounded):
    cfg = stage.BaseConfig(max_seq_len=T, device_batch_size=given)
    found = stage.sized(cfg, total, devices)
    assert found == dataclasses.replace(cfg, device_batch_size=rows, total_batch_size=rounded)
    chosen = dataclasses.replace(cfg, total_batch_size=total)  # by the user, who is told where it does not fit
    assert stage.sized(chosen, total, devices) == dataclasses.replace(chosen, device_batch_size=rows)


def test_what_a_model_writes_does_not_reach_the_terminal_as_a_command():
    assert printable("é 漢\n\x1b[2Jx\x07") == "é 漢\\n\\x1b[2Jx\\x07"


def test_rates_are_scaled_but_for_the_fixed_one():
    recipe = scaling_laws.Recipe(2**17, 0.5, 2.0, 1, "")
    cfg = stage.BaseConfig(embedding_lr=0.2, unembedding_lr=0.01, matrix_lr=0.04, scalar_lr=0.6, weight_decay=0.1)
    plain = {"embedding_lr": 0.1, "unembedding_lr": 0.005, "matrix_lr": 0.02, "scalar_lr": 0.3}
    assert stage.groups_of(cfg, 256, recipe) == optim.default_groups(256, **plain, weight_decay=0.2)
