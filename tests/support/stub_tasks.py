"""Tasks of made-up conversations, and tokenizers of bytes for them: what a token cache is built from."""

import hashlib
import json

import numpy as np

BOS, END = 256, 257


class StubTask(list):
    """Conversations are (user text, assistant text)."""

    name = "stub/task"

    def fingerprint(self):
        return hashlib.sha256(json.dumps(list(self)).encode()).hexdigest()


class StubTokenizer:
    """Bytes; bos, the user's (mask 0), the assistant's and an end token (mask 1)."""

    bos, vocab_size, RENDERING = BOS, 300, 1

    def digest(self):
        return "stub"

    def render_conversation(self, conversation, max_tokens=2048):
        user, assistant = conversation
        if not user:
            raise ValueError("no user message")
        ids = [BOS, *user.encode(), *assistant.encode(), END]
        mask = [0] * (1 + len(user.encode())) + [1] * (len(assistant.encode()) + 1)
        return ids[:max_tokens], mask[:max_tokens]

    def render_many(self, conversations, max_tokens=2048):
        return [self.render_conversation(conversation, max_tokens) for conversation in conversations]


class SilentTokenizer(StubTokenizer):
    """Trains on nothing."""

    def digest(self):
        return "silent"

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = super().render_conversation(conversation, max_tokens)
        return ids, [0] * len(mask)


def make_task(n, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    return StubTask(
        ["q" * rng.integers(1, longest), "".join(chr(c) for c in rng.integers(97, 122, rng.integers(1, longest)))]
        for _ in range(n)
    )
