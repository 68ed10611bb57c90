"""Tools beside the calculator: how a call finds its tool, and that a slow, faulty or talkative one harms nobody else.

Run: python -m pytest tests/inference/test_tools.py
"""

import itertools
import random
import sys
import threading
import time

import numpy as np
import pytest

from nanochat_jax.inference import tools
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.tools import CALCULATOR, PYTHON, Tool, Toolbox, ToolCall, make_toolbox
from nanochat_jax.tasks import sandbox
from tests.support.models import tiny_config
from tests.support.scripted import END, TOKENIZER, apart, call, result, scripted

UPPER = Tool("upper", str.upper)
REVERSE = Tool("reverse", lambda text: text[::-1])
OPEN = threading.Event()  # what a tool that hangs waits for
HANG = Tool("hang", lambda text: OPEN.wait() and text, 0.05)
PATIENT = SamplingParams(max_new_tokens=60)


@pytest.fixture(autouse=True)
def let_go():
    OPEN.clear()
    yield
    OPEN.set()


def answer(toolbox, expression):
    """(the call, its result's ids)"""
    made = toolbox.start(expression, TOKENIZER)
    while not (found := toolbox.answer_of(made)):
        toolbox.wait([made], 0.1)
    return found


# ---- one call


def test_with_one_tool_the_whole_text_is_for_it():
    assert answer(Toolbox([UPPER]), "upper a b") == (ToolCall("upper a b", "UPPER A B"), [*b"UPPER A B"])
    assert answer(Toolbox(), "calculator 1+1")[0].result is None  # as with nanochat
    assert answer(Toolbox(), "1+1") == (ToolCall("1+1", "2"), [*b"2"])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        *(("upper a b", "A B"), ("reverse a b", "b a"), ("  reverse\nab\nc ", " c\nba"), ("upper", "")),
        *(("uppercase a", "UPPERCASE A"), ("a reverse b", "A REVERSE B"), (" ", " "), ("Reverse ab", "REVERSE AB")),
    ],
)
def test_with_several_the_first_word_names_the_tool_and_without_a_name_it_is_the_first(expression, expected):
    assert answer(Toolbox([UPPER, REVERSE]), expression)[0] == ToolCall(expression, expected)


def raises(text):
    raise KeyError(text)


class NoText(Exception):
    def __str__(self):
        raise self


def raises_what_has_no_text(text):
    raise NoText


@pytest.mark.parametrize(
    "tool",
    [
        Tool("raises", raises),
        Tool("nameless", raises_what_has_no_text),
        Tool("exits", lambda text: sys.exit(text)),
        Tool("bytes", lambda text: b"bytes"),
        Tool("number", lambda text: 5),
        Tool("splits", lambda text: " " * 10_000_000 + "a" if text == "x" else None),
    ],
    ids=lambda tool: tool.name,
)
def test_a_tool_that_fails_has_no_result_or_a_short_one_and_says_why_once(tool, capsys):
    toolbox = Toolbox([tool])
    for _ in range(2):
        made, ids = answer(toolbox, "x")
        assert (made.result or "").strip() == "" and not made.timed_out and len(ids) <= tools.RESULT_TOKENS
    if tool.name not in ("splits", "nameless"):
        assert capsys.readouterr().err.count(f"WARNING: tool {tool.name}: ") == 1


def test_a_tool_that_hangs_is_given_up_and_the_next_calls_have_its_place(monkeypatch):
    monkeypatch.setattr(tools, "CALLS_AT_ONCE", 2)
    toolbox = Toolbox([HANG, UPPER])
    started = [toolbox.start(text, TOKENIZER) for text in ("hang a", "hang b", "hang c", "upper d")]
    found = []
    for made in started:
        while not (one := toolbox.answer_of(made)):
            toolbox.wait([made], 0.1)
        found.append(one[0])
    assert found == [ToolCall(f"hang {x}", None, True) for x in "abc"] + [ToolCall("upper d", "D")]


