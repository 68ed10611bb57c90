"""Evaluation: letters by their logits, generated answers and their judges, ChatCORE, and the command line."""

import functools
import itertools
import json
import os
import sys
import time
import types
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from nanochat_jax import eval as evaluation
from nanochat_jax.checkpoints import find
from nanochat_jax.distributed import mesh as distributed_mesh
from nanochat_jax.distributed import processes, sharding
from nanochat_jax.distributed.signals import Interrupted
from nanochat_jax.evals import chatcore, passes
from nanochat_jax.evals.chatcore import BASELINES, make_chatcore
from nanochat_jax.evals.eval_set import make_eval_set
from nanochat_jax.evals.evaluator import Evaluator, collect_items, judge_answers
from nanochat_jax.evals.multiple_choice import make_letter_logits
from nanochat_jax.inference.decode import GenerationPrograms
from nanochat_jax.inference.samples import Sample, answer_text
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.model.gpt import abstract_gpt
from nanochat_jax.tasks import HumanEval, Task, registry, sandbox
from nanochat_jax.tasks.multiple_choice import MultipleChoice, choice_conversation
from nanochat_jax.tasks.registry import make_task
from tests.support import tiny
from tests.support.commands import run_command
from tests.support.models import random_params

ONE = distributed_mesh.make_mesh("data=1")
TOKENIZER = tiny.tokenizer()
CHOICE = ("ARC-Easy", "ARC-Challenge", "MMLU")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8)
QUESTIONS = [("Which?", "ABCD", "C"), ("What is red, and not blue, and neither green nor grey?", "123", "1")] * 3
QUESTIONS += [("Why", "AB", "B"), ("x" * 90, "ABCDE", "E")]
WORDS = "\n".join(map("".join, itertools.product("abcdefghij", repeat=3)))  # one in twenty is for the test split


class Quiz(Task):
    """Questions (text, letters, answer)."""

    eval_type = "categorical"
    evaluate = MultipleChoice.evaluate

    def __init__(self, questions=QUESTIONS):
        super().__init__()
        self.questions = questions

    def num_examples(self):
        return len(self.questions)

    def get_example(self, index):
        text, letters, answer = self.questions[index]
        return choice_conversation(text, [f"choice {letter}" for letter in letters], list(letters), answer)


class Even(Task):
    """Right is whatever has an even number of characters, so about every second answer."""

    def __init__(self, lengths=(5, 9, 3)):
        super().__init__()
        self.lengths = lengths

    def num_examples(self):
        return len(self.lengths)

    def get_example(self, index):
        question = "q" * self.lengths[index]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]}

    def evaluate(self, conversation, answer):
        return len(answer) % 2 == 0


@pytest.fixture(scope="module")
def params():
    made = random_params(tiny.CONFIG)
    return jax.device_put(made, sharding.param_shardings(made, ONE))  # as those that come from files


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(tiny.CONFIG, TOKENIZER, ONE, rows=3, slots=6)


# ------------------------------------------------------------------------------------------------- multiple choice
@pytest.mark.parametrize(("mesh", "rows"), [("data=1", 3), ("data=4,model=2", None)])
def test_letter_logits_are_those_of_the_plain_forward_after_the_last_token(params, mesh, rows):
    eval_set = make_eval_set("quiz", Quiz(), TOKENIZER)
    mesh, done = distributed_mesh.make_mesh(mesh), []
    letter_logits = make_letter_logits(tiny.CONFIG, mesh, TOKENIZER.bos, rows=rows)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(params, mesh))
        ours = letter_logits(placed, eval_set.prompts, eval_set.letters, lambda *counts: done.append(counts))
    for prompt, letters, logits in zip(eval_set.prompts, eval_set.letters, ours, strict=True):
        expected = forward(params, prompt[None])[0, -1, np.array(letters)]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert done[-1] == (len(QUESTIONS), len(QUESTIONS)) and sorted(done) == done


@jax.jit
def forward(params, ids):
    return nnx.merge(abstract_gpt(tiny.CONFIG)[0], params)(ids)


