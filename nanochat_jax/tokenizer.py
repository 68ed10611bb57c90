"""Text to token ids and back, and the one place where a conversation becomes ids and a loss mask.

A conversation is rendered as: bos, then per message user_start text user_end, or assistant_start parts assistant_end.
The mask is 1 for what the assistant writes itself (text, python_start code python_end, assistant_end), and 0 for
everything it is given (bos, the user's side, assistant_start, and output_start result output_end).

`split_conversation` makes that decision once, as a list of segments; `render_conversation` (one, as lists) and
`render_many` (a batch, as NumPy arrays, for the token cache) only turn segments into ids.
"""

import base64
import hashlib
import json
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from nanochat_jax.common import write_atomically

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FORMAT = "nanochat_jax tokenizer 1"  # of tokenizer.json
RENDERING = 1  # raise it when a conversation is rendered to other ids than before: token caches depend on it
MAX_TOKENS = 2048  # nanochat renders with this limit whatever the model's sequence length is

# Between the texts of one bulk call. It is known to one private encoding only, and no proper prefix of it is also a
# suffix, so its occurrences never overlap: counting them tells whether a text contains it.
SEPARATOR = "\0nanochat_jax\1"
CHUNK_CHARS = 1 << 17  # text of one bulk call; enough of them to keep every core busy on a small batch too


class BadConversation(ValueError):
    """This conversation cannot be rendered; the message is one sentence that says why."""


class UnsplittableText(BadConversation):
    """tiktoken gives up on this text."""


