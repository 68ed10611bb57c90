"""Pages about the rollouts of RL's runs, one a run: every answer of rollouts.jsonl, token by token.

A page holds the answers as JSON, each token's text once, and its script shows those to one problem at a time.
"""

import collections
import contextlib
import html
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat_jax.files.paths import base_dir
from nanochat_jax.reports.document import STYLE, document, part
from nanochat_jax.reports.runs import Log, is_number, names_of, no_rollouts, read_rollout

if TYPE_CHECKING:
    from nanochat_jax.tokenizer.bpe import Tokenizer

SCRIPT, OWN_STYLE = part("rollouts.js"), part("rollouts.css")
MARK = b"<main class=rollouts>"  # only pages of this kind have it
MOST_BYTES = 48_000_000  # of rollouts.jsonl that a page shows; of a longer one it has some of the steps
STEP = re.compile(rb'\{"step": (\d{1,15}),')  # the beginning of a line, as a run writes it
LONGEST = 100  # letters of a run's name in that of a file
LARGEST_ID = 1 << 31


class RolloutPage(NamedTuple):
    """A page that can be made."""

    folder: Path  # of the run
    name: str  # of the run, among those that have rollouts
    file: str  # name of the page's file


def rollout_pages(folders: Sequence[Path], report: str) -> list[RolloutPage]:
    """The pages about those runs that have rollouts, beside the report of this name; their files differ."""
    with_rollouts = [folder for folder in folders if (folder / "rollouts.jsonl").is_file()]
    pages: list[RolloutPage] = []
    taken: set[str] = set()
    for folder, name in zip(with_rollouts, names_of(with_rollouts)):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-LONGEST:]
        numbers = (f"-{n}" if n else "" for n in range(len(folders) + 1))
        file = next(f for n in numbers if (f := f"{Path(report).stem}-rollouts-{plain}{n}.html").lower() not in taken)
        taken.add(file.lower())  # some file systems take capitals for small letters
        pages.append(RolloutPage(folder, name, file))
    return pages


def is_page(path: Path) -> bool:
    """Whether what lies there is a page of this kind, which may be replaced."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK in file.read(64 * 1024)


# --------------------------------------------------------------------------------------------------------- the answers
class Rollouts(NamedTuple):
    """What a page shows of a rollouts.jsonl."""

    answers: list[dict]  # see `read_rollout`
    left_out: int  # lines that are no answer
    every: int  # of so many steps one is kept


def read_rollouts(path: Path, log: Log = str) -> Rollouts:
    """All answers of a file in its order, or those of some of its steps, evenly spread, the last among them."""
    answers, left_out, every = [], 0, 1
    try:
        kept, every = kept_steps(path)
        with path.open("rb") as file:
            for line in file:
                begin = STEP.match(line)
                if not line.strip() or (kept and begin and int(begin[1]) not in kept):
                    continue
                if record := read_rollout(line):
                    answers.append(record)
                else:
                    left_out += 1
    except OSError as e:
        log(f"{path}: {e.strerror}")
    if left_out:
        log(f"{path}: {no_rollouts(left_out)}")
    return Rollouts(answers, left_out, every)


def kept_steps(path: Path) -> tuple[set[int], int]:
    """The steps of a file that a page has room for, none where it has room for all, and of how many steps one is kept.

    OSError: the file cannot be read."""
    sizes: collections.Counter[int] = collections.Counter()
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) > MOST_BYTES:
            file.seek(0)
            for line in file:
                if begin := STEP.match(line):
                    sizes[int(begin[1])] += len(line)
    every = max(1, math.ceil(sizes.total() / MOST_BYTES))
    return ({*sorted(sizes, reverse=True)[::every]}, every) if every > 1 else (set(), 1)


def tokenizer_of(folder: Path) -> "Tokenizer | None":
    """The tokenizer that lies in a run's base directory, or in this one's; None where neither can be read."""
    from nanochat_jax.tokenizer.bpe import Tokenizer  # NumPy and tiktoken, which only this page needs

    for base in (lambda: folder.parent.parent, base_dir):
        with contextlib.suppress(OSError, ValueError):
            return Tokenizer.load(base() / "tokenizer")
    return None


# ---------------------------------------------------------------------------------------------------------- the page
def rollouts_page(page: RolloutPage, report: str, log: Log = str) -> str:
    """The page about a run's rollouts. report: link to the page that has its curves."""
    found = read_rollouts(page.folder / "rollouts.jsonl", log)
    data = page_data(found.answers, tokenizer_of(page.folder))
    notes = []
    if found.left_out:
        notes.append(f"{no_rollouts(found.left_out)}, and left out.")
    if found.every > 1:
        notes.append(f"The file is long: of {found.every} steps one is here.")
    if unknown := sum("text" in answer for group in data["groups"] for answer in group["answers"]):
        notes.append(
            f"Of {unknown:,} answers the tokens are shown as ids: the base directory has no tokenizer, or another."
        )
    groups = data["groups"]
    counts = (
        f"{len({group['step'] for group in groups}):,} steps, {len(groups):,} groups, {len(found.answers):,} answers"
    )
    said = "".join(f"<p class=hint>{note}</p>" for note in notes)
    begin, end = part("rollouts.html").split("<!--data-->")
    name = html.escape(page.name)
    body = begin.format(name=name, report=html.escape(report), counts=counts, notes=said)
    return document(f"Rollouts of {name}", STYLE + OWN_STYLE, f"{body}{as_element(data)}{end}", SCRIPT)


