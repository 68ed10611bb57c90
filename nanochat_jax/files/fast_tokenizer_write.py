"""Write tokenizer.json of the tokenizers library ("fast" tokenizers of transformers), which splits and merges exactly
as tiktoken does; see `files/fast_tokenizer_read.py`."""

from collections.abc import Mapping

from nanochat_jax.files.fast_tokenizer_read import BYTE_LEVEL, BYTE_OF, PLAIN_BPE

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def fast_tokenizer(pattern: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> dict:
    """What its tokenizer.json holds, of an encoding as tiktoken has it: a pattern that cuts a text into pieces, bytes
    of a token -> id, text of a special token -> id. A special token's text inside a text is that token there."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {**BYTE_LEVEL, "trim_offsets": False}
    by_id = sorted(ranks.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            **{field: value for field, (value, _) in PLAIN_BPE.items()},
            "fuse_unk": False,
            "vocab": {_letters(token): i for token, i in by_id},
            "merges": [[_letters(a), _letters(b)] for token, _ in by_id for a, b in _pairs(token, ranks)],
        },
    }


def _letters(token: bytes) -> str:
    return "".join(map(CHARACTER_OF.__getitem__, token))


def _pairs(token: bytes, ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that make this one: tiktoken merges any of them."""
    cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
    return sorted((pair for pair in cuts if pair[0] in ranks and pair[1] in ranks), key=lambda pair: ranks[pair[0]])
