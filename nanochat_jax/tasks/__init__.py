"""Tasks: sequences of conversations to train on, and how answers to them are judged. One file per dataset."""

from nanochat_jax.tasks.arc import ARC as ARC
from nanochat_jax.tasks.arithmetic import Arithmetic as Arithmetic
from nanochat_jax.tasks.custom_json import CustomJSON as CustomJSON
from nanochat_jax.tasks.environments import GuessNumber as GuessNumber
from nanochat_jax.tasks.environments import SecondTry as SecondTry
from nanochat_jax.tasks.gsm8k import GSM8K as GSM8K
from nanochat_jax.tasks.humaneval import HumanEval as HumanEval
from nanochat_jax.tasks.mixture import TaskMixture as TaskMixture
from nanochat_jax.tasks.mixture import TaskSequence as TaskSequence
from nanochat_jax.tasks.mmlu import MMLU as MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk as SmolTalk
from nanochat_jax.tasks.spelling import SimpleSpelling as SimpleSpelling
from nanochat_jax.tasks.spelling import SpellingBee as SpellingBee
from nanochat_jax.tasks.task import Task as Task
from nanochat_jax.tasks.task import load_task as load_task