def with_letters_alike(params, letters):
    """Parameters under which these letters always have the same logit, larger than that of any other token."""
    head = np.array(params["lm_head"])
    head[:] *= 0.01
    head[[ord(letter) for letter in letters]] = head[ord(letters[0])]
    return params | {"lm_head": jax.device_put(head, params["lm_head"].sharding)}


def test_the_first_of_equal_letters_wins_and_only_offered_ones_count(evaluator, params):
    alike = with_letters_alike(params, "ABCDEFG12345")
    chosen = evaluator.choose_letters(alike, make_eval_set("quiz", Quiz(), TOKENIZER))
    assert chosen == [letters[0] for _, letters, _ in QUESTIONS]
    order = make_eval_set("quiz", Quiz([("Which?", "DCBA", "A"), ("Which?", "ZB", "B")]), TOKENIZER)
    assert evaluator.choose_letters(with_letters_alike(params, "ABCD"), order)[0] == "D"


def test_accuracy_counts_the_letters_that_are_right(evaluator, params):
    eval_set = make_eval_set("quiz", Quiz(), TOKENIZER)
    chosen = evaluator.choose_letters(params, eval_set)
    asked = [(text, letters, letter) for (text, letters, _), letter in zip(QUESTIONS, chosen)]
    all_right = evaluator.evaluate(params, make_eval_set("quiz", Quiz(asked), TOKENIZER), GREEDY)
    assert all_right.accuracy.value == 1.0
    text, letters, letter = asked[0]
    asked[0] = (text, letters, "ABCD"["ABCD".index(letter) - 1])
    result = evaluator.evaluate(params, make_eval_set("quiz", Quiz(asked), TOKENIZER), GREEDY)
    assert result.passed[:, 0].tolist() == [False] + [True] * 7 and result.cut is None
    assert result.accuracy.low < 7 / 8 == result.accuracy.value < result.accuracy.high


def test_weights_that_are_no_numbers_are_said_instead_of_scored(evaluator, params):
    broken = params | {"lm_head": params["lm_head"] * np.nan}
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluator.choose_letters(broken, make_eval_set("quiz", Quiz(), TOKENIZER))


def test_an_interrupt_after_a_pass_leaves_one_more_on_the_devices(evaluator, params, monkeypatch):
    dispatched, to_global = [], passes.to_global

    def dispatch(batch, mesh):
        dispatched.append(batch)
        return to_global(batch, mesh)

    monkeypatch.setattr(passes, "to_global", dispatch)
    with pytest.raises(Interrupted):
        evaluator.choose_letters(params, make_eval_set("quiz", Quiz(), TOKENIZER), interrupt)
    assert len(dispatched) == 2 < -(-len(QUESTIONS) // 3)


def interrupt(done, total):
    raise Interrupted


# -------------------------------------------------------------------------------------------------- what is prepared
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Quiz([("?", ["A", "BC"], "A")]), "^quiz, problem 0: each letter must be one token, but 'BC' is 2"),
        (Quiz([("?", ["A", ""], "A")]), "must be one token, but '' is 0"),
        (Quiz([("?", "AB", "A"), ("?", "AB", "C")]), "^quiz, problem 1: the answer must be one of A, B"),
        (type("T", (Even,), {"evaluate": Task.evaluate})(), "^quiz cannot judge .* defines no evaluate"),
        (type("T", (Even,), {"evaluate": lambda *_: 0.5})(), r"evaluate must return 0 or 1, got 0.5"),
        (type("T", (Even,), {"evaluate": lambda *_: None})(), r"evaluate must return 0 or 1, got None"),
        (type("T", (Even,), {"evaluate": lambda *_: sys.exit(3)})(), "SystemExit: 3"),
        (type("T", (Even,), {"evaluate": lambda *_: np.zeros(2)})(), "cannot judge the answer to problem 0"),
        (type("T", (Even,), {"get_example": lambda *_: {}["x"]})(), "^quiz, problem 0: KeyError: 'x'"),
        (type("T", (Even,), {"get_example": lambda *_: {"messages": []}})(), "problem 0: .*no messages"),
        (type("T", (Even,), {"eval_type": "categorical"})(), "problem 0: KeyError: 'letters'"),
        (Even(()), "^quiz has no problems"),
    ],
)
def test_a_task_that_cannot_be_put_to_a_model_is_refused_before_any_work(task, message):
    with pytest.raises(ValueError, match=message):
        make_eval_set("quiz", task, TOKENIZER)