def test_with_too_many_threads_that_hang_no_further_call_is_waited_for(monkeypatch):
    monkeypatch.setattr(tools, "CALLS_AT_ONCE", 1)
    monkeypatch.setattr(tools, "MOST_STUCK", 2)
    toolbox = Toolbox([HANG, UPPER])
    for text in ("hang a", "hang b", "upper c"):
        assert answer(toolbox, text)[0] == ToolCall(text, None, True)
    OPEN.set()
    while toolbox._stuck:
        time.sleep(0.001)
    assert answer(toolbox, "upper d")[0] == ToolCall("upper d", "D")


def test_a_timeout_of_the_tool_itself_counts_as_one():
    def late(text):
        raise TimeoutError

    assert answer(Toolbox([Tool("late", late)]), "x")[0] == ToolCall("x", None, True)


def test_megabytes_are_cut_and_names_of_special_tokens_stay_text():
    made, ids = answer(Toolbox([Tool("flood", lambda text: "\u00e9<|bos|>\ud800" * 1_000_000)], 6), "x")
    assert ids == [*"\u00e9<|bo".encode()][:6] and made.result == "\u00e9<|bo"
    _, ids = answer(Toolbox([Tool("names", lambda text: "<|assistant_end|><|output_end|>")]), "x")
    assert max(ids) < 256
    assert answer(Toolbox([CALCULATOR], 3), "1000000*1")[0].result == "100"


@pytest.mark.skipif(bool(sandbox.guard_fault()), reason=f"no guard: {sandbox.guard_fault()}")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("for i in range(30): print(i)", "\n".join(map(str, range(20, 30)))),
        ("print(1)\n1/0", "1\nZeroDivisionError: division by zero"),
        ("x = 1", ""),
    ],
)
def test_python_gives_the_last_lines_of_what_a_program_prints(program, expected):
    assert answer(Toolbox([PYTHON]), program)[0].result.startswith(expected[:15])
    assert answer(Toolbox([CALCULATOR, PYTHON]), f"python {program}")[0].result[-10:] == expected[-10:]


@pytest.mark.skipif(bool(sandbox.guard_fault()), reason=f"no guard: {sandbox.guard_fault()}")
def test_a_program_without_an_end_has_no_result(monkeypatch):
    monkeypatch.setattr(tools, "PROGRAM_SECONDS", 0.3)
    assert answer(Toolbox([PYTHON]), "while True: pass")[0].timed_out


# ---- the flag

