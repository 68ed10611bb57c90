"""Byte pair encoding with nanochat's special tokens: texts and conversations to ids, and back.

`split_conversation` decides once what a conversation's segments and their masks are; `render_conversation` (one, as
lists) and `render_many` (a batch, as NumPy arrays, for the token cache) only turn segments into ids.
"""

import base64
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from nanochat_jax.files import bucket
from nanochat_jax.files.digest import digest_of
from nanochat_jax.files.fast_tokenizer_read import fast_tokenizer_fields, is_fast_tokenizer
from nanochat_jax.files.fast_tokenizer_write import fast_tokenizer
from nanochat_jax.files.paths import BUNDLED, write_atomically
from nanochat_jax.files.tiktoken_read import read_tokenizer_pickle
from nanochat_jax.files.torch_write import write_pt
from nanochat_jax.tokenizer.conversation import BadConversation, messages_of, split_conversation

SPECIAL_TOKENS = (
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
CHAT_TEMPLATE = "chat_template.jinja"
FORMAT = "nanochat_jax tokenizer 1"  # of tokenizer.json
MAX_TOKENS = 2048  # nanochat renders with this limit whatever the model's sequence length is

# Between the texts of a chunk. One private encoding takes it for a token, text never contains it unless somebody writes
# it on purpose, and no proper prefix of it is also a suffix, so that counting finds every occurrence.
SEPARATOR = "\0nanochat_jax\1"
CHUNK_CHARS = 1 << 17  # characters that a thread encodes in one call; few, so that a small batch keeps all cores busy


class UnsplittableText(BadConversation):
    """The split pattern's engine gives up on this text."""


class Tokenizer:
    """A byte pair encoding with nanochat's nine special tokens. Ids are 0..vocab_size-1, the specials come last.

    mergeable_ranks: bytes -> id, ids 0..n-1 in merge order, all 256 single bytes among them;
    special_tokens: exactly SPECIAL_TOKENS -> ids n..n+8, in any order. ValueError says what is wrong with them.
    """

    RENDERING = 1  # raise it when a conversation is rendered to other ids than before: token caches depend on it

    def __init__(self, name: str, pattern: str, mergeable_ranks: dict[bytes, int], special_tokens: dict[str, int]):
        _check_vocabulary(mergeable_ranks, special_tokens)
        self.name, self.pattern = name, pattern
        self.mergeable_ranks, self.special_tokens = dict(mergeable_ranks), dict(special_tokens)
        self.vocab_size = len(mergeable_ranks) + len(special_tokens)
        by_id = {i: token for token, i in mergeable_ranks.items()} | {i: s.encode() for s, i in special_tokens.items()}
        self._bytes = [by_id[i] for i in range(self.vocab_size)]
        try:
            self._plain = self._encoding({})  # it knows no special token, so text can never become one
            self._bulk = self._encoding({SEPARATOR: self.vocab_size})
        except ValueError as e:
            raise ValueError(f"the tokenizer's split pattern is not usable: {e}") from e
        self.bos = self.special("<|bos|>")

    def _encoding(self, special_tokens: dict[str, int]) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.mergeable_ranks, special_tokens=special_tokens
        )

    # ------------------------------------------------------------------------------------------------------- files
    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """From FOLDER/tokenizer.json (ours, or of transformers) or FOLDER/tokenizer.pkl (nanochat's; nothing in it is
        executed).

        FileNotFoundError: neither exists. ValueError: damaged, or both exist and give different ids.
        """
        folder = bucket.fetch(bucket.as_path(folder))
        ours, theirs = folder / "tokenizer.json", folder / "tokenizer.pkl"
        found = []
        if ours.exists():
            found.append(_naming(ours, lambda: cls._from_json(ours.read_bytes())))
        if theirs.exists():
            read = read_tokenizer_pickle(theirs)
            found.append(_naming(theirs, lambda: cls(*read.values())))
        if not found:
            raise FileNotFoundError(
                f"no tokenizer.json or tokenizer.pkl in {folder}: copy the tokenizer folder of the nanochat run there, "
                "set NANOCHAT_BASE_DIR to the run's base directory, or, before there is any model, train one with "
                "python -m nanochat_jax.tokenizer train"
            )
        if found[0].digest() != found[-1].digest():
            raise ValueError(f"{ours} and {theirs} hold different tokenizers: remove the one that is not the model's")
        return found[0]

    @classmethod
    def _from_json(cls, content: bytes) -> "Tokenizer":
        data = json.loads(content)
        if is_fast_tokenizer(data):
            return cls(*fast_tokenizer_fields(data, "from transformers").values())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'"format" must be "{FORMAT}"')
        for key, kind in {"name": str, "pattern": str, "ranks": list, "special_tokens": dict}.items():
            if not isinstance(data.get(key), kind):
                raise ValueError(f'"{key}" must be a {kind.__name__}')
        if not all(isinstance(text, str) for text in data["ranks"]):
            raise ValueError('"ranks" must hold base64 strings')
        ranks = {base64.b64decode(text, validate=True): i for i, text in enumerate(data["ranks"])}
        if len(ranks) < len(data["ranks"]):
            raise ValueError('"ranks" holds the same token twice')
        return cls(data["name"], data["pattern"], ranks, data["special_tokens"])

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/tokenizer.json; a reader sees the old file or the new one, never a part."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "ranks": [base64.b64encode(token).decode() for token in self._bytes[: len(self.mergeable_ranks)]],
            "special_tokens": self.special_tokens,
        }
        write_atomically(bucket.as_path(folder) / "tokenizer.json", json.dumps(data, indent=0).encode())

    def save_for_nanochat(self, folder: Path | str) -> None:
        """Write tokenizer.pkl and token_bytes.pt, which nanochat loads, into a folder that nobody reads yet.

        `save` does not, as a folder that came from nanochat holds files of its own."""
        encoding = self._encoding(self.special_tokens)
        write_atomically(Path(folder) / "tokenizer.pkl", pickle.dumps(encoding, protocol=4))
        write_pt(Path(folder) / "token_bytes.pt", self.token_bytes())

    def save_for_transformers(self, folder: Path, context: int) -> None:
        """Write what transformers loads, tokenizer.json with its settings and the form of a conversation, into a folder
        that nobody reads yet. context: the model's, in tokens."""
        files = {
            "tokenizer.json": fast_tokenizer(self.pattern, self.mergeable_ranks, self.special_tokens),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|bos|>",
                "eos_token": "<|assistant_end|>",
                "pad_token": "<|assistant_end|>",
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
            },
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        shutil.copyfile(BUNDLED / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)

    def digest(self) -> str:
        """sha256 (hex) over everything that decides ids: pattern, tokens in id order, specials. The name does not."""
        ranks = [token.hex() for token in self._bytes[: len(self.mergeable_ranks)]]
        return digest_of(self.pattern, ranks, sorted(self.special_tokens.items()))

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
        return run_splitter(lambda: self._plain.encode_ordinary(text))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; specials as they are written in the vocabulary. ValueError for an id out of range."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {min(ids)}..{max(ids)}")
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: how many bytes each token stands for, 0 for specials (bits per byte counts with it)."""
        lengths = np.array([len(token) for token in self._bytes], np.int32)
        lengths[len(self.mergeable_ranks) :] = 0
        return lengths

    # ------------------------------------------------------------------------------------------------ conversations
    def render_conversation(
        self, conversation: dict, max_tokens: int | None = MAX_TOKENS
    ) -> tuple[list[int], list[int]]:
        """-> (ids, mask) of equal length, cut at max_tokens (None: never); the mask is 1 for trained tokens, else 0.

        The input is not changed. BadConversation (a ValueError) says why a conversation cannot be rendered.
        """
        ids, mask = [], []
        for segment in split_conversation(conversation):
            new = [self.special_tokens[segment.text]] if segment.special else self.encode(segment.text)
            ids += new
            mask += [segment.mask] * len(new)
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """The prompt for the last message, which must be the assistant's and is not looked at further.

        The rest is rendered and cut at 2048, then assistant_start is appended: up to 2049 ids.
        """
        messages = messages_of(conversation)
        if messages[-1].get("role") != "assistant":
            raise BadConversation("the last message must be the assistant's, it is what is to be completed")
        if len(messages) < 2:
            raise BadConversation("there is no message before the one to be completed")
        ids, _ = self.render_conversation({"messages": messages[:-1]})
        return [*ids, self.special_tokens["<|assistant_start|>"]]

    def render_many(
        self, conversations: Iterable[dict], max_tokens: int | None = MAX_TOKENS
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """render_conversation of each, as (ids int32 [k], mask uint8 [k]), with every core at work.

        The arrays are views into one buffer for the whole call: copy what is to outlive the rest of the batch.
        """
        masks, is_special, special_ids, ends = bytearray(), bytearray(), [], []  # of segments; ends: of conversations

        def texts():  # splits conversations while the threads encode the texts before
            for conversation in conversations:
                for text, mask, special in split_conversation(conversation):
                    masks.append(mask)
                    is_special.append(special)
                    if special:
                        special_ids.append(self.special_tokens[text])
                    else:
                        yield text
                ends.append(len(masks))

        text_ids, text_lengths = self.encode_many(texts())
        if not ends:
            return []
        is_text = np.frombuffer(is_special, np.uint8) == 0
        lengths = np.ones(len(is_text), np.int64)
        lengths[is_text] = text_lengths
        from_text = np.repeat(is_text, lengths)
        ids = np.empty(len(from_text), np.int32)
        ids[from_text], ids[~from_text] = text_ids, special_ids
        mask = np.repeat(np.frombuffer(masks, np.uint8), lengths)
        stops = np.cumsum(lengths)[np.array(ends) - 1].tolist()
        cut = len(ids) if max_tokens is None else max_tokens
        return [(ids[a:b][:cut], mask[a:b][:cut]) for a, b in zip([0, *stops[:-1]], stops)]

    def encode_many(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids uint32 of all texts in a row, length int64 of each), with every core at work.

        tiktoken's own batch call costs a Python task and a list of Python ints per text, which for chat messages of 50
        bytes is most of the time. Here a task is a chunk of texts, joined by a token that only this encoding knows;
        between such tokens tiktoken splits and merges independently, so the ids are those of the single texts.
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
            ids, lengths = zip(*(future.result() for future in pending), last)
        return np.concatenate(ids), np.concatenate(lengths)

    def _encode_chunk(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        joined = SEPARATOR.join(texts)
        if not texts or joined.count(SEPARATOR) != len(texts) - 1:  # nothing, or somebody wrote the separator
            lists = [self.encode(text) for text in texts]
            ids = np.array([i for one in lists for i in one], np.uint32)
            return ids, np.array([len(one) for one in lists], np.int64)
        joined = without_surrogates(joined)
        ids = run_splitter(lambda: self._bulk.encode_to_numpy(joined, allowed_special={SEPARATOR}))
        is_separator = ids == self.vocab_size
        borders = np.concatenate([[-1], np.flatnonzero(is_separator), [len(ids)]])
        return ids[~is_separator], np.diff(borders) - 1


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


def _naming(path: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """make(); its ValueError names the file."""
    try:
        return make()
    except (ValueError, RecursionError) as e:  # json and base64 raise subclasses of ValueError
        raise ValueError(f"{path} is not a usable tokenizer: {e}") from e


def without_surrogates(text: str) -> str:
    """The text as UTF-8 can hold it, and as tiktoken takes it: a pair becomes its character, a lone one U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def run_splitter(split: Callable, errors: tuple[type[Exception], ...] = (ValueError,)):
    """split(), a call into Rust. UnsplittableText: its regex engine gives up, as on a very long run of white space.

    It then panics, with an exception outside Exception, or raises one of `errors`.
    """
    try:
        return split()
    except BaseException as e:
        if isinstance(e, errors) or type(e).__name__ == "PanicException":
            raise UnsplittableText(f"a text cannot be split (too long a run of white space?): {e!s:.80}") from e
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
