"""A conversation's tokens as text for a terminal, or for a file, with what is trained told from what is not.

<|bos|>|<|user_start|>|Two| plus| two|?|<|user_end|>|<|assistant_start|>|[Four|.|<|assistant_end|>]

Trained tokens stand in [ ] and are green, others are grey, special tokens are bold; a | is between two tokens. What a
text has of these marks is written with a backslash, and everything that does not print as in a Python string, so a
file can neither imitate a mark nor send an escape code to the terminal.
"""

from collections.abc import Iterator

from rich.text import Text

from nanochat_jax.tokenizer.bpe import Tokenizer

TRAINED, GIVEN, SPECIAL_STYLE = "green", "bright_black", "bold"
MARKS = "[]|\\"


def visible(text: str, control_tokens: str = MARKS) -> str:
    """The text without anything that a terminal acts on: \\x1b, \\u202e, \\n ...; a new line also begins one."""
    shown = []
    for c in text:
        if c in control_tokens:
            shown.append("\\" + c)
        elif c.isprintable():
            shown.append(c)
        elif "\udc80" <= c <= "\udcff":  # a byte of no character, by surrogateescape
            shown.append(f"\\x{ord(c) - 0xDC00:02x}")
        else:
            shown.append(c.encode("unicode_escape").decode() + ("\n" if c == "\n" else ""))
    return "".join(shown)


def coloured(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Text:
    """The rendered conversation (ids, mask) as above. Tokens that are parts of one character are shown as one."""
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
    """(what is shown, mask, special?) of each token, or of several where a character is spread over them."""
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
