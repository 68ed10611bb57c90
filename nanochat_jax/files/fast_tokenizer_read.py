"""Read tokenizer.json of the tokenizers library ("fast" tokenizers of transformers), where it splits and merges exactly
as tiktoken does."""

import json

from nanochat_jax.files.plain_pickle import Refused, short

# The printable characters that stand for the 256 bytes: a byte that prints is itself, the others follow from U+0100 on.
_PRINTING = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
BYTE_OF = {chr(byte): byte for byte in _PRINTING} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

LONGEST = 1024  # bytes of a token
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
PLAIN_BPE = {  # fields of the model with the one value that tiktoken's merging has, and the library's default
    "type": ("BPE", "BPE"),
    "dropout": (None, None),
    "unk_token": (None, None),
    "continuing_subword_prefix": (None, None),
    "end_of_word_suffix": (None, None),
    "byte_fallback": (False, False),
    "ignore_merges": (True, False),  # a piece that is a token is taken whole
}


def is_fast_tokenizer(content: object) -> bool:
    """Whether what a JSON file holds is a tokenizer of that library."""
    return isinstance(content, dict) and isinstance(content.get("model"), dict) and "pre_tokenizer" in content


def fast_tokenizer_fields(content: dict, name: str) -> dict:
    """name, pat_str, mergeable_ranks (bytes -> id) and special_tokens (text -> id), as `tiktoken` takes them.

    Refused: it would give other ids than tiktoken does with these."""
    model = content["model"]
    for field, (value, default) in PLAIN_BPE.items():
        if (found := model.get(field, default)) != value and (field, found) != ("dropout", 0):
            raise Refused(f"its model's {field} must be {json.dumps(value)}, got {short(found)}")
    if content.get("normalizer") is not None:
        raise Refused(f"it must have no normalizer, got {short(content['normalizer'])}")
    added = content.get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise Refused("its added_tokens must be a list of objects")
    special = {str(token.get("content")): token.get("id") for token in added}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise Refused(f"its vocab must be an object, got {short(vocab)}")
    ranks = {_bytes_of(token): i for token, i in vocab.items() if token not in special}
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int for i in ids) or len(set(ids)) != len(vocab.keys() | special.keys()):
        raise Refused("every token of it must have an integer of its own as its id")
    _check_merges(model.get("merges"), ranks)
    return {"name": name, "pat_str": _pattern(content), "mergeable_ranks": ranks, "special_tokens": special}


def _pattern(content: dict) -> str:
    """The regular expression that cuts a text into pieces, before each becomes bytes."""
    steps = content["pre_tokenizer"]
    steps = steps.get("pretokenizers") if isinstance(steps, dict) else None
    if not isinstance(steps, list) or len(steps) != 2 or not all(isinstance(step, dict) for step in steps):
        raise Refused("its pre_tokenizer must be a sequence of Split and ByteLevel")
    split, level = steps
    pattern = split.get("pattern")
    pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
    if (split.get("type"), split.get("behavior"), split.get("invert")) != ("Split", "Isolated", False):
        raise Refused("its pre_tokenizer must begin with a Split that isolates what a pattern matches")
    if not isinstance(pattern, str):
        raise Refused("the Split of its pre_tokenizer must have a regular expression")
    if any(level.get(field) != value for field, value in BYTE_LEVEL.items()):
        raise Refused(f"its pre_tokenizer must end with {json.dumps(BYTE_LEVEL)}")
    return pattern


def _bytes_of(token: str) -> bytes:
    if not 1 <= len(token) <= LONGEST or not BYTE_OF.keys() >= set(token):
        raise Refused(f"its tokens must be 1 to {LONGEST:,} bytes as characters, got {short(token)}")
    return bytes(BYTE_OF[character] for character in token)


def _check_merges(merges: object, ranks: dict[bytes, int]) -> None:
    """Refused where merging by this list differs from tiktoken's, which merges any two tokens that make a third, the
    one of the lowest id first."""
    if not isinstance(merges, list):
        raise Refused(f"its merges must be a list, got {short(merges)}")
    pairs, last = set(), -1
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge  # the library's older form: "a b"
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise Refused(f"each of its merges must be two tokens, got {short(merge)}")
        pair = _bytes_of(parts[0]), _bytes_of(parts[1])
        rank = ranks.get(pair[0] + pair[1], -1)
        if rank < last or rank < 0 or pair[0] not in ranks or pair[1] not in ranks:
            raise Refused(f"its merges must be tokens in the order of what they become, got {short(str(merge))}")
        pairs.add(pair)
        last = rank
    for token in ranks:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in ranks and pair[1] in ranks and pair not in pairs:
                raise Refused(
                    f"its merges lack {short(pair[0])} + {short(pair[1])}, so it may give other ids than tiktoken: "
                    "put the run's tokenizer.pkl beside, and this file away"
                )
