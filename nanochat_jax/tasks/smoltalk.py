"""SmolTalk: general conversations, in the edition for small models, https://arxiv.org/abs/2502.02737"""

from typing import Unpack

from nanochat_jax.tasks.chat_forms import message_fault
from nanochat_jax.tasks.hub import HubOptions, HubTask


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
        if fault := message_fault(row["messages"], allow_empty=True):
            raise ValueError(fault)
        return {"messages": row["messages"]}
