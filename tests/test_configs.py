"""Every preset is a list of flags of its stage, fits its machine, and says how much memory it is estimated to take."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from nanochat_jax.cli.command_line import parse
from nanochat_jax.model.cost import kv_bytes_per_token, parameter_counts
from nanochat_jax.rollouts.pack import most_rows
from nanochat_jax.train.scaling_laws import REFERENCE_DEPTH, config_of_depth, recipe

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
MACHINES = {  # devices, and the memory of one in GB
    "laptop": (1, 8),
    "h100": (1, 80),
    "8xh100": (8, 80),
    "v5e8": (8, 16),
    "v6e8": (8, 32),
}
VOCAB = 32_768
PROMPT = 256  # tokens of a long GSM8K problem with such a vocabulary


def stage_of(file):
    """(settings class, devices, GB of one) by the file's name, such as sft_8xh100.toml."""
    stage, machine = file.stem.split("_")
    module = importlib.import_module(f"nanochat_jax.{stage}")
    name = {"base": "BaseConfig", "sft": "SFTConfig", "rl": "RLConfig"}[stage]
    return getattr(module, name), *MACHINES[machine]


def sizes(file, cfg):
    """(model, tokens in a row, rows per device, tokens per step); of SFT and RL for what the comment names."""
    depth = getattr(cfg, "depth", None) or int(re.search(r"depth (\d+)", file.read_text())[1])
    rows = re.search(r"rows of ([\d,]+) tokens", file.read_text().replace("\n# ", " "))
    T = int(rows[1].replace(",", "")) if rows else 2048
    T = getattr(cfg, "max_seq_len", None) or T
    model, reference = (
        config_of_depth(
            depth,
            aspect_ratio=getattr(cfg, "aspect_ratio", 64),
            head_dim=getattr(cfg, "head_dim", 128),
            window_pattern=getattr(cfg, "window_pattern", "SSSL"),
            max_seq_len=T,
            vocab_size=VOCAB,
        )
        for depth in (depth, REFERENCE_DEPTH)
    )
    if file.stem.startswith("rl"):
        most = most_rows(cfg.examples_per_step * cfg.num_samples, PROMPT + cfg.max_new_tokens, T)
        return model, T, cfg.device_batch_size, most * T
    inherited = recipe(model, reference, num_iterations=1).total_batch_size
    total = cfg.total_batch_size if (cfg.total_batch_size or -1) > 0 else inherited
    return model, T, cfg.device_batch_size, total


def estimated_gb(model, T: int, rows: int, total: int, devices: int, on_cpu: bool) -> float:
    """Memory of one device in GB, without what the compiler adds: float32 parameters, gradients (two where they are
    accumulated) and moments, split over the devices; activations of every layer, as nothing is computed twice; the
    scores of one block of queries; one chunk of logits. The last three with their gradients, in the compute type:
    float32 on a CPU, else bfloat16 (scores and logits are always float32)."""
    counts = parameter_counts(model)
    accumulated = total > rows * T * devices
    embeddings = counts["total"] - counts["matrices"]
    state = 4 * counts["total"] * (2 + accumulated) + 8 * embeddings + 4 * counts["matrices"]
    width = 4 if on_cpu else 2
    per_layer = 24  # numbers per token and channel: 6 of the stream and its norms, 5 q, k, v, 1 output, 12 in the mlp
    activations = rows * T * model.n_layer * per_layer * model.n_embd * width
    scores = 3 * 4 * rows * model.n_head * (T // 8) * T
    logits = 3 * 4 * (1 << (20 if on_cpu else 26))
    return (state / devices + activations + scores + logits) / 1e9


def estimated_rollout_gb(model, cfg, devices: int, on_cpu: bool) -> float:
    """Memory of one device in GB while RL's answers are generated, without what the compiler adds: parameters and
    moments, split over the devices; a whole copy of the parameters in the compute type; keys and values of all slots,
    twice, as they grow, and of their prompts, each shared by four as with held-out problems; logits, three times."""
    counts, dtype = parameter_counts(model), "float32" if on_cpu else "bfloat16"
    embeddings = counts["total"] - counts["matrices"]
    state = 4 * counts["total"] + 8 * embeddings + 4 * counts["matrices"]
    tokens = cfg.slots * (2 * (cfg.max_new_tokens + 32) + PROMPT / 4)  # 32: sizes are rounded up, and a call's tokens
    logits = 3 * 4 * cfg.slots * VOCAB
    copy = counts["total"] * (4 if on_cpu else 2)
    return ((state + tokens * kv_bytes_per_token(model, dtype) + logits) / devices + copy) / 1e9


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def preset(request):
    """(file, class, devices, GB of one, settings)"""
    cls, devices, memory = stage_of(request.param)
    return request.param, cls, devices, memory, parse(cls, ["--config", str(request.param)])


def test_there_is_a_preset_for_every_machine():
    stages = {"base", "sft", "rl"}
    assert {f"{stage}_{machine}" for stage in stages for machine in MACHINES} <= {file.stem for file in FILES}


def test_every_key_is_a_flag_and_says_something_else_than_the_default(preset):
    file, cls, _, _, cfg = preset
    defaults = {field.name: field.default for field in cls.__dataclass_fields__.values()}
    for key, value in tomllib.loads(file.read_text()).items():
        assert key == key.replace("_", "-"), "written as on the command line"
        name = key.replace("-", "_")
        assert getattr(cfg, name) == value and value != defaults[name], key


def test_the_batch_of_a_step_is_whole_passes(preset):
    file, _, devices, _, cfg = preset
    if file.stem.startswith("rl"):
        pytest.skip("RL fills up its passes with rows of padding")
    _, T, rows, total = sizes(file, cfg)
    assert total % (rows * T * devices) == 0


def test_the_estimated_memory_is_that_of_the_comment_and_leaves_room(preset):
    """0.7: XLA keeps copies that no formula knows, and JAX takes three quarters of a GPU's memory."""
    file, _, devices, memory, cfg = preset
    on_cpu, found = file.stem.endswith("laptop"), sizes(file, cfg)
    gb = estimated_gb(*found, devices, on_cpu)
    if file.stem.startswith("rl"):
        gb = max(gb, estimated_rollout_gb(found[0], cfg, devices, on_cpu))
    said = re.search(r"about ([\d.]+) GB [^.]*estimate, not measured", file.read_text().replace("\n# ", " "))
    assert said and float(said[1]) == round(gb, 1), f"the estimate is {gb:.1f} GB"
    assert gb <= 0.7 * memory
    assert f"python -m nanochat_jax.{file.stem.split('_')[0]} --config configs/{file.name}" in file.read_text()