class Tokenizer:
    """A byte pair encoding with nanochat's nine special tokens. Ids are 0..vocab_size-1, the specials come last.

    mergeable_ranks: bytes -> id, ids 0..n-1 in merge order, all 256 single bytes among them;
    special_tokens: exactly SPECIAL_TOKENS -> ids n..n+8, in any order. ValueError says what is wrong with them.
    """

    def __init__(self, name: str, pattern: str, mergeable_ranks: dict[bytes, int], special_tokens: dict[str, int]):
        _check_vocabulary(mergeable_ranks, special_tokens)
        self.name = name
        self.pattern = pattern
        self.mergeable_ranks = dict(mergeable_ranks)
        self.special_tokens = dict(special_tokens)
        self.vocab_size = len(mergeable_ranks) + len(special_tokens)
        by_id = {i: token for token, i in mergeable_ranks.items()} | {i: s.encode() for s, i in special_tokens.items()}
        self._bytes = [by_id[i] for i in range(self.vocab_size)]

        def encoding(special):
            try:
                return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=mergeable_ranks, special_tokens=special)
            except ValueError as e:
                raise ValueError(f"the tokenizer's split pattern is not usable: {e}") from e

        self._plain = encoding({})  # it knows no special token, so text can never become one
        self._bulk = encoding({SEPARATOR: self.vocab_size})
        self.bos = self.special("<|bos|>")

    # ------------------------------------------------------------------------------------------------------- files
    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """From FOLDER/tokenizer.json (ours) or FOLDER/tokenizer.pkl (nanochat's; nothing in it is executed).

        FileNotFoundError: neither exists. ValueError: damaged, or both exist and give different ids.
        """
        folder = Path(folder)
        ours, theirs = folder / "tokenizer.json", folder / "tokenizer.pkl"
        found = []
        if ours.exists():
            found.append(cls._from_json(ours))
        if theirs.exists():
            from nanochat_jax.safe_pickle import read_tokenizer_pickle

            state = read_tokenizer_pickle(theirs)
            found.append(
                _naming(theirs, cls, state["name"], state["pat_str"], state["mergeable_ranks"], state["special_tokens"])
            )
        if not found:
            raise FileNotFoundError(
                f"no tokenizer.json or tokenizer.pkl in {folder}: copy the tokenizer folder of the nanochat run there, "
                "or set NANOCHAT_BASE_DIR to the run's base directory"
            )
        if found[0].digest() != found[-1].digest():
            raise ValueError(f"{ours} and {theirs} hold different tokenizers: remove the one that is not the model's")
        return found[0]

    @classmethod
    def _from_json(cls, path: Path) -> "Tokenizer":
        def read():
            data = json.loads(path.read_bytes())
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f'"format" must be "{FORMAT}"')
            for key, kind in {"name": str, "pattern": str, "ranks": list, "special_tokens": dict}.items():
                if not isinstance(data.get(key), kind):
                    raise ValueError(f'"{key}" must be a {kind.__name__}')
            if not all(isinstance(text, str) for text in data["ranks"]):
                raise ValueError('"ranks" must hold base64 strings')
            tokens = [base64.b64decode(text, validate=True) for text in data["ranks"]]
            if len(set(tokens)) < len(tokens):
                raise ValueError('"ranks" holds the same token twice')
            ranks = {token: i for i, token in enumerate(tokens)}
            return cls(data["name"], data["pattern"], ranks, data["special_tokens"])

        return _naming(path, read)

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/tokenizer.json; a reader sees the old file or the new one, never a part."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "ranks": [base64.b64encode(token).decode() for token in self._bytes[: len(self.mergeable_ranks)]],
            "special_tokens": self.special_tokens,
        }
        write_atomically(Path(folder) / "tokenizer.json", json.dumps(data, indent=0).encode())

    def digest(self) -> str:
        """sha256 (hex) over everything that decides ids: pattern, tokens in id order, specials. The name does not."""
        ranks = [token.hex() for token in self._bytes[: len(self.mergeable_ranks)]]
        what = [self.pattern, ranks, sorted(self.special_tokens.items())]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    # -------------------------------------------------------------------------------------------------------- text
    def special(self, token: str) -> int:
        """The id of a special token, written as in the vocabulary: special("<|user_start|>")."""
        if token not in self.special_tokens:
            raise ValueError(f"{token!r} is not a special token; there are {', '.join(SPECIAL_TOKENS)}")
        return self.special_tokens[token]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special token: a typed <|bos|> is seven ordinary characters.

        Surrogates, which UTF-8 cannot hold, are no error: a pair becomes its character, a lone one U+FFFD.
        UnsplittableText (a ValueError): tiktoken gives up, as on a million white space characters in a row.
        """
        if not isinstance(text, str):
            raise TypeError(f"only text can be encoded, got {type(text).__name__}")
        return _guarded(lambda: self._plain.encode_ordinary(text))

    def decode_bytes(self, ids) -> bytes:
        """The bytes of `ids`; specials as they are written in the vocabulary. ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {min(ids)}..{max(ids)}")
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: how many bytes each token stands for, 0 for specials (bits per byte counts with it)."""
        lengths = np.array([len(token) for token in self._bytes], np.int32)
        lengths[len(self.mergeable_ranks) :] = 0
        return lengths

    # ------------------------------------------------------------------------------------------------ conversations
    def render_conversation(self, conversation: dict, max_tokens: int | None = MAX_TOKENS):
        """-> (ids, mask), two lists of ints of equal length, cut at max_tokens (None: never cut).

        The input is not changed. BadConversation (a ValueError) says why a conversation cannot be rendered.
        """
        ids, mask = [], []
        for piece, learned in split_conversation(conversation):
            new = self.encode(piece) if learned < SPECIAL else [self.special_tokens[piece]]
            ids += new
            mask += [learned & 1] * len(new)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """The prompt for the last message, which must be the assistant's and is not looked at further.

        The rest is rendered and cut at 2048, then assistant_start is appended: up to 2049 ids.
        """
        messages = _messages(conversation)
        if _role(messages[-1]) != "assistant":
            raise BadConversation("the last message must be the assistant's, it is what is to be completed")
        if len(messages) < 2:
            raise BadConversation("there is no message before the one to be completed")
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return [*ids, self.special_tokens["<|assistant_start|>"]]

    def render_many(self, conversations, max_tokens: int | None = MAX_TOKENS) -> list[tuple[np.ndarray, np.ndarray]]:
        """render_conversation of each, as (ids int32 [T], mask uint8 [T]), with every core at work.

        The arrays are views into one buffer for the whole call: copy what is to outlive the rest of the batch.
        BadConversation begins with the conversation's index in this batch.
        """
        conversations = list(conversations)
        flags, specials, segments_end = bytearray(), array("i"), []

        def texts():  # conversations are split while the threads encode the texts before
            for i, conversation in enumerate(conversations):
                try:
                    segments = split_conversation(conversation)
                except BadConversation as e:
                    raise BadConversation(f"conversation {i}: {e}") from e
                for piece, flag in segments:
                    flags.append(flag)
                    if flag < SPECIAL:
                        yield piece
                    else:
                        specials.append(self.special_tokens[piece])
                segments_end.append(len(flags))

        try:
            text_ids, text_lengths = self._encode_many(texts())
        except UnsplittableText as e:  # rare: render one by one to learn which
            for i, conversation in enumerate(conversations):
                try:
                    self.render_conversation(conversation)
                except BadConversation as one:
                    raise BadConversation(f"conversation {i}: {one}") from e
            raise
        if not conversations:
            return []

        flags = np.frombuffer(flags, np.uint8)
        is_text = flags < SPECIAL
        lengths = np.ones(len(flags), np.int64)
        lengths[is_text] = text_lengths
        from_text = np.repeat(is_text, lengths)
        ids = np.empty(len(from_text), np.int32)
        ids[from_text] = text_ids
        ids[~from_text] = specials
        mask = np.repeat(flags & 1, lengths)
        ends = np.cumsum(lengths)[np.array(segments_end) - 1].tolist()
        starts = [0, *ends[:-1]]
        cut = len(ids) if max_tokens is None else max_tokens
        return [(ids[a:b][:cut], mask[a:b][:cut]) for a, b in zip(starts, ends)]

    def _encode_many(self, texts) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids uint32 of all texts in a row, length int64 of each); `texts` is any iterable.

        tiktoken's own batch call costs a Python task and a list of Python ints per text, which for chat messages of 50
        bytes is most of the time. Here texts travel in chunks, joined by a token that only this encoding knows; between
        such tokens tiktoken splits and merges independently, so the ids are those of the single texts.
        """
        chunk, size, pending = [], 0, []
        with ThreadPoolExecutor(_cores()) as pool:  # it starts a thread only when a chunk is submitted
            for text in texts:
                chunk.append(text)
                size += len(text) + 1
                if size > CHUNK_CHARS:
                    pending.append(pool.submit(self._encode_chunk, chunk))
                    chunk, size = [], 0
            last = self._encode_chunk(chunk)
            done = [*(future.result() for future in pending), last]
        ids, lengths = zip(*done)
        return np.concatenate(ids), np.concatenate(lengths)

    def _encode_chunk(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = SEPARATOR.join(texts)
        if not texts or joined.count(SEPARATOR) != len(texts) - 1:  # nothing, or somebody wrote the separator
            lists = [self.encode(text) for text in texts]
            ids = np.array([i for one in lists for i in one], np.uint32)
            return ids, np.array([len(one) for one in lists], np.int64)
        try:
            joined.encode()
        except UnicodeEncodeError:
            joined = joined.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # as tiktoken does
        ids = _guarded(lambda: self._bulk.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=()))
        is_separator = ids == self.vocab_size
        borders = np.concatenate([[-1], np.flatnonzero(is_separator), [len(ids)]])
        return ids[~is_separator], np.diff(borders) - 1


