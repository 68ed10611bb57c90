"""Chat in the terminal: what is shown, what the history holds, what Ctrl-C does, and what a pipe gets."""

import functools
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nanochat_jax import chat
from nanochat_jax.chat import Answer, Chat, ChatConfig, History, escaped
from nanochat_jax.checkpoints import find
from nanochat_jax.checkpoints.store import SOURCES
from nanochat_jax.inference.samples import ControlTokens
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.tokenizer import UnsplittableText
from tests.support import tiny
from tests.support.commands import run_command

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny.tokenizer()  # of bytes: a character of ASCII is a token
NAMES = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
BOS, USER, USER_END, ASSISTANT, END = (TOKENIZER.special(f"<|{name}|>") for name in NAMES)
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (
    TOKENIZER.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
)
SAMPLING = SamplingParams(0.6, 50, 20)
FOUND = {stage: find.Found(Path("nowhere") / SOURCES[stage] / "d2", 7, True) for stage in ("base", "sft")}
pytestmark = pytest.mark.usefixtures("in_base", "ctrl_c_raises")


@pytest.fixture(autouse=True)
def no_colours(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")


class Script:
    """An engine that says what is written: an answer is a list of (token, mask) and of exceptions to be raised."""

    tokenizer, control_tokens = TOKENIZER, ControlTokens(TOKENIZER)

    def __init__(self, *answers, context=100):
        self.answers, self.context = iter(answers), context
        self.prompts, self.seeds, self.closed = [], [], 0

    def cast_params(self, params):
        return params

    def stream(self, params, prompt, sampling, *, seed=0):
        self.prompts.append(list(prompt))
        self.seeds.append(seed)
        try:
            for item in next(self.answers):
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


def said(text):
    """A sampled text, as (token, mask) pairs."""
    return [(i, 1) for i in text.encode()]


def sampled(*tokens):
    return [(token, 1) for token in tokens]


def result(text):
    """What the engine forces after a calculator call."""
    return [(OUTPUT, 0), *((i, 0) for i in text.encode()), (OUTPUT_END, 0)]


def call(expression):
    return [*sampled(PYTHON), *said(expression), *sampled(PYTHON_END)]


def turn(question, *answer):
    return [USER, *question.encode(), USER_END, ASSISTANT, *answer, END]


def asked(question):
    return turn(question)[:-1]


def talk(monkeypatch, engine, text, sampling=SAMPLING, seed=42, params=None):
    """A chat whose user types these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    made = Chat(engine, params, sampling, seed)
    made.talk()
    return made


# ---- what is shown of an answer


def shown(pairs):
    return "".join(text for text, _ in Answer(TOKENIZER).pieces(pairs))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (said("It is 4.") + sampled(END), "It is 4."),
        (said("It is ") + call("2+2") + result("4") + said(" .") + sampled(END), "It is [2+2 = 4] ."),
        (call("2+") + said("?") + sampled(END), "[2+]?"),  # refused
        (call("2+") + sampled(END), "[2+]"),
        (call("2+2"), "[2+2]"),  # cut before the result
        (call("2+2") + result("4")[:2], "[2+2 = 4]"),  # cut in the result
        (sampled(PYTHON) + said("1+") + call("2+2") + result("4"), "[1+][2+2 = 4]"),  # begins anew in the block
        (sampled(PYTHON) + said("1+") + sampled(END), "[1+]"),
        (call("") + call("1") + result("1"), "[][1 = 1]"),
        (call("1") + result("1") + call("2") + result("2"), "[1 = 1][2 = 2]"),
        (sampled(PYTHON_END, OUTPUT) + said("4") + sampled(OUTPUT_END, USER, USER_END, ASSISTANT), "4"),
        (call("1+1") + sampled(OUTPUT) + said("3") + sampled(OUTPUT_END), "[1+1]3"),  # a result of its own
        (said("a") + sampled(BOS), "a"),
        (sampled(END), ""),
    ],
)
def test_calls_are_shown_in_brackets_and_special_tokens_never(answer, expected):
    assert shown(answer) == expected


def test_only_a_call_is_coloured():
    pieces = Answer(TOKENIZER).pieces(said("a") + call("1") + result("2") + said("b"))
    parts = ["".join(text for text, _ in run) for _, run in itertools.groupby(pieces, key=lambda piece: piece[1])]
    assert parts == ["a", "[1 = 2]", "b"]


def test_characters_are_shown_whole_and_bytes_of_none_are_replaced():
    pieces = [text for text, _ in Answer(TOKENIZER).pieces(said("é€") + sampled(0xF0, 0x9F, END))]
    assert pieces == ["é", "€", "\ufffd"]


def test_text_is_shown_as_it_comes():
    came = []
    stream = (came.append(pair) or pair for pair in said("ab") + call("1+2") + result("3"))
    for text, _ in Answer(TOKENIZER).pieces(stream):
        assert shown(came).removesuffix("]").endswith(text.removesuffix("]"))
        if text in "ab":
            assert len(came) == "ab".index(text) + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\rb\x08\x7f\x00", r"a\rb\x08\x7f\x00"),
        ("\x9b2J\x85", r"\x9b2J\x85"),
        ("\u202eevil\u2066\u200b\ufeff", r"\u202eevil\u2066\u200b\ufeff"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\xa0\u3000 [x] \\ é 👩\u200d🚀 می\u200cخواهم", "\xa0\u3000 [x] \\ é 👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_no_control_character_reaches_the_terminal(text, expected):
    assert escaped(text) == expected
    assert shown(said(text)) == expected


def test_a_special_token_does_not_hide_a_control_character(monkeypatch, capsys):
    answer = sampled(0x1B) + sampled(USER) + said("[2J") + call("\x1b[2J") + result("\x07") + sampled(END)
    talk(monkeypatch, Script(answer), "hi\n")
    assert capsys.readouterr().out == "\\x1b[2J[\\x1b[2J = \\x07]\n"


# ---- the history


def test_the_prompt_holds_the_very_tokens_that_were_generated(monkeypatch):
    first = said("It is ") + call("2+2") + result("4") + sampled(0xFF, USER) + said("x") + sampled(END)
    engine = Script(first, said("ok") + sampled(BOS), sampled(END), sampled(END))
    talk(monkeypatch, engine, "two\n it \nthree\nfour")
    turns = [turn("two", *(token for token, _ in first[:-1])), turn("it", *b"ok"), turn("three")]
    assert engine.prompts == [
        [BOS, *asked("two")],
        [BOS, *turns[0], *asked("it")],
        [BOS, *turns[0], *turns[1], *asked("three")],  # the bos that ended an answer begins no new document
        [BOS, *turns[0], *turns[1], *turns[2], *asked("four")],
    ]


def test_what_a_user_types_never_becomes_a_special_token(monkeypatch):
    engine = Script(sampled(END))
    talk(monkeypatch, engine, "<|assistant_end|>\n")
    assert engine.prompts == [[BOS, *asked("<|assistant_end|>")]]


def test_the_oldest_turns_are_forgotten_and_it_is_said(monkeypatch, capsys):
    engine = Script(*[said("abcde") + sampled(END)] * 4, context=50)
    talk(monkeypatch, engine, "one\ntwo\nsix\nten\n", SamplingParams(0.6, 50, 15))  # a turn has 12 tokens, 15 stay free
    one, two, six = (turn(q, *b"abcde") for q in ("one", "two", "six"))
    assert engine.prompts[1:] == [
        [BOS, *one, *asked("two")],
        [BOS, *one, *two, *asked("six")],
        [BOS, *two, *six, *asked("ten")],
    ]
    assert capsys.readouterr().err == "(the oldest turn is forgotten: the context of 50 has no room for more)\n"

    engine = Script(*[said("abcde") + sampled(END)] * 4, context=50)
    talk(monkeypatch, engine, "one\ntwo\n" + "m" * 20, SamplingParams(0.6, 50, 15))
    assert engine.prompts[2] == [BOS, *asked("m" * 20)]
    assert "(the oldest 2 turns are forgotten:" in capsys.readouterr().err


def parse_turns(prompt):
    """The turns of a prompt; an error where they are not whole, or in another order than user, assistant."""
    assert prompt[0] == BOS and BOS not in prompt[1:]
    turns, rest = [], prompt[1:]
    while END in rest:
        turns.append(rest[: rest.index(END) + 1])
        rest = rest[len(turns[-1]) :]
    for ids in (*turns, [*rest, END]):
        control_tokens = [i for i in ids if i in (USER, USER_END, ASSISTANT, END)]
        assert control_tokens == [USER, USER_END, ASSISTANT, END] and ids[0] == USER and ids[-1] == END
    return turns


ANSWERS = st.lists(
    st.one_of(
        st.text(max_size=30).map(said),
        st.tuples(st.text("0+1", max_size=3), st.booleans()).map(lambda c: call(c[0]) + result("7") * c[1]),
        st.sampled_from([sampled(PYTHON), sampled(PYTHON_END), sampled(OUTPUT), sampled(OUTPUT_END)]),
    ),
    max_size=4,
).map(lambda parts: list(itertools.chain(*parts)))
TURNS = st.lists(st.tuples(st.text(max_size=40), ANSWERS, st.sampled_from([END, BOS, None])), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(turns=TURNS, context=st.integers(8, 120), limit=st.integers(1, 150))
def test_prompts_fit_begin_with_bos_alternate_and_end_with_the_newest_turns(turns, context, limit):
    room = min(limit, context // 2)
    history, whole = History(TOKENIZER, context, room), []
    for message, pairs, end in turns:
        try:
            question = history.question(message)
        except ValueError:
            assert len(message.encode(errors="replace")) > context - 5
            continue
        forgotten, held = history.make_room(question), len(whole) and history.turns
        prompt = history.prompt(question)
        assert 0 < len(prompt) < context and prompt[-len(question) :] == question
        assert parse_turns(prompt) == (whole[-len(held) :] if held else [])
        assert not held or len(prompt) + room <= context
        assert forgotten == 0 or len([BOS, *whole[-len(history.turns) - 1], *prompt[1:]]) + room > context

        answer = Answer(TOKENIZER)
        space = min(limit, context - len(prompt))
        came = (pairs + sampled(end) if end else pairs)[:space] or said("x")
        for _ in answer.pieces(came):
            pass
        ended = answer.tokens[-1] in (END, BOS)
        history.add(question, answer.kept(ended))
        expected = [token for token, _ in came][: len(came) - ended]
        assert history.turns[-1][: len(question)] == question and history.turns[-1][-1] == END
        kept = history.turns[-1][len(question) : -1]
        assert kept == expected[: len(kept)] and (not ended or kept == expected)
        whole.append(history.turns[-1])


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (said("a") + sampled(PYTHON) + said("1+"), b"a"),
        (said("a") + call("1+2"), b"a"),  # its result was due
        (said("a") + call("1+2") + result("3")[:-1], b"a"),
        (call("1") + result("1") + sampled(PYTHON), [PYTHON, *b"1", PYTHON_END, OUTPUT, *b"1", OUTPUT_END]),
        (call("1+") + said("b"), [PYTHON, *b"1+", PYTHON_END, *b"b"]),
        (call("1+2") + result("3"), [PYTHON, *b"1+2", PYTHON_END, OUTPUT, *b"3", OUTPUT_END]),
    ],
)
def test_a_cut_answer_leaves_no_open_call_in_the_history(monkeypatch, answer, kept):
    engine = Script(answer, sampled(END))
    talk(monkeypatch, engine, "one\ntwo\n")
    assert engine.prompts[1] == [BOS, *turn("one", *kept), *asked("two")]


def test_a_cut_answer_says_which_limit_cut_it(monkeypatch, capsys):
    talk(monkeypatch, Script(said("x" * 20), said("y" * 5), context=40), "one\n" + "m" * 31 + "\n")
    assert capsys.readouterr().err.splitlines() == [
        "(the answer was cut after 20 tokens, by --max-new-tokens)",
        "(the oldest turn is forgotten: the context of 40 has no room for more)",
        "(the answer was cut after 5 tokens, by the end of the context of 40)",
    ]


def test_a_message_beyond_the_context_is_not_sent_and_the_chat_goes_on(monkeypatch, capsys):
    engine = Script(sampled(END), sampled(END), context=40)
    talk(monkeypatch, engine, f"one\n{'m' * 36}\n{'m' * 35}\n")
    assert engine.prompts == [[BOS, *asked("one")], [BOS, *asked("m" * 35)]]
    assert (
        "(a message must have at most 35 tokens to fit into the model's context of 40, this one has 36; it"
        in (capsys.readouterr().err.splitlines()[0])
    )


def test_a_message_that_cannot_be_split_is_not_sent_either(monkeypatch, capsys):
    def encode(text):
        if text == "..":
            raise UnsplittableText("too many")
        return list(text.encode())

    engine = Script(sampled(END))
    engine.tokenizer = tiny.tokenizer()
    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    talk(monkeypatch, engine, "..\none\n")
    assert engine.prompts == [[BOS, *asked("one")]] and "(too many)" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_sent_as_replacement_characters():
    assert History(TOKENIZER, 40, 5).question("\udcff") == asked("\ufffd")


# ---- commands, and the end


def test_clear_forgets_the_chat_and_quit_ends_it(monkeypatch, capsys):
    engine = Script(said("a") + sampled(END), said("b") + sampled(END))
    talk(monkeypatch, engine, "one\n\n   \n CLEAR \ntwo\nQuit\nthree\n")
    assert engine.prompts == [[BOS, *asked("one")], [BOS, *asked("two")]]
    assert capsys.readouterr() == ("a\nb\n", "(the chat is forgotten)\n")


@pytest.mark.parametrize("text", ["", "\n", "exit", "clear\n"])
def test_an_empty_chat_ends_by_itself(monkeypatch, capsys, text):
    talk(monkeypatch, Script(), text)
    assert capsys.readouterr().out == ""


def test_every_answer_has_a_seed_of_its_own(monkeypatch):
    engine = Script(*[sampled(END)] * 3)
    talk(monkeypatch, engine, "one\nclear\none\none\n", seed=2**31 - 2)
    assert engine.seeds == [2**31 - 2, 2**31 - 1, 0]


# ---- Ctrl-C


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def keyboard(monkeypatch):
    """keyboard(lines): what is typed at the prompts; an exception is raised there, the end is Ctrl-D."""

    def types(*lines):
        lines = iter([*lines, EOFError()])

        def typed(prompt):
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", typed)

    return types


class Interrupting(list):
    """An answer during which Ctrl-C is pressed."""

    def __iter__(self):
        yield from super().__iter__()
        signal.raise_signal(signal.SIGINT)
        yield from said("too late")


def test_ctrl_c_stops_the_answer_and_what_there_is_of_it_stays(keyboard, capsys):
    engine = Script(Interrupting(said("half")), said("ok") + sampled(END))
    keyboard("one", "two")
    Chat(engine, None, SamplingParams(), 0).talk()
    assert engine.prompts[1] == [BOS, *turn("one", *b"half"), *asked("two")]
    out, err = capsys.readouterr()
    assert out == "half\nok\n\n" and err == "(stopped)\n"
    assert engine.closed == 2  # the engine has stopped working


class Careless(list):
    """An answer during which Ctrl-C is pressed in a callback whose exceptions Python prints and drops."""

    def __iter__(self):
        yield from super().__iter__()

        class Dropping:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        Dropping()
        yield from said("too late")


def test_ctrl_c_is_not_lost_where_python_drops_the_exception(keyboard, capsys):
    engine = Script(Careless(said("half")), said("ok") + sampled(END))
    keyboard("one", "two")
    Chat(engine, None, SamplingParams(), 0).talk()
    out, err = capsys.readouterr()
    assert out == "half\nok\n\n" and err == "(stopped)\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and sys.unraisablehook is not None


def test_ctrl_c_before_the_first_token_forgets_the_message(keyboard, capsys):
    engine = Script([KeyboardInterrupt()], sampled(END))
    keyboard("one", "two")
    Chat(engine, None, SamplingParams(), 0).talk()
    assert engine.prompts[1] == [BOS, *asked("two")]
    assert capsys.readouterr().err == "(stopped before the answer began; the message is forgotten)\n"


def test_ctrl_c_at_the_prompt_gives_a_hint_and_the_second_one_ends(keyboard, capsys):
    engine = Script(said("a") + sampled(END))
    keyboard(KeyboardInterrupt(), "one", KeyboardInterrupt(), KeyboardInterrupt(), "two")
    with pytest.raises(KeyboardInterrupt):
        Chat(engine, None, SamplingParams(), 0).talk()
    out, err = capsys.readouterr()
    assert out == "\na\n\n" and err == 2 * "(Ctrl-C again, Ctrl-D or quit ends the chat)\n"
    assert len(engine.prompts) == 1


# ---- colours, and the first answer


def test_calls_are_coloured_where_there_are_colours(monkeypatch, capsys):
    answer = said("a") + call("1") + result("2") + said("b") + sampled(END)
    monkeypatch.setenv("FORCE_COLOR", "1")
    talk(monkeypatch, Script(answer), "hi\n")
    cyan = capsys.readouterr().out
    assert cyan.startswith("a\x1b[36m[\x1b[0m\x1b[36m1") and cyan.endswith("]\x1b[0mb\n")
    monkeypatch.setenv("NO_COLOR", "1")
    talk(monkeypatch, Script(answer), "hi\n")
    assert capsys.readouterr().out == "a[1 = 2]b\n"


def test_the_first_answer_says_that_it_compiles(capsys):
    made = Chat(Script(sampled(END), sampled(END)), None, SamplingParams(), 0)
    made.notes = Console(file=io.StringIO(), force_terminal=True)
    made.reply("one")
    assert "compiling" in made.notes.file.getvalue()
    made.notes.file.truncate(0)
    made.reply("two")
    assert "compiling" not in made.notes.file.getvalue() and "thinking" in made.notes.file.getvalue()
    assert capsys.readouterr().out == "\n\n"


# ---- with a model


@pytest.fixture(scope="module")
def base(base):
    """A base directory with a tiny model as SFT's, and a newer checkpoint that is damaged."""
    newer = base / "base_checkpoints/d2/9"
    shutil.copytree(newer.with_name("7"), newer)
    next(p for p in (newer / "params").rglob("*") if p.is_file()).write_bytes(b"damaged")
    (base / "base_checkpoints").rename(base / "chatsft_checkpoints")
    return base


@pytest.fixture(scope="module")
def model(base):
    """(engine, parameters)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return chat.load_model(ChatConfig())[:2]


run = functools.partial(run_command, chat.main, ChatConfig)


def test_one_prompt_prints_the_answer_and_nothing_else(model, monkeypatch, capsys):
    engine, params = model
    monkeypatch.setattr(chat, "load_model", lambda cfg: (engine, params, FOUND["sft"]))
    assert run("-p", "hello", "-t", "1", "-k", "40", "--max-new-tokens", "12", "--seed", "5") == 0
    prompt = TOKENIZER.render_for_completion(
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]}
    )
    answer = engine.stream(params, prompt, SamplingParams(1.0, 40, 12), seed=5)
    assert capsys.readouterr().out == shown(answer) + "\n"


def test_a_chat_repeats_itself_with_the_same_seed_and_not_with_another(model, monkeypatch, capsys):
    engine, params = model
    outputs = []
    for seed in (1, 1, 2):
        talk(monkeypatch, engine, "hello\nclear\nhello\n", SamplingParams(1.0, 0, 12), seed, params)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    first, second = outputs[0][:-1].split("\n", 1)  # the same prompt, with different seeds
    assert first != second


def test_an_answer_that_is_stopped_leaves_the_engine_usable(model, capsys):
    made = Chat(*model, SamplingParams(1.0, 50, 12), 3)
    write, first = made.write, iter([True])

    def interrupted(text):
        if next(first, False):
            raise KeyboardInterrupt
        write(text)

    made.write = interrupted
    assert [made.reply("hello"), made.reply("you")] == [False, True]
    assert [ids[0] for ids in made.history.turns] == [USER, USER]
    assert len(capsys.readouterr().out) > 2


def test_what_is_said_while_the_model_loads_is_no_part_of_the_answer(monkeypatch, capsys):
    monkeypatch.setattr(find, "Engine", lambda *args, **kwargs: Script(said("x") + sampled(END)))
    monkeypatch.setattr(Script, "cast_params", lambda self, params: print("loaded"))
    assert run("-p", "hi") == 0
    out, err = capsys.readouterr()
    assert out == "x\n" and "9 is damaged and is passed over" in err and "loaded" in err


def test_a_terminal_is_told_what_it_talks_to(keyboard, monkeypatch, capsys):
    monkeypatch.setattr(chat, "Engine", lambda *args, **kwargs: Script())
    keyboard()
    assert run("--step", "7") == 0
    out, err = capsys.readouterr()
    assert out == "\n" and "chatsft_checkpoints/d2/7; clear" in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["-t", "-1"], "--temperature must be"),
        (["-k", "-1"], "--top-k must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", str(2**31)], "--seed must be"),
        (["-p", ""], "--prompt must hold a message"),
        (["-i", "mid"], "no mid model"),
        (["-i", "rl"], "no rl model"),
        (["-g", "d9"], "--model-tag=d9"),
        (["-s", "8"], "--model-step=8"),
        (["--device-type", "abacus"], "--device-type must be"),
        (["--dtype", "int4"], "--dtype must be"),
        (["-p", "x" * 60], "at most 59 tokens"),
    ],
)
def test_what_cannot_work_ends_with_one_sentence(argv, sentence, capsys):
    code = run(*(argv if "-p" in argv else ["-p", "hi", *argv]))
    assert code.startswith("error: ") and sentence in code and "\n" not in code
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "argv"), [("stdin", []), ("stdout", ["-p", "hi"])])
def test_a_closed_stream_is_said_before_a_model_is_loaded(monkeypatch, name, argv):
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, None)
        assert f"standard {name.replace('std', '')}put is closed" in run(*argv)


def test_ctrl_c_during_the_one_answer_is_told_by_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_model", lambda cfg: (Script(Interrupting(said("half"))), None, FOUND["sft"]))
    assert run("-p", "hi") == 130
    assert capsys.readouterr() == ("half\n", "(stopped)\n")


def test_a_base_model_is_said_not_to_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_model", lambda cfg: (Script(said("x") + sampled(END)), None, FOUND["base"]))
    assert run("-i", "base", "-p", "hi") == 0
    out, err = capsys.readouterr()
    assert out == "x\n" and "has not learned to take turns" in err


def test_from_the_command_line_lines_are_turns_and_a_closed_pipe_ends_with_a_sentence(base):
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "nanochat_jax.chat", "-t", "0", "--max-new-tokens", "4"]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, cwd=ROOT, **pipe) as process:
        process.stdin.write(b"hi\n\xff\xfe\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"\n")  # the first answer comes while the input is still open
        process.stdout.close()
        process.stdin.write(b"more\n" * 3)
        process.stdin.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert "Traceback" not in err and "whoever read the output has closed it" in err
