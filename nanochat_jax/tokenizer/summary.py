"""How long a task's conversations are in tokens, and how much of them is trained."""

import itertools
from collections.abc import Callable

import numpy as np

from nanochat_jax.tasks import Task
from nanochat_jax.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from nanochat_jax.tokenizer.conversation import BadConversation, split_conversation

MOST = 100_000  # conversations that are read: more would take minutes
BATCH = 1000


def summarize(
    task: Task, tokenizer: Tokenizer, limit: int | None, place: Callable[[int], str], most: int = MOST
) -> list[str]:
    """Sentences on the first `most` conversations, of which at least one is there.

    limit: tokens after which a conversation is cut, None for never. ValueError: one cannot be rendered, with its place.
    """
    lengths, trained, special = [], 0, 0
    for numbers in itertools.batched(range(min(len(task), most)), BATCH):
        conversations = [task[i] for i in numbers]
        for i, conversation in zip(numbers, conversations):
            try:
                texts = [segment.text for segment in split_conversation(conversation) if not segment.special]
            except BadConversation as e:
                raise ValueError(f"{place(i)}: {e}") from e
            special += sum(any(token in text for token in SPECIAL_TOKENS) for text in texts)
        for ids, mask in tokenizer.render_many(conversations, max_tokens=None):
            lengths.append(len(ids))
            trained += int(mask[:limit].sum())
    median, most_of, longest = (f"{np.quantile(lengths, q, method='inverted_cdf'):,}" for q in (0.5, 0.9, 1))
    which = f"all {len(lengths):,}" if len(lengths) == len(task) else f"the first {len(lengths):,} of {len(task):,}"
    said = [f"{which} conversations: {median} tokens in the median, 90 % have at most {most_of}, the longest {longest}"]
    cut = np.minimum(lengths, limit or max(lengths))
    if limit:
        said.append(f"{int((np.array(lengths) > limit).sum()):,} of them are longer than {limit:,} tokens and are cut")
    kept = int(cut.sum())
    said.append(f"{trained:,} of {kept:,} tokens are trained ({100 * trained / kept:.1f} %)")
    if special:
        hold = "text holds" if special == 1 else "texts hold"
        said.append(f"{special:,} {hold} the name of a special token, such as {SPECIAL_TOKENS[0]}, which is plain text")
    return said