SPECIAL = 2  # the flag of a segment is its mask, plus SPECIAL where the piece names a special token


def split_conversation(conversation: dict) -> list[tuple[str, int]]:
    """-> segments (piece, flag): flag is the mask of a text, or SPECIAL plus the mask of the special token `piece`."""
    messages = _messages(conversation)
    first, system = 0, ""
    if _role(messages[0]) == "system":
        if len(messages) < 2 or _role(messages[1]) != "user":
            raise BadConversation("a system message must be followed by a user message")
        first, system = 1, _text(messages[0], "the system message") + "\n\n"

    segments = [("<|bos|>", SPECIAL)]
    for i in range(first, len(messages)):
        message = messages[i]
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        role = _role(message)
        if role != expected:
            raise BadConversation(f"message {i} must be from {expected!r}, as roles alternate, got {role!r:.40}")
        if role == "user":
            text = _text(message, f"user message {i}")
            segments += [("<|user_start|>", SPECIAL), (system + text if i == first else text, 0)]
            segments.append(("<|user_end|>", SPECIAL))
        else:
            segments.append(("<|assistant_start|>", SPECIAL))
            content = message.get("content")
            if isinstance(content, str):
                segments.append((content, 1))
            elif isinstance(content, list):
                for k, part in enumerate(content):
                    segments += _split_part(part, f"part {k} of message {i}")
            else:
                raise BadConversation(
                    f"assistant message {i} must hold text or a list of parts, got {type(content).__name__}"
                )
            segments.append(("<|assistant_end|>", SPECIAL + 1))
    return segments