def test_conversations_that_carry_letters_are_multiple_choice_whatever_the_task_says():
    task = Quiz()
    task.eval_type = "generative"
    assert make_eval_set("quiz", task, TOKENIZER, 2).letters == [[65, 66, 67, 68], [49, 50, 51]]
    assert make_eval_set("even", Even(), TOKENIZER).letters is None


# ------------------------------------------------------------------------------------------------ generated answers
def sample_of(text: str, ended: bool = True) -> Sample:
    tokens = TOKENIZER.encode(text) + [TOKENIZER.special("<|assistant_end|>")] * ended
    logprobs = np.zeros(len(tokens), np.float32)
    return Sample(np.array(tokens, np.int32), np.ones(len(tokens), np.uint8), logprobs, logprobs, ended, [])


def test_the_judged_text_lacks_the_end_token_and_nothing_else():
    assert answer_text(TOKENIZER, sample_of("#### 5")) == answer_text(TOKENIZER, sample_of("#### 5", False)) == "#### 5"
    tool = sample_of("")
    tool.tokens = np.array([TOKENIZER.special("<|python_start|>"), 49, TOKENIZER.special("<|bos|>")], np.int32)
    assert answer_text(TOKENIZER, tool) == "<|python_start|>1"


def test_each_answer_is_judged_with_its_own_problem_and_what_does_not_fit_is_wrong(evaluator, params):
    task = Even((5, 2000, 9, 3))
    task.evaluate = lambda conversation, answer: len(answer + conversation["messages"][0]["content"]) % 2 == 0
    eval_set = make_eval_set("even", task, TOKENIZER)
    assert len(eval_set.prompts[1]) > evaluator.engine.context
    sampling = SamplingParams(temperature=1.0, max_new_tokens=6)
    result = evaluator.evaluate(params, eval_set, sampling, samples=3, seed=5)
    fitting = [0, 2, 3]
    prompts = [eval_set.prompts[i] for i in fitting]
    groups = evaluator.engine.generate(params, prompts, sampling, samples=3, seed=5, examples=fitting)
    expected = np.zeros((4, 3), bool)
    for i, group in zip(fitting, groups):
        for k, sample in enumerate(group):
            expected[i, k] = task.evaluate(eval_set.conversations[i], answer_text(TOKENIZER, sample))
    assert result.too_long == 1 and not result.passed[1].any()
    np.testing.assert_array_equal(result.passed, expected)
    assert result.cut == np.mean([not sample.ended for group in groups for sample in group])
    assert list(result.pass_at()) == [1, 2, 3] and result.accuracy.value == pytest.approx(expected.mean())
    assert result.pass_at()[3].value == expected.any(1).mean()  # nanochat's accuracy


def test_a_task_none_of_whose_problems_fits_is_all_wrong(evaluator, params):
    result = evaluator.evaluate(params, make_eval_set("even", Even((2000,)), TOKENIZER), GREEDY)
    assert result.too_long == 1 and result.passed.tolist() == [[False]] and result.cut == 0.0


@pytest.mark.skipif(sandbox.guard_fault() is not None, reason=f"no sandbox here: {sandbox.guard_fault()}")
def test_programs_of_humaneval_are_run(evaluator, datasets, monkeypatch):
    eval_set = make_eval_set("HumanEval", HumanEval(data_dir=datasets), TOKENIZER)
    right = ["```python\ndef inc(x):\n    return x + 1\n```" if i else "def inc(x): return x" for i in range(3)]

    def generate(params, prompts, sampling, **_):
        return [[sample_of(right[0]), sample_of(right[1])], [sample_of(right[2], False), sample_of("def inc(")]]

    monkeypatch.setattr(evaluator.engine, "generate", generate)
    assert evaluator.evaluate(None, eval_set, GREEDY, samples=2).passed.tolist() == [[False, True], [True, False]]


