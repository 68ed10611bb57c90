"""A model as it is talked with from Python: its answers, and how likely others would be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.checkpoints.find import load_chat_model, load_model
from nanochat_jax.inference.sampling import SamplingParams
from tests.support import tiny

TOKENIZER = tiny.tokenizer()
DRAWN = SamplingParams(temperature=1.0, top_k=0, max_new_tokens=20)


@pytest.fixture(scope="module")
def base(base):
    (base / "base_checkpoints").rename(base / "chatsft_checkpoints")
    return base


@pytest.fixture(scope="module")
def chat(base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return load_chat_model("sft")


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_an_answer_that_comes_in_pieces_is_the_whole_one(chat):
    for seed in range(4):
        pieces = list(chat.stream("hello", DRAWN, seed=seed))
        assert len(pieces) > 1 or len("".join(pieces)) <= 1
        assert "".join(pieces) == chat.answer("hello", DRAWN, seed=seed)
    assert len({chat.answer("hello", DRAWN, seed=seed) for seed in range(4)}) > 1


def test_a_question_is_a_text_or_a_chat_so_far(chat):
    assert chat.prompt("hello") == chat.prompt([user("hello")])
    messages = [user("hello"), assistant("good day"), user("again")]
    assert chat.prompt(messages) == TOKENIZER.render_for_completion({"messages": [*messages, assistant("")]})
    assert isinstance(chat.answer(messages, SamplingParams(0.0, 0, 4)), str)
    assert len(messages) == 3  # it is left as it was


@pytest.mark.parametrize("answer", ["so", "a longer one, of more tokens", ""])
def test_log_probabilities_are_those_of_the_network(base, in_base, chat, answer):
    found = chat.log_probabilities("hello", answer)
    assert [token for token, _ in found] == [*answer, "<|assistant_end|>"]
    model, tokenizer, _ = load_model("sft")
    ids, _ = tokenizer.render_conversation({"messages": [user("hello"), assistant(answer)]})
    logp = jax.nn.log_softmax(model(jnp.array([ids])))[0]
    expected = [logp[i - 1, ids[i]] for i in range(len(ids) - len(found), len(ids))]
    np.testing.assert_allclose([logprob for _, logprob in found], expected, atol=1e-5)


def test_what_the_model_does_not_write_itself_has_no_log_probability(chat):
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "so"}]
    tokens = [token for token, _ in chat.log_probabilities("add", parts)]
    assert tokens == ["<|python_start|>", *"1+1", "<|python_end|>", *"so", "<|assistant_end|>"]


def test_what_does_not_fit_or_is_no_question_is_refused_with_a_sentence(chat):
    context = chat.engine.context
    with pytest.raises(ValueError, match=f"must have between 1 and {context - 1} tokens"):
        chat.answer("a" * context)
    with pytest.raises(ValueError, match=f"question and answer must have at most {context} tokens together"):
        chat.log_probabilities("a" * (context - 6), "bb")
    assert len(chat.log_probabilities("a" * (context - 6), "b")) == 2
    with pytest.raises(ValueError, match="must be from 'user', as roles alternate"):
        chat.answer([user("a"), assistant("b")])


def test_a_model_of_another_tokenizer_is_refused(base, in_base, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "chatsft_checkpoints").symlink_to(base / "chatsft_checkpoints")
    specials = {token: 300 + i for i, token in enumerate(TOKENIZER.special_tokens)}
    ranks = TOKENIZER.mergeable_ranks | {b"a" + bytes([i]): 256 + i for i in range(44)}
    type(TOKENIZER)("other", r"\w+|\W", ranks, specials).save(folder / "tokenizer")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        load_chat_model("sft")
