"""The forms in which people keep conversations, and how a row of each becomes a conversation of ours.

    messages                          [{"role", "content"}, ...], or an object that has them under "messages"
    prompt, completion                two texts, or two lists of messages, as TRL has them
    conversations                     [{"from", "value"}, ...], as ShareGPT has them
    instruction, (input), output      as Alpaca has them

A row is a value of JSON, or a dictionary of a parquet file's columns. What is wrong with it is said in few words, which
follow the place of the row.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")  # of OpenAI's and of ShareGPT's form
TOOL_KEYS = ("tool_calls", "function_call")


class Form(NamedTuple):
    """A form that rows of a file may have, and how they become messages."""

    title: str  # ends a sentence that begins with a number of conversations
    keys: tuple[str, ...]  # that each row has
    messages: Callable[[dict], object]  # of such a row; nothing is promised about what they are
    optional: tuple[str, ...] = ()


def _from_prompt(row: dict) -> object:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return prompt + completion
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise ValueError(f"prompt and completion must be two strings or two lists of messages, got {kinds}")


def _from_sharegpt(row: dict) -> object:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations must be a list, got {type(turns).__name__}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            got = f"an object with {quoted(turn)}" if isinstance(turn, dict) else type(turn).__name__
            raise ValueError(f'message {i} must be an object with "from" and "value", got {got}')
    roles = [turn["from"] for turn in turns]
    roles = [SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role for role in roles]
    return [{"role": role, "content": turn["value"]} for role, turn in zip(roles, turns)]


def _from_alpaca(row: dict) -> object:
    question, given = row["instruction"], row.get("input") or ""
    for name, text in (("instruction", question), ("input", given)):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    question = f"{question}\n\n{given}" if given.strip() else question
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


MESSAGES = Form("as messages with role and content", ("messages",), lambda row: row["messages"])
FORMS = (
    MESSAGES,
    Form("as prompt and completion", ("prompt", "completion"), _from_prompt),
    Form("in ShareGPT's form", ("conversations",), _from_sharegpt),
    Form("in Alpaca's form", ("instruction", "output"), _from_alpaca, optional=("input",)),
)


def form_of(row: object) -> Form:
    """The first form whose keys this row has. ValueError: it has none."""
    if isinstance(row, list):
        return MESSAGES
    if not isinstance(row, dict):
        raise ValueError(f'must be a list of messages or an object with "messages", got {type(row).__name__}')
    if found := next((form for form in FORMS if all(key in row for key in form.keys)), None):
        return found
    first, *others = (" and ".join(map(json.dumps, form.keys)) for form in FORMS)
    hint = "; pairs of a better and a worse answer are no conversations" if "chosen" in row else ""
    raise ValueError(f"an object must have {first}, or {', or '.join(others)}, it has {quoted(row)}{hint}")


def conversation_of(row: object, form: Form, allow_empty: bool = False) -> dict:
    """A row of this form as {"messages": [...]}, to which an object with "messages" keeps its other keys.

    ValueError: it has another form, or cannot be trained on; allow_empty: answers without text can be."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError(f"must be {'a list of messages or ' * (form is MESSAGES)}an object, got {type(row).__name__}")
    if any(key not in row for key in form.keys):
        wanted = " and ".join(map(json.dumps, form.keys))
        raise ValueError(f"an object must have {wanted}, as the first row has, it has {quoted(row)}")
    conversation = row if form is MESSAGES else {"messages": form.messages(row)}
    if fault := message_fault(conversation["messages"], allow_empty):
        raise ValueError(fault)
    return conversation


def unread_keys(keys: Iterable[str], form: Form) -> list[str]:
    """Those for which the form has no use."""
    return [key for key in keys if key not in form.keys + form.optional]


def message_fault(messages: object, allow_empty: bool = False) -> str | None:
    """Why this is no list of at least two messages of text that alternate from user, None where it is.

    A message of the role system may come before them. allow_empty: the assistant may say nothing."""
    if not isinstance(messages, list):
        return f"messages must be a list, got {type(messages).__name__}"
    first = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {i} must be an object with role and content, got {type(message).__name__}"
        role, content = message.get("role"), message.get("content")
        if i == 0 and role == "system":
            first = 1
        if role in TOOL_ROLES or any(message.get(key) for key in TOOL_KEYS):
            return f"message {i} calls a tool or is its answer, which cannot be taken: leave such conversations out"
        expected = ("user", "assistant")[(i - first) % 2] if i >= first else "system"
        if role != expected:
            return f"message {i} must have role {expected!r}, as roles alternate from user, got {role!r:.40}"
        if isinstance(content, list):
            return f"the content of message {i} must be a string, got a list of parts: {_advice(content)}"
        if not isinstance(content, str):
            return f"the content of message {i} must be a string, got {type(content).__name__}"
        if role == "assistant" and not (allow_empty or content.strip()):
            return f"message {i}, the assistant's, is empty (--allow-empty takes such answers)"
    if len(messages) - first < 2:
        beside = " beside the system's" * first
        return f"a conversation needs at least 2 messages{beside}, got {len(messages) - first}"
    return None


def _advice(parts: list) -> str:
    kinds = {part.get("type") for part in parts if isinstance(part, dict) and isinstance(part.get("type"), str)}
    if other := sorted(kinds - {"text"}):
        return f"{quoted(other)} cannot be trained on, leave such conversations out"
    return "join their texts into one"


def quoted(names: Iterable[str]) -> str:
    """A few names for a sentence, with nothing in them that a terminal would act on."""
    return ", ".join(json.dumps(name[:30]) for name in itertools.islice(names, 8)) or "none"