def test_an_interrupt_ends_generating_and_judging(evaluator, params, datasets, monkeypatch):
    even = make_eval_set("even", Even(), TOKENIZER)
    with pytest.raises(Interrupted):
        evaluator.evaluate(params, even, GREEDY, progress=interrupt)
    with pytest.raises(Interrupted):
        judge_answers(even, [(0, "a"), (1, "b")], interrupt)
    programs = make_eval_set("HumanEval", HumanEval(data_dir=datasets, unsafe=True), TOKENIZER)
    monkeypatch.setattr(HumanEval, "evaluate", lambda self, conversation, answer: time.sleep(3) or 1)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        judge_answers(programs, [(0, "a"), (1, "b")], interrupt)
    assert time.monotonic() - began < 2.5  # what runs is not waited for


def test_processes_put_their_parts_together_or_are_all_interrupted(monkeypatch):
    monkeypatch.setattr(processes, "exchange", lambda what, own: [own, [["b"], ""]])
    assert collect_items("letters", lambda: ["a", "c"]) == ["a", "b", "c"]
    with pytest.raises(Interrupted):
        collect_items("letters", lambda: interrupt(0, 0))
    monkeypatch.setattr(processes, "exchange", lambda what, own: [own, None])
    with pytest.raises(Interrupted):
        collect_items("letters", lambda: ["a", "c"])


# --------------------------------------------------------------------------------------------------------- ChatCORE
def test_chatcore_is_the_mean_of_centred_accuracies():
    guessing = dict(BASELINES)
    assert chatcore.chatcore(guessing) == 0.0
    assert chatcore.chatcore(dict.fromkeys(BASELINES, 1.0)) == 1.0
    # (0.7-0.25)/0.75 = 0.6, (0.4-0.25)/0.75 = 0.2, (0.1-0.25)/0.75 = -0.2, 0.3, 0.1: their mean is 0.2
    accuracies = {"ARC-Easy": 0.7, "ARC-Challenge": 0.4, "MMLU": 0.1, "GSM8K": 0.3, "HumanEval": 0.1, "Other": 1.0}
    assert chatcore.chatcore(accuracies) == pytest.approx(0.2)
    with_spelling = accuracies | {"SpellingBee": 0.8}
    assert chatcore.chatcore(with_spelling) == pytest.approx(0.2)
    assert chatcore.chatcore(with_spelling, chatcore.WITH_SPELLING) == pytest.approx(0.3)
    del accuracies["MMLU"]
    assert chatcore.chatcore(accuracies) is None


