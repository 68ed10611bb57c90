"""A conversation's tokens as text for a terminal or a file, which shows what is trained and what is not.

<|bos|>|<|user_start|>|Two| plus| two|?|<|user_end|>|<|assistant_start|>|[Four|.|<|assistant_end|>]

Trained tokens stand in [ ] and are green, others are grey, special tokens are bold; a | is between two tokens. These
marks get a backslash where they are part of the text, and unprintable characters are written as in a Python string, so
a file can neither imitate a mark nor send an escape code to the terminal.
"""

from collections.abc import Iterator

from rich.text import Text

from nanochat_jax.tokenizer.bpe import Tokenizer

TRAINED, GIVEN, SPECIAL_STYLE = "green", "bright_black", "bold"
MARKS = "[]|\\"


def visible(text: str, marks: str = MARKS) -> str:
    """The text with a backslash before `marks`, and with \\x1b, \\u202e ... for what does not print.

    A line break is written as \\n, and made."""
    shown = []
    for c in text:
        if c in marks:
            shown.append("\\" + c)
        elif c.isprintable():
            shown.append(c)
        elif "\udc80" <= c <= "\udcff":  # a byte that is not UTF-8, decoded with surrogateescape
            shown.append(f"\\x{ord(c) - 0xDC00:02x}")
        else:
            shown.append(c.encode("unicode_escape").decode() + ("\n" if c == "\n" else ""))
    return "".join(shown)


def format_tokens(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Text:
    """A rendered conversation in the form above. Tokens that are parts of one character are shown as one."""
    text = Text()
    trained_before = 0
    for position, (piece, trained, is_special) in enumerate(_pieces(tokenizer, ids, mask)):
        if trained_before and not trained:
            text.append("]", TRAINED)
        if position:
            text.append("|", GIVEN)
        if trained and not trained_before:
            text.append("[", TRAINED)
        style = TRAINED if trained else GIVEN
        text.append(piece, f"{SPECIAL_STYLE} {style}" if is_special else style)
        trained_before = trained
    if trained_before:
        text.append("]", TRAINED)
    return text


def _pieces(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Iterator[tuple[str, int, bool]]:
    """(text to show, mask, whether it is special) of each token, or of several that together are one character."""
    special = {i: token for token, i in tokenizer.special_tokens.items()}
    held = b""
    for i, trained, following in zip(ids, mask, [*ids[1:], tokenizer.bos], strict=True):
        if i in special:
            yield special[i], trained, True
            continue
        held += tokenizer.decode_bytes([i])
        text = held.decode("utf-8", "surrogateescape")
        if following in special or not any("\udc80" <= c <= "\udcff" for c in text):
            yield visible(text), trained, False
            held = b""
