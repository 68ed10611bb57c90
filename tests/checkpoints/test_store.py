"""Checkpoints: what is restored is what was saved, damage is found and passed over, and models are found by tag."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanochat_jax import chat, nanochat_export, rl
from nanochat_jax import eval as evaluation
from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.checkpoints.find import Found, find_model, load_model
from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.distributed import mesh
from nanochat_jax.distributed import sharding as distributed_sharding
from nanochat_jax.model.gpt import GPT, abstract_gpt
from nanochat_jax.optim import groups as optim
from nanochat_jax.optim import groups as optim_groups
from nanochat_jax.rollouts.reference import load_reference
from nanochat_jax.train import step as train
from tests.support import tiny
from tests.support.commands import run_command

GOLDEN = Path(os.environ.get("NANOCHAT_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint at step 7 and what is in it. Copy the folder before changing it."""
    base = tmp_path_factory.mktemp("saved")
    folder = tiny.write_base(base)
    state, groups = tiny.random_state()
    return folder, state, groups


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def mesh_of(n):
    return mesh.make_mesh(devices=jax.devices()[:n])


def abstract_on(n, groups):
    return train.abstract_state(tiny.CONFIG, optim.make_optimizer(groups), mesh_of(n))


def assert_same(one, other):
    a, b = (distributed_sharding.flatten_by_path(tree) for tree in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(np.asarray(a[name]), np.asarray(b[name])), name


def simple_saves(folder, steps, keep=9):
    """Checkpoints of one small array; only what surrounds arrays is of interest."""
    saver = Saver(folder, keep)
    tx = optim.make_optimizer({"embedding": optim.AdamW(0.1, 0.9, 0.9, 0.0)})
    state = train.init_state({"wte": jnp.zeros((2, 2))}, tx)
    for step in steps:
        saver.save(step, train.state_items(state), lambda step=step: {"step": step})
    saver.wait()
    return saver


# ---------------------------------------------------------------------------------------------------------------------
# Save and restore


def test_a_state_comes_back_on_every_mesh_bit_for_bit(tmp_path, saved):
    _, state, groups = saved
    for n, source in ((8, 1), (1, 8), (4, 1)):
        folder = tmp_path / f"{source}-{n}"
        placed = train.place(state, abstract_on(source, groups))
        saver = Saver(folder)
        saver.save(7, train.state_items(placed._replace(bad_steps=placed.bad_steps + 3)), lambda: tiny.meta(groups))
        saver.wait()
        like = abstract_on(n, groups)
        restored = train.restore_state(folder / "7", like)
        assert_same(restored._replace(step=0, bad_steps=0), state._replace(step=0, bad_steps=0))
        assert (int(restored.step), int(restored.bad_steps)) == (7, 3)
        assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, like)


def test_parameters_are_sharded_on_eight_devices(saved):
    folder, _, groups = saved
    restored = train.restore_state(folder, abstract_on(8, groups))
    assert not restored.params["wte"].is_fully_replicated


def test_a_save_holds_the_state_as_it_was_although_the_next_step_overwrites_it(tmp_path, saved):
    _, state, groups = saved
    for n in (1, 8):
        live = train.place(state, abstract_on(n, groups))

        @partial(jax.jit, donate_argnums=0)
        def step(state):
            return jax.tree.map(lambda a: a + 1, state)

        saver = Saver(tmp_path / str(n))
        saver.save(1, train.state_items(live), lambda: tiny.meta(groups))
        for _ in range(3):
            live = step(live)
        jax.block_until_ready(live)
        saver.wait()
        assert_same(train.restore_state(tmp_path / str(n) / "1", abstract_on(n, groups)).params, state.params)


def test_meta_comes_back_as_it_was(tmp_path, saved):
    folder, _, groups = saved
    meta = store.read_meta(folder)
    assert optim_groups.groups_from_meta(meta["optimizer_groups"]) == groups
    assert type(tiny.CONFIG)(**meta["model_config"]) == tiny.CONFIG
    assert meta["user_config"] == tiny.SETTINGS
    assert {"jax", "nanochat_jax", "orbax-checkpoint"} <= store.versions().keys()


