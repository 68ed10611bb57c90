"""Tasks that answer back: what they say, and what their conversations are worth."""

import pytest

from nanochat_jax.evals.eval_set import judge, make_eval_set, replies
from nanochat_jax.rollouts.prompts import PromptStream
from nanochat_jax.tasks import GuessNumber, SecondTry
from nanochat_jax.tasks.environments import WRONG
from nanochat_jax.tasks.gsm8k import final_answer
from nanochat_jax.tasks.registry import make_task
from nanochat_jax.tasks.task import AdaptedTask, as_played, total
from tests.support import tiny

TOKENIZER = tiny.tokenizer()


def played(task, index, turns):
    """(reply, reward, whether it is solved) after these turns."""
    reply = replies(task, task.__getitem__)(index, turns)
    conversation = as_played(task, task[index], turns)
    return reply, total(task.reward(conversation, turns[-1])), bool(task.evaluate(conversation, turns[-1]))


def test_a_wrong_answer_may_be_tried_again_and_is_then_worth_half():
    task = SecondTry("test", 20)
    for index in range(20):
        right = f"#### {final_answer(task[index]['reference'][-1]['text'])}"
        assert played(task, index, [right]) == (None, 1.0, True)
        assert played(task, index, ["#### -1"]) == (WRONG, 0.0, False) == played(task, index, [""])
        assert played(task, index, ["#### -1", WRONG, right]) == (None, 0.5, True)
        assert played(task, index, [right, WRONG, "#### -1"]) == (WRONG, 0.0, False)


def test_its_problems_are_those_of_arithmetic_and_its_splits_share_none():
    ours, theirs = SecondTry("train", 30, seed=1), make_task("arithmetic", "train", 30)
    assert [c["messages"] for c in ours] == [c["messages"] for c in theirs]
    assert ours.fingerprint() != theirs.fingerprint()
    assert {c["messages"][0]["content"] for c in ours}.isdisjoint(
        c["messages"][0]["content"] for c in make_task("secondtry")
    )


def test_bisecting_finds_every_number_and_each_guess_on_the_way_is_worth_a_little():
    task = GuessNumber("test", 200)
    for index in range(200):
        game = task[index]
        low, high, turns, asked = game["low"], game["high"], [], game["messages"][0]["content"]
        assert asked == f"I think of a number from {low} to {high}. Which one is it?"
        while True:
            turns.append(f"Is it {(low + high) // 2}?")
            reply, reward, solved = played(task, index, turns)
            if solved:
                break
            guess = (low + high) // 2
            assert reply == f"No, it is {'larger' if game['number'] > guess else 'smaller'}."
            low, high = (guess + 1, high) if "larger" in reply else (low, guess - 1)
            turns.append(reply)
        assert reply is None and len(turns) // 2 + 1 <= 6
        assert reward == pytest.approx(1 + 0.05 * (len(turns) // 2))


def test_a_guess_that_the_replies_have_ruled_out_is_worth_nothing():
    task = GuessNumber("test", 1)
    low, high, number = (task[0][name] for name in ("low", "high", "number"))
    other = low if number != low else high
    assert played(task, 0, [str(other)])[1] == 0.05
    assert played(task, 0, [str(other), "...", str(other), "...", str(high + 1)])[1] == 0.05
    assert played(task, 0, ["no idea"]) == ("Say a number.", 0.0, False)
    assert played(task, 0, ["9" * 10_000])[2] is False


class Echo:
    """A class of a user's own: it repeats what is said, and rewards each turn."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {
            "messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "a"}],
            "secret": i,
        }

    def respond(self, conversation):
        return None if conversation["messages"][-1]["content"] == "stop" else conversation["messages"][-1]["content"]

    def evaluate(self, conversation, answer):
        return len(conversation["messages"]) == 4 and conversation["secret"] == 1 and answer == "stop"

    def reward(self, conversation, answer):
        assert answer == conversation["messages"][-1]["content"]
        return [len(m["content"]) for m in conversation["messages"] if m["role"] == "assistant"]


def test_a_class_of_ones_own_gets_the_conversation_as_it_went_with_what_it_has_put_into_it():
    task = AdaptedTask(Echo())
    assert played(task, 1, ["ab"]) == ("ab", 2.0, False)
    assert played(task, 1, ["ab", "ab", "stop"]) == (None, 6.0, True)
    assert played(task, 0, ["ab", "ab", "stop"]) == (None, 6.0, False)
    eval_set = make_eval_set("echo", task, TOKENIZER)
    assert judge(eval_set, 1, "ab", "ab", "stop") and not judge(eval_set, 1, "stop")
    prompts = PromptStream(task, TOKENIZER, 0, 2)
    assert prompts.reward(1, "ab", "ab", "stop") == 6.0 and prompts.reply(1, ["ab"]) == "ab"


def test_a_task_that_does_not_respond_is_judged_by_its_reference_as_ever():
    task = make_task("arithmetic", size=2)
    assert replies(task, task.__getitem__) is None and as_played(task, task[0], ["x"]) == task[0]


@pytest.mark.parametrize("said", [5, b"bytes", ValueError("no words left")], ids=str)
def test_an_environment_that_fails_is_found_before_anything_is_generated(said):
    class Faulty(Echo):
        def respond(self, conversation):
            if isinstance(said, Exception):
                raise said
            return said

    sentence = "Faulty cannot respond to an answer to problem 0: .*(text or None, got|no words left)"
    with pytest.raises(ValueError, match=sentence):
        make_eval_set("echo", AdaptedTask(Faulty()), TOKENIZER)
    with pytest.raises(ValueError, match=sentence):
        PromptStream(AdaptedTask(Faulty()), TOKENIZER, 0, 2)


def test_a_reward_that_holds_something_else_than_numbers_is_refused():
    for bad in (["1"], [None], "5", [[1.0]]):
        with pytest.raises(TypeError, match="must be a number"):
            total(bad)
    assert total([1, True, 0.5]) == 2.5 and total([]) == 0
