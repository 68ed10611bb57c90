"""The prompts of a run of RL, in the order in which the run meets them."""

import functools
import hashlib

import numpy as np

from nanochat_jax.cli.settings import require
from nanochat_jax.data.rows import shuffled
from nanochat_jax.distributed.processes import print0
from nanochat_jax.evals.eval_set import error_text, replies
from nanochat_jax.files.digest import digest_of
from nanochat_jax.rollouts.objective import MAX_REWARD
from nanochat_jax.tasks import Task
from nanochat_jax.tasks.task import as_played, total
from nanochat_jax.tokenizer import MAX_TOKENS


class PromptStream:
    """A task's problems in the order of a run, which meets them one after the other by their position 0, 1, ...: in the
    task's order, from the second epoch on in one drawn from (seed, epoch)."""

    def __init__(self, task: Task, tokenizer, seed: int, count: int):
        """count: positions that the run can reach. ValueError: a problem that cannot be rendered or rewarded."""
        self.task, self.tokenizer, self.seed, self.size = task, tokenizer, seed, len(task)
        self.order = functools.lru_cache(2)(functools.partial(shuffled, self.size, seed))
        self.prompts = [self._render(i) for i in range(min(self.size, count))]
        self.reply = replies(task, task.__getitem__)  # (number of the problem, turns) -> of an environment
        self.reward(0, "")  # a task without a reward is found out now
        if self.reply:
            self.reply(0, [""])

    def __getitem__(self, position: int) -> tuple[int, list[int]]:
        """(number of the problem in the task, its prompt's ids)"""
        epoch, within = divmod(position, self.size)
        example = int(self.order(epoch)[within])
        return example, self.prompts[example]

    def fingerprint(self, count: int | None = None) -> str:
        """sha256 (hex) of what decides which prompts the run meets: the task's name and size, and each prompt's tokens.

        count: positions that a shorter run can reach, of which this is the hash then; default: those of this run.

        Not of the task's source: a run that goes on may have another reward, or another comment."""
        digest = hashlib.sha256(digest_of(self.task.name, self.size).encode())
        for prompt in self.prompts[:count]:
            digest.update(np.int64(len(prompt)).tobytes() + prompt.tobytes())
        return digest.hexdigest()

    def reward(self, example: int, *turns: str) -> float:
        """What an answer is worth; of an environment all answers and the replies, in turns. ValueError: the task fails
        to say, or says what is no number of at most 1e6."""
        try:
            reward = total(self.task.reward(as_played(self.task, self.task[example], turns), turns[-1]))
        except (Exception, SystemExit) as e:  # a user's class may do anything
            raise ValueError(f"{self.task.name} cannot reward an answer to problem {example}: {error_text(e)}") from e
        if not abs(reward) <= MAX_REWARD:
            raise ValueError(
                f"{self.task.name}: a reward must be finite and at most {MAX_REWARD:g}, got {reward:g} for problem "
                f"{example}"
            )
        return reward

    def _render(self, example: int) -> list[int]:
        try:
            prompt = self.tokenizer.render_for_completion(self.task[example])
        except (Exception, SystemExit) as e:
            told = str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}"
            raise ValueError(f"{self.task.name}, problem {example}: {told}") from e
        if len(prompt) > MAX_TOKENS:  # it would end in the middle of the problem
            raise ValueError(
                f"{self.task.name}, problem {example}: a prompt must have at most {MAX_TOKENS:,} tokens, this has more"
            )
        return np.asarray(prompt, np.int32)


def check_context(longest: int, max_new_tokens: int, sequence_len: int) -> None:
    """ValueError where the longest prompt does not fit with its answer."""
    context = 10 * sequence_len
    require(
        longest + max_new_tokens <= context,
        f"the longest prompt has {longest:,} tokens and --max-new-tokens={max_new_tokens} more may follow, but the "
        f"model's context ends at {context:,}",
    )
    if longest + max_new_tokens > sequence_len:
        print0(
            f"NOTE: prompts of up to {longest:,} tokens with --max-new-tokens={max_new_tokens} go beyond the "
            f"{sequence_len:,} tokens that the model was trained on"
        )