def as_element(data: object) -> str:
    """JSON that a script reads, as an element that no text in it can end: it has ASCII and no < at all."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"<script type=application/json id=data>{text}</script>"


def page_data(answers: Sequence[Mapping[str, Any]], tokenizer: "Tokenizer | None") -> dict:
    """What the page's script reads.

    groups: the answers to a problem in a step, in the order of the steps: {step, example, prompt (index), answers};
    prompts: each text once; tokens: id -> text, or bytes where they are no whole characters; special: id -> its text.
    """
    groups: dict[tuple[int, int, str], list[dict]] = {}
    ids: set[int] = set()
    for record in answers:
        answer = shown_answer(record)
        if tokenizer and is_text_of(tokenizer, answer["tokens"], record["text"]):
            ids.update(answer["tokens"])
        else:
            answer["text"] = record["text"]
        groups.setdefault((record["step"], record["example"], record["prompt"]), []).append(answer)
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompt for *_, prompt in groups))}
    special = {i: text for text, i in tokenizer.special_tokens.items()} if tokenizer else {}
    return {
        "groups": [
            {"step": step, "example": example, "prompt": prompts[prompt], "answers": groups[step, example, prompt]}
            for step, example, prompt in sorted(groups, key=lambda key: key[0])
        ],
        "prompts": [*prompts],
        "tokens": {i: text_or_bytes(tokenizer.decode_bytes([i])) for i in sorted(ids)} if tokenizer else {},
        "special": special,
    }


def is_text_of(tokenizer: "Tokenizer", tokens: Sequence[int], text: str) -> bool:
    """Whether a tokenizer is the one of an answer, so far as the answer tells. It tells more than a checkpoint's
    digest: a run that is under way may have none."""
    return all(i < tokenizer.vocab_size for i in tokens) and tokenizer.decode(tokens) == text


def text_or_bytes(token: bytes) -> str | list[int]:
    """A token's text, or its bytes where it is a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return [*token]


def shown_answer(record: Mapping[str, Any]) -> dict:
    """An answer as the page's script reads it; what a line lacks, or has in another form, is null, or not sampled nor
    forced in the mask, which is a text of 1, 0 and ?."""
    tokens = record.get("tokens")
    if not isinstance(tokens, list) or not all(type(i) is int and 0 <= i < LARGEST_ID for i in tokens):
        tokens = []
    mask = column(record.get("mask"), len(tokens))
    number, ended, tools = record.get("sample"), record.get("ended"), record.get("tools")
    return {
        "sample": number if type(number) is int and 0 <= number < LARGEST_ID else None,
        "reward": record["reward"],
        "advantage": short(record["advantage"]),
        "ended": ended if isinstance(ended, bool) else None,
        "tools": [*tool_calls(tools)] if isinstance(tools, list) else [],
        "tokens": tokens,
        "mask": "".join("?" if value is None else "01"[value != 0] for value in mask),
        "logprobs": [short(value) for value in column(record.get("logprobs"), len(tokens))],
        "policy": [short(value) for value in column(record.get("policy_logprobs"), len(tokens))],
    }


def column(values: object, count: int) -> list[float | None]:
    """So many numbers, one a token, None where there is none."""
    found = values[:count] if isinstance(values, list) else []
    return [value if is_number(value) else None for value in found] + [None] * (count - len(found))


def short(value: float | None) -> float | None:
    """A number with four digits, as the page shows it."""
    return None if value is None else float(f"{value:.4g}")


def tool_calls(tools: Sequence[object]) -> Iterator[dict]:
    """Calls as {call, result, late}: texts or null, and whether the tool took too long; one without a result failed."""
    for call in tools:
        if isinstance(call, dict):
            call, result, late = (call.get(name) for name in ("expression", "result", "timed_out"))
            texts = {name: t if isinstance(t, str) else None for name, t in (("call", call), ("result", result))}
            yield texts | {"late": late is True}