def _split_part(part, where: str) -> list[tuple[str, int]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "python", "python_output"):
        raise BadConversation(f"{where} must be of type text, python or python_output, got {kind!r:.40}")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadConversation(f'{where} must have a "text" that is a string, got {type(text).__name__}')
    if kind == "text":
        return [(text, 1)]
    if kind == "python":
        return [("<|python_start|>", SPECIAL + 1), (text, 1), ("<|python_end|>", SPECIAL + 1)]
    return [("<|output_start|>", SPECIAL), (text, 0), ("<|output_end|>", SPECIAL)]


def _messages(conversation) -> list:
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list | tuple):
        raise BadConversation('a conversation must be a dict with a list of "messages"')
    if not messages:
        raise BadConversation("the conversation has no messages")
    return list(messages)


def _role(message):
    if not isinstance(message, dict):
        raise BadConversation(f"a message must be a dict with role and content, got {type(message).__name__}")
    return message.get("role")


def _text(message: dict, where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise BadConversation(f"the content of {where} must be a string, got {type(content).__name__}")
    return content


def _check_vocabulary(ranks, special) -> None:
    if missing := [s for s in SPECIAL_TOKENS if s not in special]:
        raise ValueError(f"the tokenizer lacks the special tokens {', '.join(missing)}")
    if unknown := sorted(str(s) for s in set(special) - set(SPECIAL_TOKENS)):
        raise ValueError(f"the tokenizer has special tokens that nanochat does not know: {', '.join(unknown)[:200]}")
    if not all(type(token) is bytes and token for token in ranks):
        raise ValueError("every mergeable token must be non-empty bytes")
    for what, ids, first in (("mergeable", ranks.values(), 0), ("special", special.values(), len(ranks))):
        if not all(type(i) is int for i in ids) or sorted(ids) != list(range(first, first + len(ids))):
            raise ValueError(f"ids of {what} tokens must be {first}..{first + len(ids) - 1}, each once")
    if missing := [i for i in range(256) if bytes([i]) not in ranks]:
        raise ValueError(f"the tokenizer has no token for {len(missing)} of the 256 bytes, the first is {missing[0]}")


def _naming(path: Path, make, *args):
    """make(*args); its ValueError names the file."""
    try:
        return make(*args)
    except (ValueError, RecursionError) as e:  # json and base64 raise subclasses of ValueError
        raise ValueError(f"{path} is not a usable tokenizer: {e}") from e


def _guarded(encode):
    """encode(); tiktoken's regex engine panics, outside Exception, on a very long run of white space."""
    try:
        return encode()
    except BaseException as e:
        if isinstance(e, ValueError) or type(e).__name__ == "PanicException":
            raise UnsplittableText(f"tiktoken cannot split a text (too long a run of white space?): {e!s:.80}") from e
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
