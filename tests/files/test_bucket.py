"""A base directory in a bucket: what is kept there survives the machine, whatever moment it is killed at.

The bucket is tests/support/fake_gcs.py, on loopback.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from nanochat_jax import eval as nanochat_eval
from nanochat_jax import report, sft
from nanochat_jax.checkpoints import find, integrity, store
from nanochat_jax.checkpoints.ownership import Token
from nanochat_jax.checkpoints.saver import Saver
from nanochat_jax.data import shards as documents
from nanochat_jax.files import bucket, paths
from nanochat_jax.rollouts.log import RolloutLog
from nanochat_jax.tasks.hub import find_file, split_files
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.tokenizer import __main__ as train_tokenizer
from nanochat_jax.train import step as train_step
from nanochat_jax.train.metrics import MetricsLog, read_metrics
from nanochat_jax.train.start import Start, find_run, hold_folder
from tests.reports.folders import answer
from tests.support import tiny
from tests.support.fake_gcs import FakeGCS
from tests.support.process_runs import Processes, free_port
from tools.check import kill_resume

pytestmark = pytest.mark.skipif(find_spec("gcsfs") is None, reason="gcsfs is not installed")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server():
    """One for all tests of this process: the clients' libraries ask for its address once."""
    with FakeGCS("bucket") as server:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield server
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


def machine(patch, folder):
    """A machine's local disk, and nothing remembered."""
    patch.setenv("NANOCHAT_LOCAL_DIR", str(folder))
    bucket.connect.cache_clear()
    paths._copy_with_tokenizer.cache_clear()


@pytest.fixture
def cloud(server, tmp_path, monkeypatch):
    """An empty base directory gs://bucket/base, seen from a machine with an empty disk."""
    server.objects["bucket"].clear()
    server.requests.clear()
    server.fail_every, server.refuse, server.on_write = 0, None, lambda name: None
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "gs://bucket/base")
    machine(monkeypatch, tmp_path / "disk")
    yield server
    bucket.connect.cache_clear()
    paths._copy_with_tokenizer.cache_clear()


def put(server, folder, name="base"):
    for path in folder.rglob("*"):
        if path.is_file():
            server.put("bucket", f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def get(server, name, folder):
    for key in server.names("bucket", f"{name}/"):
        path = folder / key.removeprefix(f"{name}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.read("bucket", key))
    return folder


@pytest.fixture(scope="module")
def state():
    state, groups = tiny.random_state()
    return state, tiny.meta(groups)


def save(saver, step, state):
    saver.save(step, train_step.state_items(state[0]), lambda: state[1] | {"step": step})
    saver.wait()


# ---------------------------------------------------------------------------------------------------------- checkpoints
def test_a_checkpoint_is_written_found_and_restored_in_the_bucket_bit_for_bit(cloud, state):
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    cloud.fail_every = 61  # a service that is busy now and then
    saver = Saver(folder, keep=1)
    save(saver, 1, state)
    save(saver, 2, state)
    assert integrity.steps(folder) == [2] == [integrity.newest_intact(folder)]
    assert not cloud.names("bucket", "base/chatsft_checkpoints/d2/1/")
    found = find.find_model("sft")
    assert str(found) == "gs://bucket/base/chatsft_checkpoints/d2/2" and find.peek_meta(found)["step"] == 2
    assert find.identity(found).startswith("d2, step 2, ")
    cloud.fail_every = 0
    back = train_step.restore_state(folder / "2", state[0])
    for ours, theirs in zip(jax.tree.leaves(back.params), jax.tree.leaves(state[0].params), strict=True):
        assert np.array_equal(ours, theirs)


def test_what_a_killed_save_has_left_is_no_checkpoint_and_is_swept(cloud, state):
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    saver = Saver(folder)
    save(saver, 1, state)
    save(saver, 2, state)
    whole = {name: cloud.read("bucket", name) for name in cloud.names("bucket", "base/chatsft_checkpoints/d2/2/")}
    assert len(whole) > 10
    for last in sorted(whole):  # with any object missing
        cloud.objects["bucket"].pop(last)
        assert integrity.newest_intact(folder, lambda _: None) == 1
        cloud.put("bucket", last, whole[last])
    assert integrity.newest_intact(folder) == 2
    cloud.objects["bucket"].pop("base/chatsft_checkpoints/d2/2/INTEGRITY.json")
    integrity.sweep(folder)
    assert not cloud.names("bucket", "base/chatsft_checkpoints/d2/2/") and integrity.newest_intact(folder) == 1


def test_an_object_that_was_replaced_makes_the_checkpoint_damaged_and_a_service_that_fails_does_not(cloud, state):
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    save(Saver(folder), 1, state)
    cloud.refuse = 403
    with pytest.raises(OSError, match="Forbidden"):
        integrity.is_intact(folder / "1")
    cloud.refuse = None
    assert integrity.is_intact(folder / "1")
    cloud.put("bucket", "base/chatsft_checkpoints/d2/1/meta/data.json", b"{}")
    assert not integrity.is_intact(folder / "1")


def test_checkpoints_are_copied_from_the_bucket_to_a_disk_and_back(cloud, state, tmp_path):
    save(Saver(paths.kept_dir() / "chatsft_checkpoints" / "d2"), 1, state)
    here = get(cloud, "base", tmp_path / "here")
    assert find.find_model("sft", base=here).step == 1
    damaged = here / "chatsft_checkpoints" / "d2" / "1" / "meta" / "data.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2"))
    assert not integrity.is_intact(damaged.parents[1])
    put(cloud, tiny.write_base(tmp_path / "made").parents[2], "base")
    assert str(find.find_model("base")) == "gs://bucket/base/base_checkpoints/d2/7"


