"""The settings of the commands whose models call tools."""

import dataclasses

from nanochat_jax.cli.settings import ANSWERS, at_least, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolConfig:
    """The settings of the commands whose models call tools."""

    tool: tuple[str, ...] = setting(
        (),
        "calculator (default), python (in a sandbox), or one of your own as module:Class; more by giving it again",
        group=ANSWERS,
    )
    tool_tokens: int = setting(512, "tokens of a tool's result; what is longer is cut", at_least(1), group=ANSWERS)
