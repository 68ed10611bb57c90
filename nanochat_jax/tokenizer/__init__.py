"""Text to token ids and back: the tokenizer, how a conversation becomes ids and a loss mask, and training a new one."""

from nanochat_jax.tokenizer.bpe import MAX_TOKENS as MAX_TOKENS
from nanochat_jax.tokenizer.bpe import SEPARATOR as SEPARATOR
from nanochat_jax.tokenizer.bpe import SPECIAL_TOKENS as SPECIAL_TOKENS
from nanochat_jax.tokenizer.bpe import Tokenizer as Tokenizer
from nanochat_jax.tokenizer.bpe import UnsplittableText as UnsplittableText
from nanochat_jax.tokenizer.conversation import BadConversation as BadConversation
from nanochat_jax.tokenizer.conversation import split_conversation as split_conversation
from nanochat_jax.tokenizer.training import train_tokenizer as train_tokenizer
