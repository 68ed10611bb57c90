"""What a conversation consists of: the one place where its roles and parts become segments of text with a loss mask.

A conversation is rendered as: bos, then per message user_start text user_end, or assistant_start parts assistant_end.
The mask is 1 for what the assistant writes itself (text, python_start code python_end, assistant_end), and 0 for
everything it is given (bos, the user's side, assistant_start, and output_start result output_end).
"""


class BadConversation(ValueError):
    """This conversation cannot be rendered; the message is one sentence that says why."""


SPECIAL = 2  # the flag of a segment is its mask, plus SPECIAL where the piece names a special token


def split_conversation(conversation: dict) -> list[tuple[str, int]]:
    """-> segments (piece, flag): flag is the mask of a text, or SPECIAL plus the mask of the special token `piece`."""
    messages = messages_of(conversation)
    first, system = 0, ""
    if role_of(messages[0]) == "system":
        if len(messages) < 2 or role_of(messages[1]) != "user":
            raise BadConversation("a system message must be followed by a user message")
        first, system = 1, _text(messages[0], "the system message") + "\n\n"

    segments = [("<|bos|>", SPECIAL)]
    for i in range(first, len(messages)):
        message = messages[i]
        expected = "user" if (i - first) % 2 == 0 else "assistant"
        role = role_of(message)
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


def messages_of(conversation) -> list:
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list | tuple):
        raise BadConversation('a conversation must be a dict with a list of "messages"')
    if not messages:
        raise BadConversation("the conversation has no messages")
    return list(messages)


def role_of(message):
    if not isinstance(message, dict):
        raise BadConversation(f"a message must be a dict with role and content, got {type(message).__name__}")
    return message.get("role")


def _text(message: dict, where: str) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise BadConversation(f"the content of {where} must be a string, got {type(content).__name__}")
    return content