def test_the_run_that_started_last_owns_the_folder(cloud, state):
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    lost = Saver(folder, owner=Token(folder))
    save(lost, 1, state)
    save(Saver(folder, owner=Token(folder)), 2, state)
    with pytest.raises(OSError, match="another run has started in gs://bucket/base/chatsft_checkpoints/d2: this one"):
        lost.save(2, train_step.state_items(state[0]), lambda: state[1])
    assert integrity.newest_intact(folder) == 2


def test_nanochat_s_own_checkpoints_are_fetched(cloud, tmp_path):
    tiny.write_nanochat_base(tmp_path / "theirs")
    put(cloud, tmp_path / "theirs")
    found = find.find_model("base")
    assert not found.ours and found.folder.is_relative_to(tmp_path / "disk")
    config, params, _ = find.load_params(found)
    assert config.n_layer == 2 and len(jax.tree.leaves(params)) > 10


def test_nanochat_s_checkpoints_are_converted_into_a_bucket(cloud, tmp_path):
    tiny.write_nanochat_base(tmp_path / "theirs")
    command = [
        sys.executable,
        "-m",
        "nanochat_jax.nanochat_import",
        str(tmp_path / "theirs"),
        "--to",
        "gs://bucket/new",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "NANOCHAT_BASE_DIR=gs://bucket/new" in done.stdout, done.stderr
    assert str(find.find_model("base", base=bucket.as_path("gs://bucket/new"))) == (
        "gs://bucket/new/base_checkpoints/d2/7"
    )
    assert "new/tokenizer/tokenizer.json" in cloud.names("bucket")
    assert Tokenizer.load(bucket.as_path("gs://bucket/new/tokenizer")).digest() == tiny.tokenizer().digest()


def test_of_tags_the_one_changed_last_is_taken(cloud):
    for tag in ("old", "new", "older"):
        cloud.put("bucket", f"base/base_checkpoints/{tag}/1/INTEGRITY.json", b"{}")
    assert find.tags_by_time(paths.kept_dir() / "base_checkpoints")[0] == "older"


# ----------------------------------------------------------------------------------------------------- metrics, answers
def test_metrics_reach_the_bucket_with_every_checkpoint_and_go_on_from_there(cloud, tmp_path, monkeypatch):
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    log = MetricsLog(folder, "dummy", {}, project="test", resumed_at=None)
    log.log(1, loss=1.0)
    log.sync()
    log.log(2, loss=2.0)  # lost with the machine
    log.file.close()
    machine(monkeypatch, tmp_path / "another")
    folder = paths.kept_dir() / "chatsft_checkpoints" / "d2"
    log = MetricsLog(folder, "dummy", {}, project="test", resumed_at=1)
    log.log(2, loss=3.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl")] == [(1, 1.0), (2, 3.0)]


def test_answers_are_cut_to_those_of_the_checkpoint_on_another_machine(cloud, tmp_path, monkeypatch):
    folder = paths.kept_dir() / "chatrl_checkpoints" / "d2"
    bucket.local_path(folder).mkdir(parents=True)
    log = RolloutLog(folder)
    log._file.write(b"one\n")
    assert log.saved() == 4
    log._file.write(b"two\n")
    assert log.saved() == 8
    machine(monkeypatch, tmp_path / "another")
    bucket.local_path(folder).mkdir(parents=True)
    log = RolloutLog(folder, 4)
    log._file.write(b"2\n")
    assert log.saved() == 6 and cloud.read("bucket", "base/chatrl_checkpoints/d2/rollouts.jsonl") == b"one\n2\n"


def test_the_report_of_runs_in_a_bucket_is_in_the_bucket(cloud):
    log = MetricsLog(paths.kept_dir() / "chatsft_checkpoints" / "d2", "dummy", {}, project="test", resumed_at=None)
    log.log(1, loss=1.0)
    log.close()
    assert report.main(report.ReportConfig()) == 0
    page = cloud.read("bucket", "base/report.html")
    assert b"Supervised fine-tuning" in page and b"d2" in page
    (paths.kept_dir() / "chatsft_checkpoints" / "d2" / "rollouts.jsonl").write_text(json.dumps(answer(0, 1.0)) + "\n")
    assert report.main(report.ReportConfig()) == 0
    assert b"2+2?" in cloud.read("bucket", "base/report-rollouts-d2.html")
    assert report.main(report.ReportConfig()) == 0  # it is ours, and replaced
    (paths.kept_dir() / "chatsft_checkpoints" / "d2" / "rollouts.jsonl").unlink()
    given = (Path("gs://bucket/base/chatsft_checkpoints/d2"),)  # pathlib takes a slash of it
    assert report.main(report.ReportConfig(folders=given, output=Path("gs://bucket/other/page.html"))) == 0
    assert cloud.names("bucket", "other/") == ["other/page.html"]


def test_the_results_of_an_evaluation_go_to_the_bucket(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("gs://bucket/out/r.json")
    nanochat_eval.check(nanochat_eval.EvalConfig(json=path))
    nanochat_eval.save(path, {"a": 1})
    assert cloud.read("bucket", "out/r.json") == b'{"a": 1}\n' and not list(tmp_path.glob("gs*"))
    with pytest.raises(ValueError, match="exists: name a new file"):
        nanochat_eval.check(nanochat_eval.EvalConfig(json=path))


# -------------------------------------------------------------------------------------------------- tokenizer, datasets
def test_the_tokenizer_is_the_bucket_s(cloud, tmp_path, monkeypatch):
    tiny.tokenizer().save(tmp_path / "made")
    put(cloud, tmp_path / "made", "base/tokenizer")
    folder = paths.base_dir() / "tokenizer"
    assert Tokenizer.load(folder).digest() == tiny.tokenizer().digest()
    made = json.loads((tmp_path / "made" / "tokenizer.json").read_text())
    cloud.put("bucket", "base/tokenizer/tokenizer.json", json.dumps(made | {"name": "other"}).encode())
    machine(monkeypatch, tmp_path / "disk")  # a new process
    assert json.loads((paths.base_dir() / "tokenizer" / "tokenizer.json").read_text())["name"] == "other"
    cloud.objects["bucket"].clear()
    machine(monkeypatch, tmp_path / "disk")
    with pytest.raises(FileNotFoundError, match="train one with"):
        Tokenizer.load(paths.base_dir() / "tokenizer")


def test_a_trained_tokenizer_goes_to_the_bucket_and_is_not_replaced(cloud, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("one two three four " * 50)
    settings = train_tokenizer.Train(input=(tmp_path / "text.txt",), vocab_size=275)
    assert train_tokenizer.train(settings) == 0
    assert "base/tokenizer/tokenizer.json" in cloud.names("bucket")
    machine(monkeypatch, tmp_path / "another")
    assert Tokenizer.load(paths.base_dir() / "tokenizer").vocab_size == 275
    with pytest.raises(FileExistsError, match=r"tokenizer.json exists"):
        train_tokenizer.train(settings)


def test_datasets_in_the_bucket_are_fetched_once(cloud, tmp_path):
    put(cloud, tiny.write_shards(tmp_path / "made"), "base/base_data_climbmix")
    cloud.put("bucket", "base/task_data/a--b/main/test/manifest.json", b'["00000.parquet"]')
    cloud.put("bucket", "base/task_data/a--b/main/test/00000.parquet", b"x")
    cloud.put("bucket", "base/task_data/a--b/main/composed/manifest.json", b'["00000.parquet"]')
    cloud.put("bucket", "base/task_data/a--b/main/composed/00000.parquet", b"w")
    cloud.put("bucket", "base/words/list.txt", b"y")
    for _ in range(2):
        shards = documents.find_shards()
        (file,) = split_files("a/b", "main", "test")
        assert split_files("a/b", "main", "composed")[0].read_bytes() == b"w"
        assert file.read_bytes() == b"x" and find_file("list.txt").read_bytes() == b"y"
        for shard in shards:
            assert shard.read_bytes() == cloud.read("bucket", f"base/base_data_climbmix/{shard.name}")
        fetched = [path for _, path in cloud.requests if "alt=media" in path]
    assert len(fetched) == len(set(fetched))
    file.write_bytes(b"z")  # damaged here: of the same size
    assert split_files("a/b", "main", "test")[0].read_bytes() == b"x"


def test_a_copy_with_another_content_than_the_bucket_says_is_refused(cloud, tmp_path, monkeypatch):
    cloud.put("bucket", "base/words/list.txt", b"y")
    path = paths.kept_dir() / "words" / "list.txt"
    monkeypatch.setattr(cloud, "_media", lambda entry, headers: (200, {}, b"n"))
    with pytest.raises(OSError, match=r"gs://bucket/base/words/list.txt must have the content with the MD5"):
        bucket.fetch(path)
    assert not [p for p in (tmp_path / "disk").rglob("*") if p.is_file()]


# --------------------------------------------------------------------------------------------------------------- errors
def test_a_bucket_that_cannot_be_used_is_one_sentence(cloud, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "gs://nowhere/base")
    with pytest.raises(ValueError, match="gs://nowhere/base: there is no bucket 'nowhere'"):
        paths.kept_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "gs://")
    with pytest.raises(ValueError, match="gs:// must be gs://bucket/folder"):
        paths.kept_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "gs://bucket/a*")
    with pytest.raises(ValueError, match=r"gs://bucket/a\* must not have any of the characters"):
        paths.kept_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "gs://bucket/base")
    for status in (401, 403):
        cloud.refuse = status
        with pytest.raises(ValueError, match=rf"may use \(.*answered {status}.*\): log in with gcloud auth"):
            paths.base_dir()
    monkeypatch.setattr(bucket, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://bucket/base needs the package gcsfs: run tools/setup.sh"):
        paths.base_dir()


def test_a_stage_ends_with_that_sentence(cloud):
    env = os.environ | {"NANOCHAT_BASE_DIR": "gs://nowhere"}
    command = [sys.executable, "-m", "nanochat_jax.report"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: gs://nowhere: there is no bucket 'nowhere'")
    assert "Traceback" not in done.stderr


def test_on_a_disk_nothing_of_this_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(bucket, "connect", None)
    assert paths.base_dir() == paths.kept_dir() == bucket.as_path(tmp_path) == bucket.fetch(tmp_path) == tmp_path
    assert bucket.local_path(tmp_path) == tmp_path
    (tmp_path / "a").write_bytes(b"1")
    bucket.upload(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    paths.write_atomically(tmp_path / "c", b"2")
    assert (tmp_path / "c").read_bytes() == b"2"


def test_a_tag_that_would_be_taken_for_a_pattern_is_refused(cloud):
    cfg = sft.SFTConfig()
    with pytest.raises(
        ValueError, match=r"chatsft_checkpoints/a\*\] must not have any of the characters # \* \? \[ \]"
    ):
        find_run(cfg, "sft", "a*]", tiny.tokenizer(), print)


def test_the_bucket_alone_is_a_base_directory_too(cloud, state, monkeypatch):
    for named in ("gs://bucket", "gs://bucket/", "gs:/bucket"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", named)
        assert str(paths.kept_dir() / "a") == "gs://bucket/a"
    save(Saver(paths.kept_dir() / "chatsft_checkpoints" / "d2"), 1, state)
    assert find.find_model("sft").step == 1 and paths.base_dir().name == "bucket"


def test_two_runs_of_one_machine_in_one_folder_are_refused(cloud):
    run = Start(None, paths.kept_dir() / "chatsft_checkpoints" / "d2", "", record={"step": 0})
    with hold_folder(run), pytest.raises(FileExistsError, match="another process is training in gs://bucket/base"):
        with hold_folder(run):
            pass


# ----------------------------------------------------------------------------------------------------------- whole runs
STEPS = 6


def start(disk, tag, flags, *, count=1, devices=1, base="gs://bucket/base"):
    """SFT in `count` processes, each of which has a disk of its own."""
    port, commands, envs = free_port(), [], []
    for i in range(count):
        which = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(i)]
        command = [sys.executable, "-m", "nanochat_jax.sft", "--output-tag", tag, *flags]
        commands.append([*command, *(which if count > 1 else [])])
        own = {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_LOCAL_DIR": str(disk / str(i)), "PYTHONUNBUFFERED": "1"}
        envs.append(os.environ | own | {"JAX_NUM_CPU_DEVICES": str(devices // count)})
    return Processes(commands, envs)


def ended(processes, code=0):
    try:
        assert set(processes.wait()) == {code}, processes.all_output()
    finally:
        processes.kill()
    return processes.output(0)


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    """(base directory on a disk with a run that nothing interrupted, its flags)"""
    base = tmp_path_factory.mktemp("alone")
    tiny.write_base(base)
    steps = ["--num-iterations", str(STEPS), "--save-every", "2", "--eval-every", "-1"]
    flags = [*tiny.sft_flags(base), *steps]
    ended(start(base, "run", flags, base=base))
    return base, flags


def test_a_run_killed_in_the_middle_of_an_upload_goes_on_bit_for_bit_on_another_machine(cloud, alone, tmp_path):
    base, flags = alone
    put(cloud, tiny.write_base(tmp_path / "made").parents[2])
    running, cloud.fail_every = [], 151

    def kill(name):
        if "/4/" in name and "ocdbt.process_0/d/" in name and running:
            running.pop().signal(0, 9)

    cloud.on_write = kill
    process = start(tmp_path / "first", "killed", flags)
    running.append(process)
    ended(process, -9)
    left = cloud.names("bucket", "base/chatsft_checkpoints/killed/4/")
    assert left and not any(name.endswith(("commit_success.txt", integrity.MANIFEST)) for name in left)
    shutil.rmtree(tmp_path / "first")
    output = ended(start(tmp_path / "second", "killed", ["--resume=auto"]))
    assert "Resuming gs://bucket/base/chatsft_checkpoints/killed from step 2" in output
    there = get(cloud, "base/chatsft_checkpoints/killed", tmp_path / "there")
    found = kill_resume.difference(there, base / "chatsft_checkpoints" / "run", STEPS)
    assert found.pop("arrays_compared") > 40
    assert found == {"arrays_that_differ": [], "steps_whose_loss_differs": []}


def test_two_processes_without_a_common_disk_write_their_parts(cloud, alone, tmp_path):
    base, flags = alone
    put(cloud, tiny.write_base(tmp_path / "made").parents[2])
    ended(start(tmp_path, "two", flags, count=2, devices=8))  # the program of test_processes: compiled once
    folder = paths.kept_dir() / "chatsft_checkpoints" / "two" / str(STEPS)
    parts = [name for name in bucket.list_objects(folder) if name.startswith("params/ocdbt.process_")]
    assert {name.split("process_")[1][0] for name in parts} == {"0", "1"}
    theirs = store.read_arrays(base / "chatsft_checkpoints" / "run" / str(STEPS), "params")
    for name, array in store.read_arrays(folder, "params").items():
        np.testing.assert_allclose(array, theirs[name], atol=1e-5, err_msg=name)
