"""How well a tokenizer compresses: bytes of UTF-8 per token, on samples of several kinds and on the user's texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from unittest import mock

import tiktoken
from rich.table import Table
from rich.text import Text
from tiktoken import load

REFERENCES = ("gpt2", "cl100k_base")  # the best known of tiktoken's own encodings

SAMPLES = {
    "English prose": (
        "The ferry left an hour late, and by the time it passed the lighthouse the wind had turned to the north. "
        "Nobody on deck complained. Two children counted the gulls that followed us; their grandmother, in a "
        "blanket, told them that each bird was somebody's letter which had never arrived."
    ),
    "English chat": (
        "hey, quick question: what's the difference between a latte and a flat white?? I've read 3 answers and they "
        "don't agree :( Sure! A flat white is smaller, about 160 ml, and has less foam, so you'll taste more coffee."
    ),
    "Python code": (
        "def running_mean(values, window):\n"
        '    """Means of `window` neighbours, oldest first."""\n'
        "    if not 0 < window <= len(values):\n"
        '        raise ValueError(f"window must be in 1..{len(values)}, got {window}")\n'
        "    total = sum(values[:window])\n"
        "    means = [total / window]\n"
        "    for new, old in zip(values[window:], values):\n"
        "        total += new - old\n"
        "        means.append(total / window)\n"
        "    return means\n"
    ),
    "maths": (
        "A box holds 24 rows of 18 eggs, so 24 * 18 = 432 eggs. If 7/12 of them are sold at $0.35 each, the seller "
        "takes 432 * 7 / 12 * 0.35 = $88.20.\n\\int_0^1 x^2 \\, dx = \\frac{1}{3}, \\quad e^{i\\pi} + 1 = 0\n"
    ),
    "German, French": (
        "Die Brücke über den Fluss wurde im Frühjahr gesperrt, weil größere Schäden an den Pfeilern gefunden wurden. "
        "L'été dernier, nous avons mangé des pêches mûres sous le vieux chêne, à côté de la rivière."
    ),
    "other scripts": (
        "Мы встретились у входа в библиотеку и долго говорили о погоде. "
        "今天早上我在市场买了两斤苹果。 駅の前に小さな本屋があります。 오늘은 바람이 많이 붑니다. "
        "سافرنا إلى البحر في الصباح الباكر. आज बाज़ार में बहुत भीड़ थी। Το πλοίο έφτασε αργά."
    ),
    "emoji": "Happy birthday!! 🎂🎉🥳 See you at 8 👋🏽 bring the dog 🐕‍🦺 and the kids 👨‍👩‍👧‍👦 ❤️ 🇧🇷🇯🇵 👍🏿👍🏿 🤷‍♀️",
}


def count_bytes_and_tokens(encode: Callable[[str], list[int]], texts: Iterable[str]) -> tuple[int, int]:
    """(bytes in UTF-8, tokens) of all texts together."""
    sizes = [(len(text.encode("utf-8", "replace")), len(encode(text))) for text in texts]
    return sum(size for size, _ in sizes), sum(tokens for _, tokens in sizes)


def offline_encoding(name: str) -> tiktoken.Encoding | None:
    """tiktoken's encoding of this name if its files are in tiktoken's cache; None where it would download them."""
    with mock.patch.object(load, "read_file", side_effect=FileNotFoundError):
        try:
            return tiktoken.get_encoding(name)
        except FileNotFoundError:
            return None


def compression_table(encode: Callable[[str], list[int]], own: Mapping[str, Sequence[str]]) -> Table:
    """A row for each of SAMPLES and of `own` (name -> texts), a column for `encode` and for each of REFERENCES."""
    references = {name: offline_encoding(name) for name in REFERENCES}
    table = Table(title="bytes per token (more is better)")
    table.add_column("text", overflow="fold")  # so that two long paths are not cut to the same beginning
    for column in ("bytes", "tokens", "this tokenizer"):
        table.add_column(column, justify="right")
    for name, encoding in references.items():
        table.add_column(name if encoding else f"{name} (not on this machine)", justify="right")
    for kind, texts in ({kind: [text] for kind, text in SAMPLES.items()} | own).items():
        size, tokens = count_bytes_and_tokens(encode, texts)
        others = (_ratio(*count_bytes_and_tokens(e.encode_ordinary, texts)) if e else "-" for e in references.values())
        table.add_row(Text(kind), f"{size:,}", f"{tokens:,}", _ratio(size, tokens), *others)
    return table


def _ratio(size: int, tokens: int) -> str:
    return f"{size / tokens:.2f}" if tokens else "-"
