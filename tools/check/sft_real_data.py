"""Fine-tune a small base model on data that lies in ../shared: GSM8K, MMLU, spelling, arithmetic, and oasst1 threads as
custom JSON.

python tools/check/sft_real_data.py --out /tmp/real
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import tyro

ROOT = Path(__file__).resolve().parents[2]


def main(
    out: Path,
    checkpoint: Path = ROOT.parent / "shared/golden/checkpoints/c1_master",
    data: Path = ROOT.parent / "shared/data/hub",
    num_iterations: int = 300,
) -> None:
    """out: base directory to make (must not exist); checkpoint: nanochat base directory to start from; data: mirror."""
    shutil.copytree(checkpoint, out)
    for split in ("train", "test"):
        table = pq.read_table(data / "oasst1-en-threads/default" / split / "00000.parquet", columns=["messages"])
        lines = [json.dumps(messages, ensure_ascii=False) for messages in table["messages"].to_pylist()]
        (out / f"oasst1-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "nanochat_jax.sft", "--data-dir", data, "--smoltalk-epochs", 0, "--mmlu-epochs", 1),
        *("--gsm8k-epochs", 1, "--custom-json", out / "oasst1-train.jsonl", "--val-json", out / "oasst1-test.jsonl"),
        *("--device-batch-size", 8, "--total-batch-size", 4096, "--eval-every", 50, "--eval-tokens", 131072),
        *("--simple-spelling-rows", 2000, "--spelling-bee-rows", 1000, "--arithmetic-rows", 1000),
        *("--chatcore-every", -1, "--save-every", 100, "--num-iterations", num_iterations),
    ]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(out.absolute())}
    raise SystemExit(subprocess.run([str(part) for part in command], env=environment, cwd=ROOT).returncode)


if __name__ == "__main__":
    tyro.cli(main)
