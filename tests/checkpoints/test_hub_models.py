"""Models of the hub, played by a server on loopback: every layout is found, and only what is needed is downloaded.

Run: python -m pytest tests/checkpoints/test_hub_models.py
"""

import json

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from nanochat_jax import nanochat_import
from nanochat_jax.checkpoints import find, locate, store
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files.download import DownloadError
from nanochat_jax.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.loopback import COMMIT, Answer, file_answer, isolate, serve_model, servers, use_hub
from tests.support.transformers_files import EARLY, write_transformers


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    forget()
    yield isolate(monkeypatch, tmp_path)
    forget()


def forget():
    """What a process remembers of the hub."""
    locate._on_hub.cache_clear()
    locate._find_on_hub.cache_clear()


@pytest.fixture
def server(monkeypatch):
    with servers(1) as (made,):
        use_hub(monkeypatch, made.url)
        yield made


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(files of a base directory of nanochat's with two steps: path -> bytes, the parameters of the last)."""
    base = tmp_path_factory.mktemp("theirs")
    tiny.write_nanochat_base(base, step=5, seed=5)
    params = tiny.write_nanochat_base(base, step=7)
    (base / "base_checkpoints" / "d2" / "optim_000007_rank0.pt").write_bytes(b"state")
    return contents(base), params


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flat(files, meta=None):
    """The same files in one folder."""
    files = {path.rpartition("/")[2]: body for path, body in files.items()}
    return files | ({"meta_000007.json": json.dumps(meta).encode()} if meta else {})


def below(prefix, files):
    return {f"{prefix}/{path}": body for path, body in files.items()}


def fetched(server):
    """Names of the files that were downloaded."""
    return sorted(path.partition("/resolve/")[2].split("/", 1)[1] for path in server.paths() if "/resolve/" in path)


def assert_same(params, found):
    got = flatten_by_path(find.load_params(found)[1])
    for name, leaf in flatten_by_path(params).items():
        assert np.array_equal(got[name], leaf), name


# ---------------------------------------------------------------------------------------------------------- the layouts
def test_of_a_tree_the_last_step_and_the_tokenizer_are_downloaded_and_nothing_else(server, theirs, tmp_path, capsys):
    serve_model(server, "o/n", theirs[0] | below("chatsft_checkpoints/d2", {"model_000009.pt": b"", "README.md": b""}))
    found = find.find_model("base", base="hub:o/n")
    assert_same(theirs[1], found)
    model = "base_checkpoints/d2"
    assert fetched(server) == [f"{model}/meta_000007.json", f"{model}/model_000007.pt", "tokenizer/tokenizer.json"]
    assert (found.source, found.tag, found.step, found.transformers) == ("base", "d2", 7, False)
    assert str(found.folder).startswith(str(tmp_path / "hf")) and not (tmp_path / "base").exists()
    assert Tokenizer.load(found.tokenizer).digest() == tiny.tokenizer().digest()
    said = capsys.readouterr().out
    assert f"hub:o/n: a base directory, base model d2, step 7; commit {COMMIT}" in said
    asked = len(server.requests)
    forget()
    find.find_model("base", base="hub:o/n")
    assert len(server.paths()) == asked + 2 - sum(path.startswith("HEAD") for path, _ in server.requests[:asked])


def test_the_optimizer_is_downloaded_where_it_is_going_to_be_read(server, theirs):
    serve_model(server, "o/n", theirs[0])
    find.find_model("base", base="hub:o/n", optimizer=True)
    assert "base_checkpoints/d2/optim_000007_rank0.pt" in fetched(server)


def test_an_earlier_step_and_another_tag_are_named_by_their_flags(server, theirs, capsys):
    other = {path.replace("/d2/", "/d12/"): body for path, body in theirs[0].items() if "000007" in path}
    serve_model(server, "o/n", theirs[0] | other)
    assert find.find_model("base", "d2", 5, "hub:o/n").step == 5
    found = find.find_model("base", base="hub:o/n")
    assert (found.tag, found.step) == ("d12", 7)
    assert "of the tags d12, d2 (--model-tag names another)" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["hub:o/n", "hub:o/n/runs/x", "hub:o/n/runs", "hub:o/n/runs/x/base_checkpoints/d2"])
