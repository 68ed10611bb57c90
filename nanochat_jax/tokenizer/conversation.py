"""What a conversation consists of: the one place where its messages become segments of text with a loss mask.

A conversation is rendered as bos, then for each message: user_start text user_end, or assistant_start parts
assistant_end. The model is trained on what the assistant has to write itself: text, python_start code python_end,
assistant_end. It is not trained on what it is given: bos, the user's side, assistant_start, and output_start result
output_end.
"""

from typing import NamedTuple


class BadConversation(ValueError):
    """This conversation cannot be rendered; the message is one sentence that says why."""


class Segment(NamedTuple):
    """A text of a conversation, or a special token in it."""

    text: str  # or the name of a special token
    mask: int  # 1 where its tokens are trained, else 0
    special: bool = False  # it is one special token


BOS = Segment("<|bos|>", 0, special=True)
USER_START, USER_END = Segment("<|user_start|>", 0, special=True), Segment("<|user_end|>", 0, special=True)
ASSISTANT_START = Segment("<|assistant_start|>", 0, special=True)
ASSISTANT_END = Segment("<|assistant_end|>", 1, special=True)
PYTHON_START, PYTHON_END = Segment("<|python_start|>", 1, special=True), Segment("<|python_end|>", 1, special=True)
OUTPUT_START, OUTPUT_END = Segment("<|output_start|>", 0, special=True), Segment("<|output_end|>", 0, special=True)


def split_conversation(conversation: dict) -> list[Segment]:
    """The conversation's segments, in order. BadConversation: it has none."""
    messages = messages_of(conversation)
    first, system = 0, ""
    if messages[0].get("role") == "system":
        if len(messages) < 2 or messages[1].get("role") != "user":
            raise BadConversation("a system message must be followed by a user message")
        first, system = 1, _text(messages[0], "the system message") + "\n\n"

    segments = [BOS]
    for i in range(first, len(messages)):
        message, expected = messages[i], "user" if (i - first) % 2 == 0 else "assistant"
        if (role := message.get("role")) != expected:
            raise BadConversation(f"message {i} must be from {expected!r}, as roles alternate, got {role!r:.40}")
        if role == "user":
            text = _text(message, f"user message {i}")
            segments += [USER_START, Segment(system + text if i == first else text, 0), USER_END]
            continue
        segments.append(ASSISTANT_START)
        content = message.get("content")
        if isinstance(content, str):
            segments.append(Segment(content, 1))
        elif isinstance(content, list):
            for k, part in enumerate(content):
                segments += _split_part(part, k, i)
        else:
            raise BadConversation(
                f"assistant message {i} must hold text or a list of parts, got {type(content).__name__}"
            )
        segments.append(ASSISTANT_END)
    return segments


def _split_part(part, k: int, i: int) -> list[Segment]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "python", "python_output"):
        raise BadConversation(
            f"part {k} of message {i} must be of type text, python or python_output, got {kind!r:.40}"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise BadConversation(f'part {k} of message {i} must have a "text" that is a string, got {type(text).__name__}')
    if kind == "text":
        return [Segment(text, 1)]
    if kind == "python":
        return [PYTHON_START, Segment(text, 1), PYTHON_END]
    return [OUTPUT_START, Segment(text, 0), OUTPUT_END]


def messages_of(conversation) -> list[dict]:
    """A copy of the conversation's list of messages, of which there is at least one."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list | tuple):
        raise BadConversation('a conversation must be a dict with a list of "messages"')
    if not messages:
        raise BadConversation("the conversation has no messages")
    for message in messages:
        if not isinstance(message, dict):
            raise BadConversation(f"a message must be a dict with role and content, got {type(message).__name__}")
    return list(messages)


def _text(message: dict, place: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise BadConversation(f"the content of {place} must be a string, got {type(content).__name__}")
    return content
