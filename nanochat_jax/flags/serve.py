"""The settings of the server."""

import dataclasses
from typing import Annotated

from nanochat_jax.cli.settings import (
    ANSWERS,
    DEVICES,
    REQUESTS,
    SERVER,
    Maybe,
    at_least,
    between,
    setting,
    short,
)
from nanochat_jax.flags.model import ModelConfig
from nanochat_jax.flags.tools import ToolConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(ModelConfig, ToolConfig):
    """Serve a model: OpenAI's interface at /v1, and a page to talk to it at /.

    python -m nanochat_jax.serve                       # the newest SFT model, at http://127.0.0.1:8000
    python -m nanochat_jax.serve -i rl --port 8080
    NANOCHAT_API_KEY=... python -m nanochat_jax.serve --host 0.0.0.0    # for other machines, with a key
    """

    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 = all of this machine's", group=SERVER)
    port: Annotated[int, short("-p")] = setting(
        8000, "port to listen at; 0 = any that is free", between(0, 65535, "a port from 0 to 65535"), group=SERVER
    )
    api_key: Maybe[str] = setting(
        None, "key that requests must bring; default: NANOCHAT_API_KEY of the environment, else none", group=SERVER
    )
    served_model_name: Maybe[str] = setting(
        None, "the model's name in requests; default: its tag and stage, such as d20-sft", group=SERVER
    )
    cors: tuple[str, ...] = setting(
        (), "origin of pages from elsewhere that may ask, such as https://example.org; * = all", group=SERVER
    )
    max_concurrent: int = setting(32, "answers that are generated together", at_least(1), group=REQUESTS)
    max_waiting: int = setting(128, "answers that may wait; who comes later is sent away", at_least(0), group=REQUESTS)
    max_messages: int = setting(500, "messages of a conversation", at_least(1), group=REQUESTS)
    max_message_chars: int = setting(8000, "characters of a message", at_least(1), group=REQUESTS)
    max_total_chars: int = setting(32000, "characters of a conversation or prompt", at_least(1), group=REQUESTS)
    max_body_bytes: int = setting(1 << 20, "bytes of a request", at_least(1024), group=REQUESTS)
    temperature: Annotated[float, short("-t")] = setting(
        0.8, "of requests that name none; 0 = always the likeliest token", group=ANSWERS
    )
    top_k: Annotated[int, short("-k")] = setting(
        50, "of requests that name none: draw from the likeliest k tokens (0 = from all)", group=ANSWERS
    )
    top_p: float = setting(
        1.0, "of requests that name none: draw from the likeliest tokens of this probability", group=ANSWERS
    )
    max_new_tokens: Annotated[int, short("-m")] = setting(
        512, "tokens of an answer, of requests that name none", group=ANSWERS
    )
    device_type: str = setting("auto", "auto, cuda, tpu or cpu", group=DEVICES)
    dtype: str = setting(
        "auto", "compute type: float32 or bfloat16; auto = bfloat16 on GPU and TPU, float32 on CPU", group=DEVICES
    )