def test_a_tree_may_lie_in_a_folder_which_a_prefix_need_not_name_where_it_is_the_only_one(server, theirs, address):
    serve_model(server, "o/n", below("runs/x", theirs[0]) | {"README.md": b"x"})
    found = find.find_model("base", base=address)
    assert (found.tag, found.step, found.base.name) == ("d2", 7, f"hub:o/n@{COMMIT}/runs/x")
    assert_same(theirs[1], found)


def test_the_tokenizer_of_a_folder_above_is_found(server, theirs):
    moved = {path if "tokenizer" in path else f"runs/x/{path}": body for path, body in theirs[0].items()}
    serve_model(server, "o/n", moved)
    assert Tokenizer.load(find.find_model("base", base="hub:o/n/runs/x").tokenizer).vocab_size == 265


def test_a_flat_repository_holds_one_model_whose_stage_its_metadata_tells(server, theirs, capsys):
    sizes = json.loads(theirs[0]["base_checkpoints/d2/meta_000007.json"])["model_config"]
    for meta, stage in (
        ({"model_config": sizes}, "rl"),
        ({"step": 7, "val_loss": 1.0, "model_config": sizes}, "sft"),
        ({"step": 7, "model_config": sizes, "user_config": {"depth": 2}}, "base"),
        ({"step": 7, "model_config": sizes}, "mid"),  # does not tell: what was asked for
    ):
        serve_model(server, f"o/{stage}", flat(theirs[0], meta))
        found = find.find_model("mid", base=f"hub:o/{stage}")
        assert (found.source, found.tag, found.step) == (stage, f"o--{stage}", 7)
        assert_same(theirs[1], found)
    assert "hub:o/sft: nanochat's files of one model, sft model o--sft, step 7" in capsys.readouterr().out


def test_the_form_of_transformers_is_found_and_its_shards(server, tmp_path, capsys):
    for name, shards in (("one", 1), ("three", 3)):
        params = write_transformers(tmp_path / name, shards=shards)
        serve_model(server, f"o/{name}", contents(tmp_path / name) | {"tf_model.h5": b"x", "model.onnx": b"x"})
        found = find.find_model("sft", base=f"hub:o/{name}")
        assert (found.source, found.tag, found.step, found.transformers) == ("sft", f"o--{name}", 0, True)
        assert find.load_config(found) == EARLY
        assert_same(params, found)
        find.check_tokenizer(Tokenizer.load(found.tokenizer), find.peek_meta(found))
        assert find.load_optimizer(found, EARLY, {}) is None
    assert not {"tf_model.h5", "model.onnx"} & set(fetched(server))
    assert "hub:o/one: the form of transformers, sft model o--one, step 0" in capsys.readouterr().out


def test_checkpoints_of_our_own_are_read_from_a_repository_too(server, tmp_path):
    tiny.write_base(tmp_path / "ours")
    serve_model(server, "o/n", contents(tmp_path / "ours"))
    found = find.find_model("base", base="hub:o/n")
    assert found.ours and (found.tag, found.step) == ("d2", 7)
    assert_same(jax.tree.map(np.asarray, tiny.random_state()[0].params), found)
    assert not any("/7/optimizer/" in path for path in fetched(server))


def test_a_revision_is_a_branch_a_pull_request_or_a_commit(server, theirs, capsys):
    for revision, commit in (("refs/pr/1", "a" * 40), ("v1", "b" * 40), ("feature/x", "d" * 40)):
        serve_model(server, "o/n", flat(theirs[0]), revision, commit)
        address = f"hub:o/n@{revision.replace('feature/', 'feature%2F')}"
        assert find.find_model("base", base=address).base.name == f"hub:o/n@{commit}"
        assert f"commit {commit}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- failures
