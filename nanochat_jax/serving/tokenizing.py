"""Text to ids and back over HTTP, in vLLM's form, which lm-evaluation-harness uses where a server has it."""

from nanochat_jax.serving.requests import Body, RequestError
from nanochat_jax.tokenizer import Tokenizer


def tokenizer_info(tokenizer: Tokenizer) -> dict:
    """Answers GET /tokenizer_info. A text begins with bos, and the next one's bos ends it."""
    return {"vocab_size": tokenizer.vocab_size, "bos_token": "<|bos|>", "eos_token": "<|bos|>"}


def tokenize(tokenizer: Tokenizer, body: Body) -> dict:
    """Answers POST /tokenize: {"prompt": text, "add_special_tokens": whether bos comes first, true by default}.

    A prompt that is a special token's name and nothing else is that token: so the harness learns its id."""
    text, with_bos = body.get("prompt"), body.get("add_special_tokens", True)
    if not isinstance(text, str):
        raise RequestError("prompt must be a text", param="prompt")
    try:
        ids = [tokenizer.special_tokens[text]] if text in tokenizer.special_tokens else tokenizer.encode(text)
    except ValueError as e:
        raise RequestError(str(e), param="prompt") from None
    ids = [tokenizer.bos, *ids] if with_bos else ids
    return {"tokens": ids, "count": len(ids)}


def detokenize(tokenizer: Tokenizer, body: Body) -> dict:
    """Answers POST /detokenize: {"tokens": ids}."""
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
        raise RequestError(f"tokens must be a list of ids from 0 to {tokenizer.vocab_size - 1}", param="tokens")
    return {"prompt": tokenizer.decode(ids)}
