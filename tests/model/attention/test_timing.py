"""`--attention auto` takes the fastest backend that is right; times are kept, and so is a run's backend."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.cli.device import attention_record, choose_attention
from nanochat_jax.distributed import processes
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.attention import AttentionShapes, choose_attention_backend, select, timing
from tests.support import tiny

SHAPES = AttentionShapes.of(tiny.CONFIG, 64, rows=4)
ONE = make_mesh("data=1")
WORK = timing.Work(4, 64, (4, 2, 16), (16, -1, 16), "float32", packed=True, training=True)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A CPU that is taken for a GPU with the kernels mosaic_gpu and triton -> what a test may set: the seconds of each
    backend, which kernels are wrong; and how often times were taken."""
    play = {"seconds": {"mosaic_gpu": 3.0, "triton": 2.0, "chunked": 9.0}, "wrong": [], "timed": 0}
    for name in ("mosaic_gpu", "triton"):
        monkeypatch.setitem(select.BACKENDS, name, select.BACKENDS[name]._replace(platform="cpu", gpus=None))
    monkeypatch.setattr(select, "refuses", lambda name, *_: f"{name} is wrong" if name in play["wrong"] else None)

    def time_backends(attends, work, device):
        play["timed"] += 1
        return {name: play["seconds"][name] for name in attends}

    monkeypatch.setattr(timing, "time_backends", time_backends)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield play
    jax.config.update("jax_compilation_cache_dir", before)


def chosen(**how):
    return choose_attention_backend("auto", ONE, "bfloat16", SHAPES, **how)


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        ({}, "triton"),
        ({"mosaic_gpu": 1.0}, "mosaic_gpu"),
        ({"chunked": 1.0}, "chunked"),
        ({"mosaic_gpu": 2.05}, "mosaic_gpu"),  # no more than noise: the order of the table decides
    ],
)
def test_the_fastest_is_taken(gpu, seconds, name):
    gpu["seconds"] |= seconds
    assert chosen() == (name, None)


def test_what_is_wrong_is_not_taken_however_fast(gpu):
    gpu["wrong"], gpu["seconds"]["triton"] = ["triton"], 0.001
    assert chosen() == ("mosaic_gpu", "triton is wrong: mosaic_gpu is used")


def test_the_table_is_told_to_who_wants_it(gpu):
    lines = []
    chosen(tell=lines.append)
    assert [line.split(":")[0] for line in lines] == ["attention triton", "attention mosaic_gpu", "attention chunked"]
    assert lines[2].endswith("9000.00 ms a pass, 4.50 of the fastest")


def test_times_are_kept_for_the_same_work_on_the_same_device_with_the_same_versions(gpu, monkeypatch):
    chosen()
    gpu["seconds"]["chunked"] = 0.001
    assert (chosen().name, gpu["timed"]) == ("triton", 1)
    others = [
        {"shapes": SHAPES._replace(T=128)},
        {"shapes": SHAPES._replace(rows=8)},
        {"dtype": "float16"},
        {"packed": False},
    ]
    for i, change in enumerate(others):
        how = {"wanted": "auto", "mesh": ONE, "dtype": "bfloat16", "shapes": SHAPES, "packed": True} | change
        choose_attention_backend(**how)
        assert gpu["timed"] == 2 + i, change
    monkeypatch.setattr(processes, "versions", lambda: {"jax": "9.9"})
    assert (chosen().name, gpu["timed"]) == ("chunked", 6)
    device = ONE.local_devices[0]
    assert device.device_kind in next(file.read_text() for file in kept_files())


def kept_files():
    return sorted(Path(jax.config.jax_compilation_cache_dir, "attention").iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"key": 1, "seconds": {"triton": "soon"}}',
        lambda text: text.replace("2.0", "-2.0"),
        lambda text: text.replace('"triton": 2.0', '"magic": 1.0'),
        lambda text: text.replace('"key"', '"lock"'),
    ],
)
def test_a_damaged_file_of_times_is_ignored_and_written_anew(gpu, damage):
    chosen()
    (file,) = kept_files()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert (chosen().name, gpu["timed"]) == ("triton", 2)
    assert json.loads(file.read_text()) == json.loads(whole)


def test_times_are_taken_anew_where_there_is_no_place_to_keep_them(gpu, tmp_path):
    (tmp_path / "attention").write_text("a file in the place of the folder")
    assert [chosen().name for _ in "ab"] == ["triton"] * 2
    jax.config.update("jax_compilation_cache_dir", None)
    assert (chosen().name, gpu["timed"]) == ("triton", 3)


