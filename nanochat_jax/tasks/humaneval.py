"""HumanEval: Python functions to complete, judged by running unit tests, https://arxiv.org/abs/2107.03374"""

import re
import secrets
from typing import Unpack

from nanochat_jax.tasks import sandbox
from nanochat_jax.tasks.hub import HubOptions, HubTask
from nanochat_jax.tasks.task import question_and_answer, require_text

OPENING = re.compile(r"```(?:python)?\s*\n")
CLOSING = "\n```"

# Each part is compiled on its own, so that no open bracket, quote or decorator of one reaches into the next. The marker
# is new each time and is written after the check: a program that ends early, with whatever exit status, lacks it.
PROGRAM = """\
import os
scope = {{"__name__": "__main__"}}
exec(compile({solution!r}, "solution", "exec"), scope)
exec(compile({test!r}, "test", "exec"), scope)
scope["check"](scope[{entry_point!r}])
os.write(1, {marker!r})
"""


def extract_program(text: str) -> str:
    """What is in the first block fenced by ``` or ```python; the whole text where there is none."""
    opening = OPENING.search(text)
    if opening is None:
        return text.strip()
    start = text.index("\n", opening.start()) + 1
    end = text.find(CLOSING, opening.end())
    if end < 0:
        end = text.find(CLOSING, start)  # a block of blank lines
    return text[start:end].strip() if end >= 0 else text.strip()


def extract_imports(prompt: str) -> str:
    """The import statements that a prompt begins with, blank lines and comments between them left out."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


class HumanEval(HubTask):
    """HumanEval(): the one split is test. unsafe=True runs programs also where the machine can guard nothing."""

    repo = "openai/openai_humaneval"
    subset = "openai_humaneval"
    columns = ("prompt", "canonical_solution", "test", "entry_point")
    splits = ("test",)

    def __init__(self, split: str = "test", *, unsafe: bool = False, **options: Unpack[HubOptions]):
        super().__init__(split, **options)
        self.unsafe = unsafe

    def conversation(self, row: dict) -> dict:
        self.require_columns_of_text(row)
        solved = question_and_answer(row["prompt"], f"{row['prompt']}\n{row['canonical_solution']}")
        return solved | {"entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: dict, answer: str) -> int:
        """1 where the answer's program, after the prompt's imports, passes the tests in the sandbox.

        The tests run in the program's own interpreter, as they must to call it: one that sets out to deceive them can.
        """
        require_text(answer)
        imports = extract_imports(conversation["messages"][0]["content"])
        marker = secrets.token_hex(16)
        program = PROGRAM.format(
            solution=f"{imports}\n\n{extract_program(answer)}",
            test=conversation["test"],
            entry_point=conversation["entry_point"],
            marker=f"\n{marker}\n".encode(),
        )
        result = sandbox.run(program, unsafe=self.unsafe)
        return int(result.ok and marker in result.stdout)
