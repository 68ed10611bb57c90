"""SmolTalk: general conversations, in the edition for small models, https://arxiv.org/abs/2502.02737"""

from typing import Unpack

from nanochat_jax.tasks.hub import HubOptions, HubTask
from nanochat_jax.tasks.task import message_fault


class SmolTalk(HubTask):
    """SmolTalk(split): train or test. `repo` takes another dataset with the same column `messages`.

    A row may begin with a system message; the rest are at least two messages of text that alternate from user. A row
    that is not like this raises when it is read: in hundreds of thousands of rows it means damaged data.
    """

    repo = "HuggingFaceTB/smol-smoltalk"
    subset = "default"
    columns = ("messages",)
    splits = ("train", "test")

    def __init__(self, split: str = "train", *, repo: str = "", **options: Unpack[HubOptions]):
        self.repo = repo or self.repo
        super().__init__(split, **options)

    def conversation(self, row: dict) -> dict:
        messages = row["messages"]
        first = messages[0] if isinstance(messages, list) and messages else None
        system = isinstance(first, dict) and first.get("role") == "system"
        if system and not isinstance(first.get("content"), str):
            raise ValueError("the content of the system message must be a string")
        if fault := message_fault(messages[1:] if system else messages):
            raise ValueError(fault + (" (counted after the system message)" if system else ""))
        return {"messages": messages}
