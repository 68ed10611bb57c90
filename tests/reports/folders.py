"""Folders of runs that tests write, and pages read back as a browser would: as elements and texts."""

import json
from html.parser import HTMLParser

RL = [{"step": k, "loss": -0.1 * k, "reward": k / 10, "smoothed_reward": k / 20, "seconds": 60.0} for k in range(1, 6)]


def write(folder, records, rollouts=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if rollouts:
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    return folder


def answer(number, reward, text="4", step=3, example=7):
    record = {"step": step, "example": example, "sample": number, "reward": reward, "advantage": reward - 0.5}
    return record | {"prompt": "2+2?", "text": text}


class Elements(HTMLParser):
    """tags: (name, attributes) of all elements; texts: what is between them, except for style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [value for name, value in attributes if name in ("href", "src", "xlink:href", "action", "data")]

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.texts.append(data)

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def checkpoint(run, step, /, **settings):
    """A checkpoint of a run as far as a reader of its settings sees it."""
    folder = run / str(step)
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/data.json").write_text(json.dumps({"step": step, "user_config": settings}))
    (folder / "INTEGRITY.json").write_text("{}")


def result(step, **accuracies):
    """What eval writes, of tasks with these shares of right answers."""
    tasks = {
        name: {"problems": 400, "accuracy": {"value": value, "low": value - 0.05, "high": value + 0.05}}
        for name, value in accuracies.items()
    }
    return {"step": step, "tasks": tasks, "sampling": {"samples": 1, "temperature": 0.0}, "chatcore": 0.25}


def rollout(tokenizer, number, text="4", *, step=3, example=7, reward=1.0, tools=(), ended=True, forced=(), **more):
    """A line of rollouts.jsonl as RL writes it. text: what the model wrote, as text or as ids; special tokens are names
    in a list of both. forced: indices of tokens that were not sampled."""
    parts = [text] if isinstance(text, str) else text
    tokens = [i for part in parts for i in ids_of(tokenizer, part)] + [tokenizer.special("<|assistant_end|>")] * ended
    mask = [int(n not in forced) for n in range(len(tokens))]
    record = answer(number, reward, tokenizer.decode(tokens), step, example) | {"ended": ended, "tools": [*tools]}
    logprobs = {"logprobs": [-0.5 * m for m in mask], "policy_logprobs": [-0.25 * m for m in mask]}
    return record | {"tokens": tokens, "mask": mask} | logprobs | more


def ids_of(tokenizer, part):
    if isinstance(part, int):
        return [part]
    return [tokenizer.special(part)] if part in tokenizer.special_tokens else tokenizer.encode(part)