def test_a_run_that_goes_on_keeps_its_backend_on_such_a_device_whatever_is_fastest(gpu):
    lines = []

    def resumed(recorded, wanted="auto"):
        return choose_attention(
            wanted, tiny.CONFIG, 64, mesh=ONE, dtype=jnp.bfloat16, recorded=recorded, log=lines.append
        )

    began = attention_record("mosaic_gpu", ONE)
    assert (resumed(began), gpu["timed"]) == ("mosaic_gpu", 0)
    assert resumed(attention_record("chunked", ONE)) == "chunked"
    assert resumed(began, "reference") == "reference"
    assert lines == []
    assert resumed(began | {"device": "NVIDIA A100"}) == "triton"
    assert lines.pop().startswith(
        "NOTE: the run's attention was mosaic_gpu on NVIDIA A100; on this cpu it is chosen anew"
    )
    gpu["wrong"] = ["mosaic_gpu"]
    assert resumed(began) == "triton"
    assert lines == ["WARNING: attention is triton: mosaic_gpu is wrong: triton is used"]
    assert resumed(attention_record("of another version", ONE)) == "triton"


def test_all_processes_take_what_process_0_has_timed_and_nothing_that_fails_on_one(gpu, monkeypatch):
    answers = {"the trial of mosaic_gpu": ["out of memory there"], "the times of attention": [{"chunked": 1.0}]}
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "exchange", lambda what, value: [*answers.get(what, []), value])
    assert chosen() == ("chunked", "out of memory there: chunked is used")
    assert gpu["timed"] == 0


def test_a_cpu_times_nothing(monkeypatch):
    monkeypatch.setattr(timing, "time_backends", None)
    assert choose_attention_backend("auto", ONE, "float32", SHAPES) == ("chunked", None)


def test_the_median_of_rounds_in_turns_is_taken_and_the_time_is_bounded():
    now, calls = [0.0], []

    def takes(name, *seconds):
        left = list(seconds)

        def run():
            calls.append(name)
            now[0] += left.pop(0) if left[1:] else left[0]

        return run

    runs = {"a": takes("a", 0.1, 0.3, 0.1, 0.1, 0.1), "b": takes("b", 0.2)}
    found = timing.median_seconds(runs, clock=lambda: now[0])
    assert found == pytest.approx({"a": 0.1, "b": 0.2})
    assert calls == ["a", "b"] * timing.ROUNDS
    calls.clear()
    timing.median_seconds({"slow": takes("slow", 1.1)}, clock=lambda: now[0])
    assert calls == ["slow"] * 2


def test_what_is_timed_is_each_layer_with_its_gradients_on_packed_rows():
    seen = []

    def attend(q, k, v, k_start, scale, window):
        def look(q, k_start):
            seen.append((q.shape, int(k_start[0, -1]), window))

        jax.debug.callback(look, q, k_start)
        return q * k.sum() * v.sum()

    attention_pass = timing.attention_pass(attend, WORK, jax.devices()[0])
    attention_pass()
    jax.effects_barrier()
    assert seen == [((4, 64, 4, 16), 48, 16), ((4, 64, 4, 16), 48, -1), ((4, 64, 4, 16), 48, 16)]


def test_a_pass_has_a_bounded_number_of_tokens_and_what_cannot_run_is_left_out(monkeypatch):
    monkeypatch.setattr(timing, "TIMED_TOKENS", 128)
    seen = []

    def attend(q, k, v, k_start, scale, window):
        seen.append(q.shape)
        return q

    def too_large(*arrays):
        raise MemoryError("no room")

    found = timing.time_backends({"too_large": too_large, "good": attend}, WORK, jax.devices()[0])
    assert list(found) == ["good"] and 0 < found["good"] < 60
    assert set(seen) == {(2, 64, 4, 16)}


def test_documents_of_a_timed_row_are_equal_and_windows_cut_them():
    assert np.asarray(timing.first_keys(8, -1, packed=True)).tolist() == [[0, 0, 2, 2, 4, 4, 6, 6]]
    assert np.asarray(timing.first_keys(5, 1, packed=False)).tolist() == [[0, 0, 1, 2, 3]]
    assert np.asarray(timing.first_keys(1, -1, packed=True)).tolist() == [[0]]