def refusal(base="hub:o/n", source="base", error=ValueError, **which):
    with pytest.raises(error) as e:
        find.find_model(source, base=base, **which)
    message = str(e.value)
    assert message.startswith(f"--base={base}") and "\n" not in message
    return message


def test_what_a_repository_does_not_have_is_said_with_what_it_has(server, theirs):
    serve_model(server, "o/n", theirs[0])
    assert "has no sft model, its stages are base: name one with --source" in refusal(source="sft")
    assert "has no base model with --model-tag=d9, its tags are d2" in refusal(model_tag="d9")
    assert "has no --model-step=6 in base_checkpoints/d2, its steps are 5, 7" in refusal(step=6)
    serve_model(server, "o/empty", {"README.md": b"x", "onnx/model.onnx": b"x"})
    assert "has no model: neither" in (said := refusal("hub:o/empty")) and "it has README.md, onnx" in said
    serve_model(server, "o/two", below("a", flat(theirs[0])) | below("b", theirs[0]))
    assert "has models in several folders, so name one, as hub:OWNER/NAME[@REVISION][/PREFIX]: a, b" in refusal(
        "hub:o/two"
    )
    serve_model(server, "o/mute", {name: body for name, body in flat(theirs[0]).items() if "token" not in name})
    assert "has no tokenizer.json or tokenizer.pkl beside the model" in refusal("hub:o/mute")
    serve_model(server, "o/flat", flat(theirs[0]))
    assert "holds one model only: leave --model-tag=d2 out" in refusal("hub:o/flat", model_tag="d2")


@pytest.mark.parametrize("address", ["hub:o", "hub:o/n@", "hub:o/n@a@b", "hub:o/../n", "hub:o/n/../../x", "hub:/o/n"])
def test_an_address_that_is_none_is_refused_before_the_hub_is_asked(server, address):
    assert "must be hub:OWNER/NAME[@REVISION][/PREFIX], such as" in refusal(address)
    assert server.requests == []


def test_a_repository_that_does_not_exist_or_needs_a_token_is_a_sentence(server, theirs, monkeypatch):
    addresses = serve_model(server, "o/n", flat(theirs[0]))
    assert "model o/x (main) does not exist (404 Not Found): check the name" in refusal("hub:o/x", error=DownloadError)
    server.answers[addresses.revision] = Answer(b"", 401)
    assert "set HF_TOKEN, or check the name" in refusal(error=DownloadError)
    serve_model(server, "o/n", flat(theirs[0]))
    server.answers[addresses.file("model_000007.pt", "main")] = Answer(b"", 403)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = refusal(error=DownloadError)
    assert "model_000007.pt of model o/n (main) answered 403" in said and "hf_secret" not in said