# ----------------------------------------------------------------------------------------------- data of all tasks
def write_split(root, repo, subset, rows):
    folder = root / "hub" / repo.replace("/", "--") / subset / "test"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "manifest.json").write_text(json.dumps(["00000.parquet"]))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with a few rows of every task's data."""
    root = tmp_path_factory.mktemp("data")
    for subset, labels in (("ARC-Easy", "ABC"), ("ARC-Challenge", "1234")):
        choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
        row = {"id": "x", "question": "Which?", "choices": choices, "answerKey": labels[1]}
        write_split(root, "allenai/ai2_arc", subset, [row] * 3)
    mmlu = {"question": "Which?", "subject": "s", "choices": list("wxyz"), "answer": 2}
    write_split(root, "cais/mmlu", "all", [mmlu] * 3)
    write_split(root, "openai/gsm8k", "main", [{"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}] * 3)
    program = {"prompt": "def inc(x):\n", "canonical_solution": "    return x + 1\n", "entry_point": "inc"}
    check = {"test": "def check(candidate):\n    assert candidate(1) == 2\n"}
    write_split(root, "openai/openai_humaneval", "openai_humaneval", [program | check] * 2)
    (root / "words_alpha.txt").write_text(WORDS)
    return root


pytestmark = pytest.mark.usefixtures("in_base")


run = functools.partial(run_command, evaluation.main, evaluation.EvalConfig)
SHORT = ("-i", "base", "-m", "4", "--mesh", "data=1")
THREE = ("-x", "2", "-n", "3", "-t", "1")  # answers to each of two problems: tests that ask so share their programs


# ------------------------------------------------------------------------------------------------- the command line
def test_all_tasks_run_and_the_file_tells_what_the_table_shows(datasets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: None)
    monkeypatch.setattr(HumanEval, "evaluate", lambda self, conversation, answer: 1)
    file = tmp_path / "new" / "numbers.json"
    argv = [*SHORT, *THREE, "--data-dir", str(datasets), "--json", str(file)]
    monkeypatch.setattr("nanochat_jax.cli.waiting.INTERVAL", -1.0)  # a line each time, in place of now and then
    assert run(*argv) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert list(report["tasks"]) == list(registry.TASKS) and report["not_run"] == {}
    (kept,) = (Path(line.removeprefix("The result is in ")) for line in out.splitlines() if "The result is in " in line)
    assert json.loads(kept.read_text()) == report and kept.parent == Path(report["model"]).parent
    assert "\nMMLU: 2 of 2\n" in out and "\nGSM8K: 6 of 6\n" in out  # problems, or answers, that are done
    assert report["model"].endswith("base_checkpoints/d2/7") and report["step"] == 7
    accuracies = {name: task["accuracy"]["value"] for name, task in report["tasks"].items()}
    assert accuracies["HumanEval"] == 1.0 and report["tasks"]["HumanEval"]["right"] == [3, 3]
    assert report["chatcore"] == pytest.approx(chatcore.chatcore(accuracies))
    assert report["chatcore_with_spelling"] == pytest.approx(chatcore.chatcore(accuracies, chatcore.WITH_SPELLING))
    assert f"ChatCORE: {report['chatcore']:.4f}" in out and "95 % interval" in out and "pass@3" in out
    for name, task in report["tasks"].items():
        value = task["accuracy"]
        assert task["problems"] == 2 == len(task["right"]) and name in out
        assert value["low"] <= value["value"] <= value["high"] and value["low"] < value["high"]
        assert (
            ("pass_at" in task) == (task["kind"] == "generated") == (name not in ("ARC-Easy", "ARC-Challenge", "MMLU"))
        )
    assert run(*argv) == f"error: --json {file} exists: name a new file"


def test_each_result_has_a_new_file_in_the_models_folder_or_in_that_of_the_output_dir(tmp_path, monkeypatch):
    model = find.Found(tmp_path / "base_checkpoints" / "mine", 7, True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    one, other = (evaluation.place_beside("base", model) for _ in range(2))
    assert one != other and one.parent == other.parent == model.folder and one.name.startswith("eval_000007_")
    monkeypatch.setenv("NANOCHAT_OUTPUT_DIR", str(tmp_path / "out"))
    assert evaluation.place_beside("sft", model).parent == tmp_path / "out" / "chatsft_checkpoints" / "mine"


def test_a_folder_that_cannot_be_written_to_is_a_sentence_and_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = find.Found(tmp_path / "base_checkpoints" / "mine", 7, True)
    place = evaluation.place_beside("base", model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert evaluation.place_beside("base", model) is None
    (tmp_path / "chatsft_checkpoints").touch()  # where a folder must be
    assert evaluation.place_beside("sft", model) is None
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"NOTE: {model.folder} cannot be written to") and "--output-dir" in second
    evaluation.keep(None, {})
    evaluation.keep(tmp_path / "chatsft_checkpoints" / "mine" / place.name, {})  # as where the disk is full
    assert capsys.readouterr().out.startswith("NOTE: the result is not kept: ")


def test_a_task_that_cannot_be_run_is_left_out_of_all_tasks_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: "nothing holds programs here")
    file = tmp_path / "numbers.json"
    assert run(*SHORT, *THREE, "--json", str(file)) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    assert list(report["tasks"]) == ["Arithmetic", "SecondTry", "GuessNumber"]
    assert set(report["not_run"]) == {*BASELINES, "SpellingBee", "SimpleSpelling"}
    assert "cais/mmlu" in report["not_run"]["MMLU"]
    assert "nothing holds programs here, so HumanEval" in report["not_run"]["HumanEval"]
    assert report["chatcore"] is None and "ChatCORE: not computed, it needs ARC-Easy, ARC-Challenge, MMLU" in out


def test_humaneval_without_a_guard_needs_unsafe_exec(datasets, monkeypatch):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: "nothing holds programs here")
    said = run(*SHORT, "-a", "Arithmetic|HumanEval", "--data-dir", str(datasets))
    assert said.startswith("error: nothing holds programs here") and "--unsafe-exec" in said
    assert make_task("HumanEval", data_dir=datasets, unsafe=True).unsafe


def test_a_nanochat_folder_is_evaluated_as_it_is(tmp_path, datasets, monkeypatch, capsys):
    tiny.write_nanochat_base(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run(*SHORT, "-a", "ARC-Easy", "-g", "d2", "-s", "7", "-x", "2", "--data-dir", str(datasets)) == 0
    out = capsys.readouterr().out
    assert "model_000007.pt" in out and "ARC-Easy" in out and "ChatCORE" not in out


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of tasks into the current directory -> its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_own_tasks_run_beside_ours_and_what_is_done_survives_a_judge_that_fails(own_module, tmp_path, capsys):
    own_module(
        "own_quizzes",
        "TALK = {'messages': [{'role': 'user', 'content': 'a or b'}, {'role': 'assistant', 'content': 'b'}]}\n"
        "class MMLU(list):\n"
        "    def __init__(self):\n"
        "        super().__init__([TALK | {'letters': ['a', 'b']}] * 3)\n"
        "    def evaluate(self, conversation, answer):\n"
        "        return answer in ('a', 'b')\n"
        "class Moody(MMLU):\n"
        "    asked = 0\n"
        "    def evaluate(self, conversation, answer):\n"
        "        self.asked += 1\n"
        "        return 7 if self.asked > 2 else 1\n",
    )
    file = tmp_path / "numbers.json"
    said = run(*SHORT, "-a", "own_quizzes:MMLU|own_quizzes:Moody", "--json", str(file))
    assert said.startswith("error: own_quizzes:Moody: evaluate must return 0 or 1, got 7 for problem 1")
    task = json.loads(file.read_text())["tasks"]["own_quizzes:MMLU"]  # never taken for ours of that name
    assert task["kind"] == "multiple choice" and task["accuracy"]["value"] == 1.0 and task["problems"] == 3
    assert "own_quizzes:MMLU: 100.00% of 3 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["-a", "ARC-eazy"], "did you mean ARC-Easy?"),
        (["-a", "GSM8K|"], "-a must name tasks among ARC-Easy, "),
        (["-a", "no_such_module_of_tasks:X"], "cannot import no_such_module_of_tasks"),
        (["-a", "GSM8K"], "dataset openai/gsm8k (subset main, split test) is not on this machine"),
        (["-x", "0"], "--max-problems must be at least 1, got 0"),
        (["-n", "0"], "--num-samples must be at least 1, got 0"),
        (["-n", "4"], "--num-samples=4 at --temperature 0 would be the same answer each time"),
        (["-b", "0"], "--batch-size must be at least 1, got 0"),
        (["--slots", "0"], "--slots must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["-m", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["-k", "-1"], "--top-k must be at least 1, or 0 for no limit, got -1"),
        (["-t", "nan"], "--temperature must be a number from 0 to 1e30, got nan"),
        (["-d", "float16"], "--dtype must be auto, float32 or bfloat16, got 'float16'"),
        (["-i", "pretrained"], "must be base, mid, sft or rl, got pretrained"),
        (["-i", "rl"], "no rl model"),
        (["-s", "8"], "--model-step=8 is not in"),
        (["-g", "d9"], "--model-tag=d9"),
        (["--mesh", "data=99"], "needs 99 x 1 devices"),
        (["--json", "."], "--json . exists"),
    ],
)
def test_what_cannot_work_is_one_sentence(argv, sentence):
    said = run(*SHORT, *argv)
    assert isinstance(said, str) and said.startswith("error: ") and sentence in said and "\n" not in said


def test_a_device_without_memory_is_told_with_the_flags_of_this_stage(monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr(Evaluator, "evaluate", full)
    said = run(*SHORT, "-a", "Arithmetic", "-x", "1", "--slots", "77")
    assert said.startswith("error: Out of device memory with --slots=77. Lower --slots or --max-new-tokens")
    assert "9 bytes" in said


# ------------------------------------------------------------------------------------------------ while SFT runs
def test_measured_in_training_with_limits_and_compiled_once(params, datasets, monkeypatch):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: None)
    monkeypatch.setattr(HumanEval, "evaluate", lambda self, conversation, answer: 1)
    monkeypatch.setattr(chatcore, "NEW_TOKENS", 4)
    said, compiled = [], []
    measure = make_chatcore(
        tiny.CONFIG,
        TOKENIZER,
        mesh=ONE,
        dtype="float32",
        data_dir=datasets,
        max_cat=2,
        max_sample=1,
        log=said.append,
    )
    assert said == []
    parts = []
    found = measure(params, lambda done, total, part: parts.append((part, total)))
    assert set(parts) == {(name, 2 if name in CHOICE else 1) for name in chatcore.WITH_SPELLING}
    accuracies = {name.removeprefix("chatcore/"): v for name, v in found.items() if name.startswith("chatcore/")}
    assert accuracies.keys() == chatcore.WITH_SPELLING.keys()
    assert all(accuracies[name] in (0, 0.5, 1) for name in CHOICE)
    assert found["chatcore"] == pytest.approx(chatcore.chatcore(accuracies))
    cat = [(accuracies[name] - 0.25) / 0.75 for name in CHOICE]
    assert found["chatcore_cat"] == pytest.approx(np.mean(cat))

    monkeypatch.setattr(GenerationPrograms, "cast_params", lambda self, params: params)  # test_engine.py is about it

    def note(event, *_, **__):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert measure(params) == found
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_training_goes_on_without_the_tasks_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "guard_fault", lambda: "nothing holds programs here")
    said = []
    (tmp_path / "words_alpha.txt").write_text(WORDS)
    how = {"mesh": ONE, "dtype": "float32", "data_dir": tmp_path, "log": said.append}
    assert make_chatcore(tiny.CONFIG, TOKENIZER, **how)
    assert sum("is not measured" in line for line in said) == 5 and "no ChatCORE without ARC-Challenge" in said[-1]
    (tmp_path / "words_alpha.txt").unlink()
    assert make_chatcore(tiny.CONFIG, TOKENIZER, **how) is None


def test_the_file_of_numbers_is_json_whatever_the_numbers_are(tmp_path):
    evaluation.save(tmp_path / "numbers.json", {"tasks": {"GSM8K": {"cut": float("nan"), "seconds": 1.5}}})
    text = (tmp_path / "numbers.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report == {"tasks": {"GSM8K": {"cut": None, "seconds": 1.5}}}


@pytest.mark.parametrize("elsewhere", ["missing", "3 problems"])
def test_tasks_of_chatcore_that_differ_between_processes_are_refused(monkeypatch, elsewhere):
    """One task is there on this process, with five problems; on process 0 it is not, or has other ones."""

    class Coordinator:
        cluster, hosts = types.SimpleNamespace(process_count=2, process_index=1), ["one", "two"]

        def exchange(self, what, value):
            return [value | {"GSM8K": elsewhere} if value else value, value]

    def make(name, data_dir):
        if name != "GSM8K":
            raise FileNotFoundError("no data")
        return Even([1] * 5)

    monkeypatch.setattr(processes, "_coordinator", Coordinator())
    monkeypatch.setattr(chatcore, "make_task", make)
    sentence = f"process 1 on two is refused, as it differs from process 0: GSM8K is 5 problems instead of {elsewhere}"
    with pytest.raises(ValueError, match=sentence):
        make_chatcore(tiny.CONFIG, TOKENIZER, mesh=ONE, dtype=np.float32, log=str)
