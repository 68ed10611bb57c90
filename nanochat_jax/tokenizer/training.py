"""A new tokenizer from texts: byte pair encoding with nanochat's split pattern and special tokens."""

from collections.abc import Iterable

import rustbpe

from nanochat_jax.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, run_splitter, without_surrogates

# GPT-4's pattern, but with numbers cut after two digits instead of three, as nanochat's vocabularies are small.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # a token for each byte, and the special ones


def check_vocab_size(vocab_size: int) -> None:
    """ValueError where not even the single bytes and the special tokens fit, or ids would need more than 31 bits."""
    if not SMALLEST_VOCABULARY <= vocab_size < 1 << 31:
        raise ValueError(
            f"a vocabulary has at least {SMALLEST_VOCABULARY} tokens (256 bytes, {len(SPECIAL_TOKENS)} special ones) "
            f"and less than {1 << 31}, got {vocab_size}: set --vocab-size"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, special ones included; equal texts in any order give an equal one.

    The texts are read once and split independently, so no token reaches over a border between two. A special token
    that is written in a text is ordinary characters. ValueError: too small a vocabulary, or too little text for it.
    """
    check_vocab_size(vocab_size)
    trainer = rustbpe.Tokenizer()
    clean = (without_surrogates(text) for text in texts)
    n_ranks = vocab_size - len(SPECIAL_TOKENS)
    # errors=(): a ValueError is one of reading the texts, and says more
    run_splitter(lambda: trainer.train_from_iterator(clean, n_ranks, pattern=SPLIT_PATTERN), errors=())
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if (reached := len(ranks) + len(SPECIAL_TOKENS)) < vocab_size:
        raise ValueError(
            f"the text has pairs to merge for a vocabulary of {reached} tokens only, not for {vocab_size}: give more "
            "text, or lower --vocab-size"
        )
    return Tokenizer("rustbpe", SPLIT_PATTERN, ranks, {s: len(ranks) + i for i, s in enumerate(SPECIAL_TOKENS)})
