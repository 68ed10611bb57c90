"""docs/notebook.ipynb: its cells run one after the other, on a tiny model, and it is kept without what they print."""

import contextlib
import io
import json
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from nanochat_jax.inference.chat_model import ChatModel
from nanochat_jax.inference.sampling import SamplingParams
from nanochat_jax.train.metrics import MetricsLog
from tests.support import tiny
from tests.test_docs import ROOT, anchors

NOTEBOOK = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the cells leave behind, and under "printed" what they print."""
    base = tmp_path_factory.mktemp("base")
    tiny.write_base(base)
    folder = shutil.move(base / "base_checkpoints", base / "chatsft_checkpoints") / "d2"
    with MetricsLog(folder, "dummy", {}, project="test", resumed_at=None) as log:
        log.log(0, val_bpb=3.0, measured="validation")
        for step in range(1, 8):
            log.log(step, loss=3 / step, grad_norm=1.0)
    names = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setattr(ChatModel.answer, "__defaults__", (SamplingParams(0.0, 0, 32),))  # 256 take long to compile
        plt.switch_backend("agg")
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
    yield names | {"printed": printed.getvalue()}
    plt.close("all")


def test_the_cells_answer_score_and_draw(names):
    drawn = names["SamplingParams"](temperature=0.8, top_k=50, max_new_tokens=32)
    answer = names["chat"].answer(names["messages"], drawn, seed=1)
    total = sum(score.logprob for score in names["scores"])
    assert names["printed"] == f"{answer}{total}\n" and answer
    assert [len(group) for group in names["groups"]] == [4, 4]
    assert [token for token, _ in names["scores"]] == ["4", "<|assistant_end|>"]
    assert [record["step"] for record in names["steps"]] == list(range(1, 8)) and len(names["table"]) in (5, 7)
    loss, bits = (axes.lines[0].get_xydata() for axes in names["figure"].axes)
    np.testing.assert_allclose(loss, [(step, 3 / step) for step in range(1, 8)])
    assert bits.tolist() == [[0, 3]]
    assert names["logits"].shape == (1, len(names["chat"].prompt("What is 2+2?")), names["tokenizer"].vocab_size)


def test_the_notebook_is_kept_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and "widgets" not in NOTEBOOK["metadata"]
    assert [cell["id"] for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_links_of_the_notebook_lead_to_a_heading():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    (target,) = re.findall(r"\]\(([^)\s]+)\)", text)
    page, _, anchor = target.partition("#")
    assert anchor in anchors((ROOT / "docs" / page).read_text(encoding="utf-8"))