def test_a_transfer_that_breaks_off_is_gone_on_with(server, theirs, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what the library keeps are whole chunks
    addresses = serve_model(server, "o/n", flat(theirs[0]))
    body, address = theirs[0]["base_checkpoints/d2/model_000007.pt"], addresses.file("model_000007.pt", "main")
    rest = {"Content_Range": f"bytes 1000-{len(body) - 1}/{len(body)}"}
    server.answers[address] = [file_answer(body, sent=1000), file_answer(body, status=206, begin=1000, **rest)]
    server.answers[f"HEAD {address}"] = file_answer(body)
    assert_same(theirs[1], find.find_model("base", base="hub:o/n"))
    asked = [headers.get("Range") for path, headers in server.requests if path == address]
    assert asked[1:] == ["bytes=1000-"]


def test_a_transfer_that_breaks_off_every_time_is_said_and_what_arrived_stays(server, theirs):
    addresses = serve_model(server, "o/n", flat(theirs[0]))
    body, address = theirs[0]["base_checkpoints/d2/model_000007.pt"], addresses.file("model_000007.pt", "main")
    server.answers[address] = file_answer(body, sent=1000)
    assert "model_000007.pt of model o/n (main) broke off" in refusal(error=DownloadError)
    server.answers[address] = file_answer(body)
    forget()
    assert_same(theirs[1], find.find_model("base", base="hub:o/n"))
    assert fetched(server).count("tokenizer.json") == 1


def test_a_file_may_lie_at_another_address(server, theirs):
    addresses = serve_model(server, "o/n", flat(theirs[0]))
    body, address = theirs[0]["base_checkpoints/d2/model_000007.pt"], addresses.file("model_000007.pt", "main")
    with servers(1) as (storage,):
        linked = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": '"e"', "X_Linked_Size": str(len(body))}
        far = storage.url.replace("127.0.0.1", "localhost") + "/blob?signature=s"
        server.answers[address] = Answer(b"", 302, Location=far, **linked)
        storage.answers["/blob?signature=s"] = Answer(body)
        assert_same(theirs[1], find.find_model("base", base="hub:o/n"))


def test_a_repository_that_changes_meanwhile_is_said(server, theirs):
    addresses = serve_model(server, "o/n", flat(theirs[0]))
    server.answers[addresses.file("model_000007.pt", "main")] = file_answer(b"newer", commit="e" * 40)
    assert "has changed while it was downloaded: start again" in refusal(error=DownloadError)


def test_offline_the_cache_is_enough_and_what_it_lacks_is_said(server, theirs, monkeypatch):
    serve_model(server, "o/n", flat(theirs[0]))
    find.find_model("base", base="hub:o/n")
    asked = len(server.requests)
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(theirs[1], find.find_model("base", base="hub:o/n"))
    assert "HF_HUB_OFFLINE is set: unset it" in refusal("hub:o/other", error=DownloadError)
    assert len(server.requests) == asked


def test_a_path_that_leads_out_of_the_repository_is_refused(server, theirs, tmp_path):
    files = flat(theirs[0])
    serve_model(server, "o/n", below("../../../x", files))
    assert "Invalid filename" in refusal(error=DownloadError)
    assert not list(tmp_path.rglob("model_000007.pt"))


# ----------------------------------------------------------------------------------------------------------- conversion
def test_a_repository_is_converted_with_one_model_of_each_stage(server, theirs, tmp_path):
    sft = {path.replace("base_check", "chatsft_check"): body for path, body in theirs[0].items() if "optim" not in path}
    files = {path: body for path, body in theirs[0].items() if "optim" not in path} | sft
    serve_model(server, "o/n", files)
    to = tmp_path / "ours"
    argv = ["hub:o/n", "--to", to]
    assert run_command(nanochat_import.main, nanochat_import.ImportConfig, *argv) == 0
    assert sorted(p.relative_to(to).as_posix() for p in to.glob("*/*/*") if p.is_dir()) == [
        "base_checkpoints/d2/7",
        "chatsft_checkpoints/d2/7",
    ]
    assert_same(theirs[1], find.find_model("sft", base=to))


def test_a_single_model_is_converted_where_its_stage_is_told(server, tmp_path):
    params = write_transformers(tmp_path / "files")
    serve_model(server, "o/n", contents(tmp_path / "files"))
    run = [nanochat_import.main, nanochat_import.ImportConfig, "--to", tmp_path / "ours"]
    for src in ("hub:o/n", tmp_path / "files"):
        assert f"{src} does not tell which stage made its model: name it with --source" in run_command(*run, src)
    assert run_command(*run, "hub:o/n", "--as", "sft") == 0
    found = find.find_model("sft", "o--n", base=tmp_path / "ours")
    assert found.ours and found.step == 0
    assert_same(params, found)
    meta = store.read_meta(found.folder / "0")
    assert meta["tokenizer"] == Tokenizer.load(tmp_path / "files").digest() and "nanochat_meta" not in meta
    assert run_command(*run, tmp_path / "files", "--source", "rl") == 0
    assert_same(params, find.find_model("rl", "files", base=tmp_path / "ours"))