def test_the_newest_checkpoints_are_kept(tmp_path):
    simple_saves(tmp_path, [1, 2, 30, 4, 100], keep=2)  # 4 after 30: a run that went on from 2
    assert integrity.steps(tmp_path) == [30, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["100", "30"]
    with pytest.raises(ValueError, match="--keep-checkpoints must be at least 1, got 0"):
        Saver(tmp_path, 0)


def test_a_later_damaged_checkpoint_does_not_push_out_the_good_ones(tmp_path):
    simple_saves(tmp_path, [10, 20, 30])
    (tmp_path / "30" / "commit_success.txt").unlink()
    simple_saves(tmp_path, [25], keep=1)
    assert integrity.newest_intact(tmp_path, str) == 25


def test_a_step_that_is_saved_again_replaces_a_damaged_one(tmp_path):
    simple_saves(tmp_path, [5])
    (tmp_path / "5" / "commit_success.txt").unlink()
    simple_saves(tmp_path, [5])
    assert integrity.is_intact(tmp_path / "5")


# ---------------------------------------------------------------------------------------------------------------------
# The seal


def test_every_flipped_byte_truncation_and_deletion_is_found(tmp_path, saved):
    folder = copy_of(saved[0], tmp_path / "7")
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    kinds = {p.relative_to(folder).parts[0] for p in files}
    assert kinds == {"params", "optimizer", "meta", "_CHECKPOINT_METADATA", "commit_success.txt", integrity.MANIFEST}
    for path in files:
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        for bad in (bytes(flipped), good[:-1], b""):
            path.write_bytes(bad)
            assert not integrity.is_intact(folder), (path, len(bad))
        path.unlink()
        assert not integrity.is_intact(folder), path
        path.write_bytes(good)
        assert integrity.is_intact(folder)


def test_a_seal_that_is_not_one_seals_nothing(tmp_path, saved):
    folder = copy_of(saved[0], tmp_path / "7")
    nested = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    outside = b'{"/dev/zero": "0"}', b'{"../7": "0"}', b'{"a\\u0000": "0"}', b'{"meta": 1e999}'
    strange = b"", b"{}", b"[]", b"3", b'{"meta": 3}', b'{"meta": "x"}', b'{"meta/data.json": null}', b"\xff"
    for data in (*strange, *outside, nested):
        (folder / integrity.MANIFEST).write_bytes(data)
        assert not integrity.is_intact(folder), data


def test_a_file_of_the_users_beside_those_that_were_sealed_does_no_harm(tmp_path, saved):
    folder = copy_of(saved[0], tmp_path / "7")
    (folder / "notes.txt").write_text("my best one")
    assert integrity.is_intact(folder)


def test_the_newest_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path):
    simple_saves(tmp_path, [1, 2, 10])
    said = []
    assert integrity.newest_intact(tmp_path, said.append) == 10 and not said
    (tmp_path / "10" / "meta" / "data.json").write_text('{"step": 11}')
    assert integrity.newest_intact(tmp_path, said.append) == 2
    assert said == [f"WARNING: checkpoint {tmp_path}/10 is damaged; using the one before it"]
    for step in (1, 2):
        (tmp_path / str(step) / "meta" / "data.json").unlink()
    assert integrity.newest_intact(tmp_path, said.append) is None


def test_what_killed_saves_leave_behind_is_ignored_and_swept_away_but_nothing_else(tmp_path):
    simple_saves(tmp_path, [1])
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-1700", "4.deleted", "5", "mine.deleted", "notes"):
        (tmp_path / name / "params").mkdir(parents=True)
    simple_saves(tmp_path, [6])
    (tmp_path / "6" / integrity.MANIFEST).unlink()  # killed after Orbax was done
    shutil.copytree(tmp_path / "6", tmp_path / "²")
    shutil.copy(tmp_path / "1" / integrity.MANIFEST, tmp_path / "²")
    assert integrity.steps(tmp_path) == [1] and integrity.newest_intact(tmp_path) == 1
    integrity.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "5", "mine.deleted", "notes", "²"]
    simple_saves(tmp_path, [5])
    assert integrity.newest_intact(tmp_path) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Finding a model


def fake_nanochat(folder, *steps):
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / f"model_{step:06d}.pt").touch()
        (folder / f"meta_{step:06d}.json").touch()


def saved_at(seconds, *files):
    for file in files:
        os.utime(file, (seconds, seconds))


