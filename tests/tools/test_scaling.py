"""The arithmetic of tools/predict/scaling.py and tools/predict/roofline.py, and what it reads from compiled programs.

Run: python -m pytest tests/tools/test_scaling.py
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import hlo_cost
import jax
import numpy as np
import pytest
import roofline
import scaling
import scaling_programs
import scaling_table

from nanochat_jax.distributed import sharding
from nanochat_jax.distributed.device_memory import bytes_on_device
from nanochat_jax.distributed.mesh import make_mesh
from nanochat_jax.model.cost import flops_per_token
from nanochat_jax.model.gpt import REMAT, window_sizes
from nanochat_jax.train.remat import kept_for_backward
from tests.support.marks import needs_tpu_compiler
from tests.support.models import tiny_config

ROOT = Path(__file__).parents[2]
WORK = scaling_programs.Workload(max_seq_len=32, vocab_size=64, total_batch_size=512, device_batch_size=2)
PLAN = {
    "chip": "TPU v5 lite",
    "chips": 8,
    "mesh": {"data": 8, "model": 1},
    "spans": {name: {"links": 2.0, "hops": 4.0, "mean_hops": 1.75} for name in ("data", "model", "all")},
    "memory_of_a_chip": 2**34,
    "attention": "splash",
    "passes": 2,
    "rows": 1,
    "remat": "none",
    "parameter_bytes": 2**20,
    "state_bytes": 3 * 2**20,
    "batch_bytes": 2**10,
    "weights_copied": 8e9,
    "slots": 16,
    "held_in_rollouts": 2**30,
}


def part(flops=2e12, sent=1e9, kind="all-gather", beside=2**20, loops=1, **more):
    """A compiled part, as tools/predict/scaling.py keeps it."""
    cost = {
        "flops": flops,
        "bytes": 1e9,
        "seconds": flops / 2e14,
        "kernels": 1.0,
        "groups": {f"{kind} 8 1": [1.0, sent]},
    }
    twice = scaling.extended(None, cost, (0, 1), 2)
    found = {"once": cost, "twice": twice, "unknown_loops": loops, "beside_arguments": beside, "arguments": 1}
    return found | {"compile_seconds": 1.0} | more


def parts(**more):
    return {
        "gradient 4": part(),
        "gradient 8": part(4e12, 2e9),
        "update": part(),
        "decode 4": part(),
        "decode 8": part(),
    } | more


def tiny(layers):
    """The plan of a small model on two CPU devices."""
    model = tiny_config(sequence_len=32, n_layer=layers, windows=window_sizes("SSSL", layers, 32))
    mesh = make_mesh("data=2")
    return cases.sft_plan(model, mesh, passes=2, rows=2, remat="none", attention="reference", dtype="float32")


def as_part(program):
    once, twice = (scaling_programs.as_json(hlo_cost.cost(program.as_text(), unknown_trips=n)) for n in (1, 2))
    return {"once": once, "twice": twice, "unknown_loops": 1}


# ----------------------------------------------------------------------------------------------------- the extension
def test_what_two_depths_say_is_extended_linearly_whatever_its_shape():
    a = {"flops": 10.0, "groups": {"all-gather 8 1": [2, 100.0], "only here": [1, 6.0]}}
    b = {"flops": 14.0, "groups": {"all-gather 8 1": [4, 180.0], "only there": [1, 8.0]}}
    assert scaling.extended(a, b, (4, 8), 20) == {
        "flops": 26.0,
        "groups": {"all-gather 8 1": [10.0, 420.0], "only here": [0.0, 0.0], "only there": [4.0, 32.0]},
    }


def test_layers_that_are_alike_cost_alike_so_two_depths_foretell_a_third():
    plans = [tiny(n) for n in (2, 4, 6)]
    programs = [scaling_programs.compile_traced("gradient", plan) for plan in plans]
    small, large, real = map(as_part, programs)
    for passes in (1, 3):
        guess = scaling.extended(*(scaling.of_passes(p, passes) for p in (small, large)), (2, 4), 6)
        found = scaling.of_passes(real, passes)
        assert guess["flops"] == found["flops"] > 0
        guess, found = (scaling.by_kind(cost["groups"]) for cost in (guess, found))
        assert found
        for kind, (_, sent) in found.items():
            assert guess[kind][1] == pytest.approx(sent, rel=0.02), kind
    for plan, program in zip(plans, programs):  # and the arguments are known exactly from shapes
        exact = bytes_on_device([plan.abstract_state._replace(opt_state=()), plan.abstract_batch])
        assert program.memory_analysis().argument_size_in_bytes == exact


def test_the_optimizer_costs_whole_matrices_for_each_device():
    """So it is not linear in depth: 3 matrices of a shape cost as much as 4 on each of 2 devices."""
    state = tiny(3).abstract_state
    program = scaling_programs.compile_traced("update", tiny(3))
    flops = hlo_cost.cost(program.as_text()).flops
    arguments = bytes_on_device([state.params, state.opt_state, state.params]) + 2 * 4  # and two scalars
    assert program.memory_analysis().argument_size_in_bytes == arguments
    matrices = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params["blocks"]):
        key = leaf.shape, leaf.sharding.spec
        if sharding.path_name(path).endswith(("c_q", "c_k", "c_v", "c_proj", "c_fc", "ve_gate")):
            matrices[key] = matrices.get(key, 0) + 1
    expected = 0
    for ((r, c), _), count in matrices.items():
        r, c = min(r, c), max(r, c)
        expected += -(-count // 2) * 5 * (4 * r * r * c + 2 * r**3)
    assert flops == expected


def test_passes_multiply_what_is_in_their_loop_and_a_program_without_one_runs_again():
    looped = part() | {"once": {"flops": 5.0, "groups": {}}, "twice": {"flops": 8.0, "groups": {}}}
    assert [scaling.of_passes(looped, n)["flops"] for n in (1, 2, 10)] == [5.0, 8.0, 32.0]
    assert scaling.of_passes(looped | {"unknown_loops": 0}, 3)["flops"] == 15.0


# ---------------------------------------------------------------------------------------------------------- the links
def block(*shape):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))


@pytest.mark.parametrize(
    ("kind", "shape", "links", "hops", "mean"),
    [
        ("TPU v5 lite", (2, 4, 1), 2, 4, 0.5 + 1.25),  # lines: a corner has two neighbours
        ("TPU v6 lite", (8, 8, 1), 2, 14, 2 * 63 / 24),
        ("TPU v6 lite", (16, 16, 1), 4, 16, 8),  # rings
        ("TPU v5", (2, 2, 2), 3, 3, 1.5),
        ("TPU v5", (4, 8, 8), 6, 10, 5),
    ],
)
def test_links_are_those_of_the_chip_that_has_the_fewest(kind, shape, links, hops, mean):
    found = roofline.span(kind, block(*shape), shape)
    assert (found.links, found.hops) == (links, hops) and found.mean_hops == pytest.approx(mean)


def test_groups_that_lie_between_each_other_share_their_links():
    every_second = block(8, 16, 1) * [2, 1, 1]
    assert roofline.span("TPU v6 lite", every_second, (16, 16, 1)).links == 2 / 2 + 2
    pair = np.array([[0, 0, 0], [1, 0, 0]])
    assert roofline.span("TPU v6 lite", pair, (16, 16, 1)) == roofline.Span(1.0, 1.0, 0.5)
    assert roofline.span("TPU v6 lite", pair[:1], (16, 16, 1)) == roofline.ALONE


def test_seconds_of_collectives_are_bytes_over_links_and_a_microsecond_a_hop():
    mesh, spans = {"data": 4, "model": 2}, {"data": roofline.Span(2.0, 3.0, 1.5), "model": roofline.Span(1.0, 1.0, 0.5)}
    spans |= {"all": roofline.Span(4.0, 5.0, 2.0)}

    def seconds(kind, size, distance, count=1, sent=8e9):
        return roofline.sending({(kind, size, distance): [count, sent]}, mesh, spans, 1e9)

    assert seconds("all-gather", 4, 2) == pytest.approx(4 + 3e-6)
    assert seconds("all-reduce", 2, 1, count=10) == pytest.approx(8 + 2 * 10e-6)
    assert seconds("reduce-scatter", 8, 1) == pytest.approx(2 + 5e-6)
    assert seconds("all-to-all", 4, 2) == pytest.approx(1.5 * 4 + 3e-6)
    assert seconds("collective-permute", 2, 1) == pytest.approx(8 + 1e-6)  # over one link, whatever the axis


def test_a_group_is_told_by_its_size_and_by_how_far_apart_its_devices_are():
    mesh = {"replica": 2, "data": 4, "model": 2}
    found = [roofline.axis_of(size, distance, mesh) for size, distance in ((16, 1), (2, 8), (4, 2), (2, 1))]
    assert found == ["all", "replica", "data", "model"]
    assert roofline.axis_of(4, 1, {"replica": 4, "data": 4, "model": 1}) == "data"
    assert roofline.axis_of(4, 4, {"replica": 4, "data": 4, "model": 1}) == "replica"


# ----------------------------------------------------------------------------------------------------- the prediction
def predict(case="d12:v5e-8", plan=PLAN, work=scaling_programs.Workload(), **found):  # noqa: B008
    return scaling.predict(cases.parse_case(case), work, plan, parts(**found), (4, 8))


def test_a_step_is_its_passes_and_one_update():
    line, work = predict(), scaling_programs.Workload()
    assert line["method"] == "depths 4 and 8, extended" and line["fits"]
    model = scaling_programs.model_of(work, 12)
    kernels = roofline.attention_flops(model, 2048, 2, 9)
    assert line["flops"] == pytest.approx(2 * 6e12 + 2e12 + kernels)  # 2e12, 4e12 at 4 and 8 layers: 6e12 at 12
    assert line["collectives"]["all-gather"] == pytest.approx([3, 2 * 3e9 + 1e9])
    seconds = line["seconds"]
    assert seconds["at_most"] == pytest.approx(seconds["operations"] + seconds["attention_kernels"] + seconds["links"])
    assert seconds["at_least"] == max(seconds["links"], seconds["at_most"] - seconds["links"])
    tokens = 2 * 8 * 2048
    assert line["tokens_per_second"] == [tokens / seconds["at_most"], tokens / seconds["at_least"]]
    assert line["mfu"][1] == pytest.approx(tokens * flops_per_token(model, 2048) / (8 * 197e12 * seconds["at_least"]))


def test_a_chip_holds_the_more_of_the_two_halves():
    halves = {f"gradient {n}": part(beside=100) for n in (4, 8)}
    held = PLAN["state_bytes"] + max(PLAN["batch_bytes"] + 100, PLAN["parameter_bytes"] + 2**20)
    assert predict(**halves)["held"] == held
    assert predict(plan=PLAN | {"memory_of_a_chip": held}, **halves)["fits"]
    assert not predict(plan=PLAN | {"memory_of_a_chip": held - 1}, **halves)["fits"]


def test_a_whole_step_compiled_at_its_depth_takes_the_place_of_both_halves():
    line = scaling.predict(
        cases.parse_case("d12:v5e-8"),
        scaling_programs.Workload(),
        PLAN,
        {"step": part(7e12), "decode 4": part(), "decode 8": part()},
        (4, 8),
    )
    assert line["method"] == "compiled at its depth"
    assert line["collectives"]["all-gather"] == [2, 2e9]


def test_rl_counts_waves_of_answers_and_the_passes_of_their_rows():
    found = predict()["rl"]
    assert found["waves"] == 256 * 16 // (16 * 8)
    assert found["passes"] == -(-(256 * 16) // (5 * 8))  # five answers of 150 + 256 tokens to a row of 2,048
    seconds = found["seconds"]
    assert seconds["gather_weights"] == pytest.approx(8e9 / (2 * 50e9) * 7 / 8)
    assert seconds["new_tokens"] == pytest.approx(32 * 256 / 16 * 0.01)
    rollouts = seconds["gather_weights"] + seconds["prompts"] + seconds["new_tokens"]
    assert seconds["at_most"] == pytest.approx(rollouts + seconds["update_at_most"])
    assert found["tokens_per_second"][0] == pytest.approx(256 * 16 * 256 / seconds["at_most"])


def test_what_the_compiler_refused_does_not_fit():
    line = predict(**{"gradient 8": {"out_of_memory": True, "memory_asked": 5}})
    assert (line["fits"], line["refused"]) == (False, {"gradient 8": 5}) and "seconds" not in line


def test_the_least_is_computed_again_that_fits_and_then_as_many_rows_as_fit():
    work, model = scaling_programs.Workload(), scaling_programs.model_of(scaling_programs.Workload(), 20)
    row = {name: kept_for_backward(model, name, 2048, jax.numpy.bfloat16) for name in REMAT}

    def split(memory, shards=8, fixed=10**9):
        return scaling_programs.split_rows(work, model, shards, fixed, memory)

    assert split(None) == (4, 8, "none")
    assert split((10**9 + 2.5 * row["none"]) / 0.85) == (16, 2, "none")
    passes, rows, remat = split((10**9 + 0.99 * row["none"]) / 0.85)
    assert (remat, passes * rows) == ("elementwise", 32)
    assert row["elementwise"] * rows <= row["none"] < row["elementwise"] * rows * 2
    assert split((10**9 + 1.01 * row["block"]) / 0.85) == (32, 1, "block")
    assert split(10**9) == (32, 1, "block")  # the compiler will say that it does not fit
    assert split(None, shards=256) == (1, 1, "none")
    with pytest.raises(ValueError, match="--total-batch-size=524288 must be at least a row"):
        split(None, shards=512)


# -------------------------------------------------------------------------------------------------- the file and table
def compiled_already(out):
    """A file as of programs of d20:v5e-8 that were compiled before."""
    found = {"plan": PLAN} | parts()
    for part_name, figures in found.items():
        name, _, layers = part_name.partition(" ")
        key = {"case": "d20:v5e-8", "part": name, "layers": int(layers) if layers else None, "plan": PLAN}
        if name == "plan":
            key["plan"] = None
        if name == "decode":
            key |= {"case": "d20:v5e", "plan": {name: PLAN[name] for name in ("slots", "attention", "remat")}}
        work = dataclasses.asdict(scaling_programs.Workload())
        roofline.append(out, {"line": "part"} | key | {"work": work, "found": figures})


def predict_again(out):
    """What would have to be compiled is given up at once."""
    scaling.main(scaling.Scaling(out=out, cases=("d20:v5e-8",), layers=(4, 8), minutes=1e-4))


def tool(*flags, name="scaling"):
    command = [sys.executable, ROOT / f"tools/predict/{name}.py", *flags]
    return subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)


def test_what_is_in_the_file_is_not_compiled_again(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    compiled_already(out)
    before = out.read_text()
    out.write_text(before + '{"line": "part", "cut o')  # a killed process left this
    predict_again(out)
    line = json.loads(capsys.readouterr().out)
    assert (line["line"], line["case"]) == ("prediction", "d20:v5e-8")
    after = out.read_text()
    assert json.loads(after.splitlines()[-1])["seconds"] == line["seconds"]
    predict_again(out)
    assert out.read_text() == after and capsys.readouterr().out == ""


def test_parameters_that_do_not_fit_are_not_compiled_for(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    key = {"case": "d20:v5e-8", "part": "plan", "layers": None, "plan": None}
    key["work"] = dataclasses.asdict(scaling_programs.Workload())
    roofline.append(out, {"line": "part"} | key | {"found": PLAN | {"state_bytes": 2**34}})
    predict_again(out)
    line = json.loads(capsys.readouterr().out)
    assert (line["fits"], line["refused"]) == (False, {"plan": 2**34 + 2**20})
    assert "| does not fit 16.0 |" in scaling_table.table([line])


def test_the_table_and_the_plot_come_from_the_file_alone(tmp_path):
    out, plot = tmp_path / "a.jsonl", tmp_path / "a.svg"
    compiled_already(out)
    predict_again(out)
    done = tool("--out", str(out), "--render", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    head, _, row = done.stdout.splitlines()
    assert head.startswith("| model, slice | mesh | passes x rows, remat | GiB a chip |")
    assert row.startswith("| d20 on v5e-8 | data=8 | 2 x 1, none | 0.0 of 16.0 | gather 10,490 |")
    picture = plot.read_text()
    assert "Predicted, not measured" in picture
    scaling_table.draw(scaling.lines_of(out)[-1:], plot)
    assert plot.read_text() == picture  # the same lines, the same bytes


def line(case, at_least, at_most, fits=True):
    ends = {"at_least": at_least, "at_most": at_most}
    return {"case": case, "chip": "x", "chips": 8, "full": False, "fits": fits, "seconds": ends}


def test_a_mesh_is_named_where_it_is_clearly_faster_or_the_only_one_that_fits():
    default = line("d20:v5e-8", 1.0, 2.0)
    assert scaling_table.better([default, line("d20:v5e-8:model=2", 0.8, 1.5)]) == [
        "d20 on v5e-8: model=2 takes 75 to 80 % of the time"
    ]
    for other in (
        line("d20:v5e-8:model=2", 1.1, 1.5),
        line("d20:v5e-8:model=2", 0.9, 1.9),
        line("d20:v5e-64", 0.1, 0.1),
    ):
        assert scaling_table.better([default, other]) == []
    assert scaling_table.better([default, line("d20:v5e-8:replicate", 0.1, 0.1, fits=False)]) == []
    assert scaling_table.better([line("d20:v5e-8", 1, 2, fits=False), line("d20:v5e-8:model=2", 9, 9)]) == [
        "d20 on v5e-8: the default mesh does not fit, model=2 does"
    ]


def test_a_step_compiled_at_its_depth_stands_for_one_that_was_extended():
    full, other = line("d20:v5e-8", 1, 2) | {"full": True}, line("d20:v5e-8", 3, 4)
    assert scaling_table.latest([full, other]) == scaling_table.latest([other, full]) == [full]


def test_other_meshes_are_looked_at_where_links_decide():
    def bound(links):
        return {
            "case": "d20:v5e-8",
            "fits": True,
            "seconds": {"links": links, "operations": 1.0, "attention_kernels": 1.0},
        }

    assert scaling.further([bound(0.9)]) == []
    assert scaling.further([bound(1.1)]) == ["d20:v5e-8:model=2", "d20:v5e-8:model=4", "d20:v5e-8:replicate"]
    assert scaling.further([bound(1.1) | {"case": "d20:v5e-8:model=2"}]) == []
    assert len(scaling.further([{"case": "d34:v5e-8", "fits": False}])) == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"out": None}, "--out must name the file"),
        ({"cases": ("20:v5e-8",)}, "--cases must look like d20:v5e-8"),
        ({"cases": ("d20",)}, "--cases must look like d20:v5e-8"),
        ({"layers": (3, 5)}, "--layers must be from 2 to the depth, and odd or even as it"),
        ({"layers": (8, 4)}, "--layers must be two numbers, the smaller first"),
        ({"cases": ("d3:v5e-8",)}, "--layers must be from 2 to the depth"),
        ({"check_layers": 9}, "--layers must be from 2 to the depth, and odd or even as it, got 9"),
        ({"render": True}, "there is no prediction in"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        scaling.main(scaling.Scaling(**({"out": tmp_path / "a.jsonl", "cases": ("d20:v5e-8",)} | settings)))
    assert not list(tmp_path.iterdir())


@needs_tpu_compiler
def test_a_case_whose_shapes_are_planned_for_a_slice_that_is_not_here():
    asked = {"case": [2, "v5e-8", "data=4,model=2", False], "name": "plan", "layers": None, "plan": None}
    asked["work"] = dataclasses.asdict(WORK)
    done = tool(json.dumps(asked), name="scaling_programs")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["chip"], found["chips"], found["mesh"]) == ("TPU v5 lite", 8, {"data": 4, "model": 2})
    assert (found["passes"], found["rows"], found["remat"]) == (2, 2, "none")
    assert found["spans"]["data"]["links"] == 1 and found["spans"]["model"]["links"] == 1
    assert found["memory_of_a_chip"] > 15 * 2**30
