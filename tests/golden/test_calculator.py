"""Every line of the calculator's golden file, but for those whose note says that the original is unsafe or odd."""

import pytest

from nanochat_jax.inference.calculator import calculate

from . import data


def test_results_are_those_of_nanochat():
    rows = [row for row in data.rows("calculator.jsonl") if "note" not in row]
    if not rows:
        pytest.skip("calculator.jsonl has no line without a note")
    wrong = [(r["expr"], r["result"], calculate(r["expr"])) for r in rows if calculate(r["expr"]) != r["result"]]
    assert wrong == []


def test_no_result_of_any_line_holds_an_address():
    for row in data.rows("calculator.jsonl"):
        assert "0x" not in (calculate(row["expr"]) or ""), row["expr"][:100]