def test_the_default_is_the_model_saved_last_and_its_last_step(base):
    root = base / "base_checkpoints"
    for tag, steps in {"d4": [100, 20], "d20": [7, 5], "mine": [999], "notes": []}.items():
        fake_nanochat(root / tag, *steps)
        saved_at(1000, *(root / tag).glob("*.pt"))
    assert find_model("base") == Found(root / "d20", 7, False, among=3)  # of equal age, as after a copy: the deepest
    assert str(find_model("base")).endswith("model_000007.pt, the newest of 3 (--model-tag names another)")
    saved_at(2000, root / "mine" / "model_000999.pt")
    assert find_model("base", base=base).tag == "mine"
    saved_at(3000, root / "d4" / "model_000100.pt")
    saved_at(4000, root / "mine" / "meta_000999.json")  # is no checkpoint
    assert find_model("base") == Found(root / "d4", 100, False, among=3)
    assert find_model("base", "d20") == Found(root / "d20", 7, False)
    assert find_model("base", "d4", 20) == Found(root / "d4", 20, False)
    (root / "d4" / "meta_000100.json").unlink()  # nanochat was killed while it saved
    assert find_model("base").step == 20


def test_a_folder_without_an_intact_checkpoint_is_no_default(base, capsys):
    root = base / "chatsft_checkpoints"
    simple_saves(root / "d2", [5])
    (root / "d9").mkdir()
    assert find_model("sft") == Found(root / "d2", 5, True)
    simple_saves(root / "broken", [7])
    (root / "broken" / "7" / "meta" / "data.json").unlink()
    assert find_model("sft") == Found(root / "d2", 5, True, among=2)
    said = capsys.readouterr().out
    assert (
        f"WARNING: no intact checkpoint in {root / 'broken'}" in said and "looking at the one saved before it" in said
    )


def test_of_both_formats_the_later_step_counts_and_of_equal_ones_ours(base):
    folder = base / "chatsft_checkpoints" / "d2"
    simple_saves(folder, [5, 30])
    fake_nanochat(folder, 7, 200, 30)
    assert find_model("sft") == Found(folder, 200, False)
    (folder / "model_000200.pt").unlink()
    assert find_model("sft") == Found(folder, 30, True)
    assert find_model("sft", step=7) == Found(folder, 7, False)
    assert find_model("sft", step=5) == Found(folder, 5, True)


def test_a_damaged_checkpoint_of_ours_is_named_and_passed_over(base, capsys):
    folder = base / "chatsft_checkpoints" / "d2"
    simple_saves(folder, [5, 30])
    (folder / "30" / "meta" / "data.json").unlink()
    assert find_model("sft").step == 5
    assert f"WARNING: checkpoint {folder}/30 is damaged and is passed over" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no intact checkpoint in .* at --model-step=30"):
        find_model("sft", step=30)
    (folder / "5" / "meta" / "data.json").unlink()
    fake_nanochat(folder, 2)
    assert find_model("sft") == Found(folder, 2, False)


def test_whoever_does_not_read_the_optimizer_does_not_hash_it(base, monkeypatch):
    """chat, eval and RL: two thirds of a checkpoint. A warm start and a run that goes on do."""
    folder = base / "chatsft_checkpoints" / "d2"
    simple_saves(folder, [5, 30])
    read, hashed = integrity.hashlib.file_digest, []
    monkeypatch.setattr(integrity.hashlib, "file_digest", lambda f, kind: hashed.append(f.name) or read(f, kind))
    assert find_model("sft").step == 30
    assert any("/params/" in name for name in hashed) and not any("/optimizer/" in name for name in hashed)
    (folder / "30" / "optimizer" / "_METADATA").write_text("{}")
    assert find_model("sft").step == 30
    assert find_model("sft", optimizer=True).step == 5 == integrity.newest_intact(folder, str)


