"""A model to talk with from Python: its answers, whole or as they come, and how likely an answer would be."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanochat_jax.inference.engine import Engine, text_pieces
from nanochat_jax.inference.samples import answer_text
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.inference.scoring import Scorer
from nanochat_jax.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0)


class TokenLogprob(NamedTuple):
    """A token of an answer, and its log-probability in nats after all that stands before it."""

    token: str
    logprob: float


class ChatModel:
    """An engine with its parameters. `load_chat_model` in checkpoints/find.py makes one.

    A question is a text, or the messages of a chat so far, {"role": "user" or "assistant", "content": text}, of which
    the last is the user's. A new length of it compiles anew now and then, which takes seconds.
    """

    def __init__(self, engine: Engine, params: Any):
        """params: the engine's `cast_params`."""
        self.engine, self.params, self._score = engine, params, Scorer(engine)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.engine.tokenizer

    def prompt(self, question: str | Sequence[dict]) -> list[int]:
        """The token ids after which the model is to answer. ValueError: the messages are no chat."""
        ids, _ = self._render(question, "")
        return ids[:-1]  # without assistant_end

    def answer(self, question: str | Sequence[dict], sampling: SamplingParams = GREEDY, *, seed: int = 0) -> str:
        """The answer: by default the likeliest token each time, at most 256 of them. Calls of tools stand in it with
        their results and the special tokens around both. ValueError: the question does not fit into the context."""
        ((sample,),) = self.engine.generate(self.params, [self.prompt(question)], sampling, seed=seed)
        return answer_text(self.tokenizer, sample)

    def stream(
        self, question: str | Sequence[dict], sampling: SamplingParams = GREEDY, *, seed: int = 0
    ) -> Iterator[str]:
        """The same answer in pieces, as they come."""
        pairs = self.engine.stream(self.params, self.prompt(question), sampling, seed=seed)
        ends = self.engine.control_tokens.ends
        return text_pieces(self.tokenizer, (token for token, sampled in pairs if not (sampled and token in ends)))

    def log_probabilities(self, question: str | Sequence[dict], answer: str | Sequence[dict]) -> list[TokenLogprob]:
        """How likely the model would give this answer: each token of it that it writes itself, the end of the turn
        included. Their sum is log p(answer | question), at temperature 1 and without top-k.

        answer: a text, or parts as in training, {"type": "text", "python" or "python_output", "text": ...}."""
        ids, mask = self._render(question, answer)
        start, context = len(self.prompt(question)), self.engine.context
        if len(ids) > context:
            raise ValueError(f"question and answer must have at most {context:,} tokens together, got {len(ids):,}")
        logprobs = self._score(self.params, ids).logprobs  # of ids[1:]
        own = [i for i in range(start, len(ids)) if mask[i]]
        return [TokenLogprob(self.tokenizer.decode([ids[i]]), float(logprobs[i - 1])) for i in own]

    def _render(self, question: str | Sequence[dict], answer: str | Sequence[dict]) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else [*question]
        messages.append({"role": "assistant", "content": answer if isinstance(answer, str) else [*answer]})
        return self.tokenizer.render_conversation({"messages": messages}, max_tokens=None)
