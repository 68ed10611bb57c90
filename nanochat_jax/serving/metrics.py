"""Counts of what a server has done, in the text form that Prometheus reads."""

import collections
from collections.abc import Callable


class Metrics:
    """Only the event loop's thread counts."""

    def __init__(self):
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()  # (path, status)
        self.prompt_tokens = self.completion_tokens = self.cancelled = 0
        self.first_tokens, self.first_token_seconds = 0, 0.0

    def text(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> str:
        """gauges: name -> (what it is, its value now)"""
        lines = ["# HELP nanochat_requests_total Answers to requests.", "# TYPE nanochat_requests_total counter"]
        lines += [
            f'nanochat_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        for name, what, value in (
            ("prompt_tokens_total", "Tokens of prompts that were continued.", self.prompt_tokens),
            ("completion_tokens_total", "Tokens that were generated.", self.completion_tokens),
            ("cancelled_total", "Requests whose client has gone away.", self.cancelled),
            ("first_token_seconds_count", "Requests with a first token.", self.first_tokens),
            ("first_token_seconds_sum", "Seconds from requests to their first tokens.", self.first_token_seconds),
        ):
            lines += _lines(name, what, "counter", value)
        for name, (what, value) in gauges.items():
            lines += _lines(name, what, "gauge", value())
        return "\n".join(lines) + "\n"


def _lines(name: str, what: str, kind: str, value: float) -> list[str]:
    return [f"# HELP nanochat_{name} {what}", f"# TYPE nanochat_{name} {kind}", f"nanochat_{name} {value:.10g}"]