def test_what_is_missing_is_named_with_what_there_is(base):
    with pytest.raises(FileNotFoundError, match=r"no base model: .* set NANOCHAT_BASE_DIR to the folder that"):
        find_model("base")
    fake_nanochat(base / "base_checkpoints" / "d4", 3, 9)
    (base / "base_checkpoints" / "d6").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--model-tag=d5: .* does not exist; tags in .*: d4, d6"):
        find_model("base", "d5")
    with pytest.raises(FileNotFoundError, match=r"--model-step=4 is not in .*; its steps: \[3, 9\]"):
        find_model("base", "d4", 4)
    with pytest.raises(FileNotFoundError, match=r"no intact checkpoint in .*d6: pass another --model-tag"):
        find_model("base", "d6")
    (base / "base_checkpoints" / "d6" / "model_000001.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"meta_000001.json is missing"):
        find_model("base", "d6")
    (base / "chatsft_checkpoints" / "d6").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no sft model in .*: train one, or set NANOCHAT_BASE_DIR"):
        find_model("sft")
    with pytest.raises(ValueError, match="must be one of base, mid, sft, rl, got 'middle'"):
        find_model("middle")


def test_the_middle_stage_of_the_first_eras_is_found(base):
    fake_nanochat(base / "mid_checkpoints" / "d4", 3)
    assert find_model("mid") == Found(base / "mid_checkpoints" / "d4", 3, False)


def test_a_meta_file_without_its_sizes_is_refused_by_name(base):
    folder = base / "base_checkpoints" / "d4"
    fake_nanochat(folder, 3)
    (folder / "meta_000003.json").write_text(json.dumps({"model_config": {"n_layer": 4, "vocab_size": 9}}))
    with pytest.raises(ValueError, match=r"meta_000003.json: model_config must have an integer sequence_len"):
        find.peek_meta(find_model("base"))


# ---------------------------------------------------------------------------------------------------------------------
# Loading a model, and starting from one


def logits_of(params):
    graphdef, _ = abstract_gpt(tiny.CONFIG)
    model: GPT = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    return jax.jit(lambda ids: model(ids))(IDS)


IDS = jnp.arange(32, dtype=jnp.int32).reshape(2, 16) * 7


def test_load_model_gives_the_same_model_from_our_format_and_from_nanochats(base):
    params = tiny.write_nanochat_base(base)
    tiny.write_base(base, "d1")
    (base / "base_checkpoints" / "d1").rename(base / "chatsft_checkpoints_d1")
    (base / "chatsft_checkpoints").mkdir()
    (base / "chatsft_checkpoints_d1").rename(base / "chatsft_checkpoints" / "d2")
    expected = logits_of(params)
    for source in ("base", "sft"):
        model, tokenizer, meta = load_model(source)
        logits = jax.jit(lambda ids, model=model: model(ids))(IDS)
        assert logits.shape == (2, 16, 265) and logits.dtype == jnp.float32
        assert np.array_equal(np.asarray(logits), np.asarray(expected)), source
        assert tokenizer.digest() == tiny.tokenizer().digest()
        assert meta["user_config"] == tiny.SETTINGS
    in_bfloat16 = load_model("sft", dtype=jnp.bfloat16)[0]
    assert in_bfloat16.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda ids: in_bfloat16(ids), IDS).dtype == jnp.float32


def test_the_files_of_nanochat_are_not_touched_by_reading_them(base):
    tiny.write_nanochat_base(base)
    folder = base / "base_checkpoints" / "d2"
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    load_model("base")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


def test_a_warm_start_takes_our_optimizer_state_and_its_betas_but_not_its_rates(base, saved):
    folder, state, groups = saved
    ours = optim.scale_rates(groups, 0.1)
    ours["embedding"] = optim.AdamW(0.5, 0.1, 0.2, 0.3)
    got, arrays = find.load_optimizer(Found(folder.parent, 7, True), tiny.CONFIG, ours)
    assert got["embedding"] == optim.AdamW(0.5, groups["embedding"].b1, groups["embedding"].b2, 0.001)
    assert got["matrix"].lr == ours["matrix"].lr
    like = abstract_on(8, got).opt_state
    placed = train.place(optim.with_state_arrays(like, arrays), like)
    assert_same(placed, state.opt_state)


