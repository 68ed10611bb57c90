"""The settings of a chat in the terminal."""

import dataclasses
from typing import Annotated

from nanochat_jax.cli.settings import (
    ANSWERS,
    DEVICES,
    LARGEST,
    RUN,
    Maybe,
    between,
    setting,
    short,
)
from nanochat_jax.flags.model import ModelConfig
from nanochat_jax.flags.tools import ToolConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelConfig, ToolConfig):
    """Talk with a model. `clear` forgets the chat; `quit`, `exit` and Ctrl-D end it; Ctrl-C stops an answer, and what
    there is of it stays in the chat.

    python -m nanochat_jax.chat                                 # the newest SFT model
    python -m nanochat_jax.chat -i rl -t 0.8                    # one that RL has trained
    python -m nanochat_jax.chat -p "How much is 12 * 3.5?"      # one answer, and nothing else, on standard output
    printf 'Hello!\\nWho are you?\\n' | python -m nanochat_jax.chat   # a turn a line
    """

    prompt: Annotated[Maybe[str], short("-p")] = setting(
        None, "one message: print the answer to it, and nothing else, and exit", group=RUN
    )
    temperature: Annotated[float, short("-t")] = setting(0.6, "0 = always the likeliest token", group=ANSWERS)
    top_k: Annotated[int, short("-k")] = setting(50, "draw from the likeliest k tokens (0 = from all)", group=ANSWERS)
    max_new_tokens: int = setting(256, "tokens of an answer, results of tools included", group=ANSWERS)
    seed: int = setting(
        42,
        "of the first answer; each one after it has the next number",
        between(0, LARGEST, f"from 0 to {LARGEST}"),
        group=ANSWERS,
    )
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", group=DEVICES)
    dtype: str = setting(
        "auto", "compute type: float32 or bfloat16; auto = bfloat16 on GPU and TPU, float32 on CPU", group=DEVICES
    )
