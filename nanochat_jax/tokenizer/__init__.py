"""Text to token ids and back: the tokenizer, how a conversation becomes ids and a loss mask, and training a new one."""

from nanochat_jax.tokenizer.bpe import MAX_TOKENS, SEPARATOR, SPECIAL_TOKENS, Tokenizer, UnsplittableText
from nanochat_jax.tokenizer.conversation import BadConversation, split_conversation
from nanochat_jax.tokenizer.training import train_tokenizer

__all__ = [
    "MAX_TOKENS",
    "SEPARATOR",
    "SPECIAL_TOKENS",
    "BadConversation",
    "Tokenizer",
    "UnsplittableText",
    "split_conversation",
    "train_tokenizer",
]