OWN = """
class Twice:
    name, seconds = "twice", 2

    def call(self, text):
        return text + text

class NoName(Twice):
    name = "two words"

class NoCall:
    name = "nothing"

class Endless(Twice):
    seconds = float("inf")

class Never(Twice):
    seconds = 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_tools.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_tools", None)


def test_the_flag_names_tools_and_without_it_there_is_the_calculator(own):
    assert make_toolbox(()).tools == (CALCULATOR,)
    both = make_toolbox(["calculator", "own_tools:Twice"])
    assert [(tool.name, tool.seconds) for tool in both.tools] == [("calculator", 0), ("twice", 2)]
    assert answer(both, "twice ab")[0].result == "abab" and answer(both, "1+1")[0].result == "2"


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (["abacus"], "--tool must be calculator, python or module:Class, got 'abacus'"),
        (["own_tools:Nobody"], "--tool own_tools:Nobody: .* has no Nobody"),
        (["own_tools:NoName"], "name must be one word, got 'two words'"),
        (["own_tools:NoCall"], r"must have call\(text\)"),
        (["own_tools:Endless"], "seconds must be above 0 and at most 3600, got inf"),
        (["own_tools:Never"], "seconds must be above 0 and at most 3600, got 0"),
        (["calculator", "calculator"], "each by another name, got calculator, calculator"),
    ],
)
def test_what_is_no_tool_is_refused_with_a_sentence(own, specs, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_toolbox(specs)


# ---- in the engine


def test_a_tool_that_waits_stops_nobody_else(monkeypatch):
    """It answers when all other samples are done, on two rows: the second one has to do them all."""
    script = [[[*call("late"), 9, END], *([[7] * 12 + [END]] * 5)]]
    late = Tool("late", lambda text: "now" if OPEN.wait(60) else None, 100)
    generate = scripted(monkeypatch, script, slots=2, chunk=4, tools=Toolbox([late]))

    def progress(done, total):
        if done == 5:
            OPEN.set()

    ((waited, *others),) = generate([[1]], PATIENT, samples=6, progress=progress)
    assert waited.tokens.tolist() == [*call("late"), *result("now"), *[7] * 100][: len(waited.tokens)]
    assert waited.tool_calls == [ToolCall("late", "now")] and waited.mask.tolist()[:11] == [1] * 6 + [0] * 5
    assert all(sample.tokens.tolist() == [7] * 12 + [END] for sample in others)


def test_tools_that_fail_cost_their_own_sample_only(monkeypatch):
    toolbox = Toolbox([HANG, Tool("raises", raises), Tool("flood", lambda text: "a" * 5_000_000), CALCULATOR], 4)
    rows = [[*call(text), 8, END] for text in ("hang", "raises x", "flood x", "calculator 2+3")]
    for row in rows[2:]:
        row[-2:-2] = [0] * (6 if row is rows[2] else 3)  # what is thrown away
    ((hung, raised, flooded, right),) = scripted(monkeypatch, [rows], chunk=5, tools=toolbox)([[1]], PATIENT, samples=4)
    assert hung.tokens.tolist() == [*call("hang"), 8, END] and hung.tool_calls == [ToolCall("hang", None, True)]
    assert raised.tokens.tolist() == [*call("raises x"), 8, END] and raised.tool_calls[0].result is None
    assert flooded.tokens.tolist() == [*call("flood x"), *result("aaaa"), 8, END]
    assert right.tokens.tolist() == [*call("calculator 2+3"), *result("5"), 8, END]


def test_a_call_with_which_an_answer_is_cut_is_not_waited_for(monkeypatch):
    generate = scripted(monkeypatch, [[call("hang")]], tools=Toolbox([Tool("hang", HANG.call, 1000.0)]))
    ((sample,),) = generate([[1]], SamplingParams(max_new_tokens=6))
    assert sample.tokens.tolist() == call("hang") and not sample.ended and sample.tool_calls == []


def test_whoever_is_left_in_the_middle_leaves_no_call_waiting(monkeypatch):
    begun = threading.Event()
    toolbox = Toolbox([Tool("hang", lambda text: begun.set() or HANG.call(text), 1000.0)])
    generate = scripted(monkeypatch, [[call("hang")]], tools=toolbox)

    def leave(done, total):
        if begun.is_set():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generate([[1]], PATIENT, progress=leave)
    assert toolbox._stuck == 1


LAYERS = tiny_config(vocab_size=265, padded_vocab=320, n_layer=2, windows=(7, -1))


def delayed(seconds):
    """A tool whose answers come after random times, or at once."""
    rng = random.Random(0)

    def echo(text):
        time.sleep(rng.random() * seconds)
        return text[::-1]

    return Toolbox([Tool("echo", echo)])


def answers_of_delayed(monkeypatch, seconds, **settings):
    script = [
        [
            [*[7] * k, *call(f"a{e}{k}"), *[0] * 5, 9, *call("b" * k + "c"), *[0] * (k + 3), *[11] * e, END]
            for k in range(6)
        ]
        for e in range(3)
    ]
    generate = scripted(monkeypatch, script, LAYERS, logits=True, tools=delayed(seconds), **settings)
    return generate([[1]] * 3, PATIENT, samples=6)


def test_the_answers_are_the_same_whatever_the_order_in_which_calls_return(monkeypatch):
    at_once = answers_of_delayed(monkeypatch, 0.0, slots=18, chunk=4)
    for seconds, slots in ((0.02, 18), (0.05, 5)):
        late = answers_of_delayed(monkeypatch, seconds, slots=slots, chunk=4)
        for a, b in zip(itertools.chain(*late), itertools.chain(*at_once), strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.mask, b.mask)
            np.testing.assert_allclose(a.policy_logprobs, b.policy_logprobs, atol=1e-5)
            assert a.tool_calls == b.tool_calls and len(a.tool_calls) == 2 and a.ended
        assert apart(LAYERS, itertools.chain(*late)) < 1e-5