def test_a_checkpoint_without_optimizer_gives_none(tmp_path, saved):
    folder = copy_of(saved[0], tmp_path / "7")
    shutil.rmtree(folder / "optimizer")
    assert find.load_optimizer(Found(tmp_path, 7, True), tiny.CONFIG, saved[2]) is None
    tiny.write_nanochat_base(tmp_path)
    assert find.load_optimizer(find_model("base"), tiny.CONFIG, saved[2]) is None


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs nanochat's own files: ../shared/golden or NANOCHAT_GOLDEN")
def test_a_warm_start_from_nanochats_own_files():
    found = find_model("base", base=GOLDEN / "checkpoints" / "c1_master")
    config, params, _ = find.load_params(found)
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02}
    groups = optim.default_groups(config.n_embd, **rates)
    got, arrays = find.load_optimizer(found, config, groups)
    assert {name: group.lr for name, group in got.items()} == {name: group.lr for name, group in groups.items()}
    like = train.abstract_state(config, optim.make_optimizer(got), mesh_of(8))
    opt_state = train.place(optim.with_state_arrays(like.opt_state, arrays), like.opt_state)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(opt_state))
    train.place(params, like.params)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are none


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A base directory whose model has three numbers that are none in a parameter, one in its optimizer's state."""
    base = tmp_path_factory.mktemp("broken")
    tiny.tokenizer().save(base / "tokenizer")
    state, groups = tiny.random_state()
    items = {name: {path: np.array(x) for path, x in item.items()} for name, item in train.state_items(state).items()}
    items["params"]["lm_head"].flat[[0, 70, -1]] = np.nan, np.inf, -np.inf
    meta = tiny.meta(groups, step=7, tokenizer=tiny.tokenizer().digest())
    store.write(base / "base_checkpoints" / "d2" / "7", items["params"], items["optimizer"], meta)
    return base


IN_MODEL = "lm_head in params must be finite, but 3 of its 20,480 numbers are not: pass another --model-tag"


def commands():
    rl_flags = ["--source", "base", "--task", "arithmetic", "--examples-per-step", "2", "--num-samples", "2"]
    rl_flags += ["--num-steps", "1", "--max-new-tokens", "4", "--eval-every", "-1", "--mesh", "data=1"]
    return {
        "chat": (chat.main, chat.ChatConfig, ["-i", "base", "-p", "hello"]),
        "eval": (evaluation.main, evaluation.EvalConfig, ["-i", "base", "-a", "Arithmetic", "-x", "2"]),
        "rl": (rl.main, rl.RLConfig, rl_flags),
        "nanochat_export": (
            nanochat_export.main,
            nanochat_export.ExportConfig,
            ["--source", "base", "--output", "theirs"],
        ),
    }


@pytest.mark.parametrize("name", commands())
def test_no_command_takes_a_model_whose_numbers_are_not_finite(broken, tmp_path, monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(broken))
    monkeypatch.chdir(tmp_path)
    main, settings, argv = commands()[name]
    code = run_command(main, settings, *argv)
    assert isinstance(code, str) and IN_MODEL in code and "\n" not in code, code


def test_no_function_takes_a_model_whose_numbers_are_not_finite(broken, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(broken))
    with pytest.raises(ValueError, match=IN_MODEL):
        load_model("base")
    with pytest.raises(ValueError, match=IN_MODEL):
        load_reference("base", "d2", 7, None, None)


def test_optimizer_state_that_is_not_finite_is_refused(base, saved):
    _, state, groups = saved
    items = {name: dict(item) for name, item in train.state_items(state).items()}
    name = next(name for name, array in items["optimizer"].items() if np.size(array) > 1)
    items["optimizer"][name] = np.full_like(items["optimizer"][name], np.nan)
    store.write(base / "base_checkpoints" / "d2" / "7", items["params"], items["optimizer"], tiny.meta(groups, step=7))
    found = find_model("base")
    with pytest.raises(ValueError, match=f"{name} in optimizer must be finite"):
        find.load_optimizer(found, tiny.CONFIG, groups)
    with pytest.raises(ValueError, match=f"{name} in optimizer must be finite"):
        nanochat_export.load_optimizer_state(found, tiny.CONFIG, store.read_meta(found.folder / "7"))


def test_what_a_checkpoint_records_is_json(base, saved):
    """Also where a measurement is not finite: other programs read these files."""
    _, state, groups = saved
    saver = Saver(base / "base_checkpoints" / "d2")
    saver.save(
        7, train.state_items(state), lambda: tiny.meta(groups, step=7, val_bpb=float("inf"), nested=[float("nan"), 1.5])
    )
    saver.wait()
    saver.add_to_meta(7, {"pass@1": float("nan"), "pass@2": 0.5})
    saver.wait()
    meta = store.read_meta(saver.folder / "7")
    assert (meta["val_bpb"], meta["nested"], meta["pass@1"], meta["pass@2"]) == (None, [None, 1.5], None, 0.5)
    for file in saver.folder.rglob("*"):
        if file.is_file() and file.suffix in ("", ".json") and file.read_bytes()[:1] == b"{":
            json.loads(file.read_bytes(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
