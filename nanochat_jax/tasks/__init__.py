"""Tasks: sequences of conversations to train on, and how answers to them are judged. One file per dataset."""

from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.arithmetic import Arithmetic
from nanochat_jax.tasks.custom_json import CustomJSON
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.mixture import TaskMixture, TaskSequence
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk
from nanochat_jax.tasks.spelling import SimpleSpelling, SpellingBee
from nanochat_jax.tasks.task import Task, load_task

__all__ = [
    "ARC",
    "GSM8K",
    "MMLU",
    "Arithmetic",
    "CustomJSON",
    "HumanEval",
    "SimpleSpelling",
    "SmolTalk",
    "SpellingBee",
    "Task",
    "TaskMixture",
    "TaskSequence",
    "load_task",
]
