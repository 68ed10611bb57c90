"""README.md of a model's repository on the hub: what the model is, how it was trained, what was measured, how it runs.

Everything comes from the metadata and from what eval has kept. Of settings that name files only names are told, never
where they lie on the machine that trained.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from nanochat_jax.cli.settings import DATA, LENGTH, OPTIMIZATION, flag, holds_paths
from nanochat_jax.data.shards import CLIMBMIX
from nanochat_jax.flags.base import BaseConfig
from nanochat_jax.flags.rl import RLConfig
from nanochat_jax.flags.sft import SFTConfig
from nanochat_jax.tasks.arc import ARC
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.smoltalk import SmolTalk

MEASURED = {  # field of the metadata -> its name in a table
    "val_bpb": "validation bits per byte",
    "core_metric": "CORE",
    "chatcore": "ChatCORE",
    "pass@1": "pass@1",
}
STAGES = {  # -> (what the model is, its settings)
    "base": ("base model, which goes on with a text", BaseConfig),
    "mid": ("chat model (mid-training)", SFTConfig),
    "sft": ("chat model (supervised fine-tuning)", SFTConfig),
    "rl": ("chat model (reinforcement learning)", RLConfig),
}
ON_HUB = {"GSM8K": GSM8K, "MMLU": MMLU, "HumanEval": HumanEval, "ARC-Easy": ARC, "ARC-Challenge": ARC}
MIXTURE = {"smoltalk_epochs": SmolTalk, "mmlu_epochs": MMLU, "gsm8k_epochs": GSM8K}
RUN_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
RUN_BASE = """\
inputs = tokenizer("<|bos|>The sky is blue because", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a card says of a model."""

    name: str  # OWNER/NAME on the hub, or the folder's name
    stage: str  # of STAGES
    step: int
    parameters: int
    sizes: Mapping[str, int]  # n_layer, n_embd, n_head, n_kv_head, sequence_len, vocab_size
    meta: Mapping[str, Any]  # the checkpoint's
    evaluated: Mapping[str, float]  # task -> share of right answers
    own_code: bool  # whether the folder holds code of the network, which a user must trust


def model_card(model: Described) -> str:
    """The text of README.md, with front matter that the hub reads."""
    settings = model.meta.get("user_config")
    settings = settings if isinstance(settings, dict) else {}
    what, stage_settings = STAGES[model.stage]
    sizes, total = model.sizes, model.meta.get("total_steps")
    facts = {
        "stage": what,
        "parameters": f"{model.parameters:,}",
        "network": f"{sizes['n_layer']} layers of width {sizes['n_embd']}, {sizes['n_head']} heads "
        f"({sizes['n_kv_head']} of keys and values)",
        "context": f"{sizes['sequence_len']:,} tokens",
        "vocabulary": f"{sizes['vocab_size']:,} tokens",
        "steps": f"{model.step:,}" + (f" of {total:,}" if isinstance(total, int) and total > model.step else ""),
    }
    results = {words: f"{value:.4f}" for name, words in MEASURED.items() if _is_number(value := model.meta.get(name))}
    results |= {task: f"{share:.1%}" for task, share in model.evaluated.items()}
    parts = [
        f"---\n{_front_matter(model, settings)}---",
        f"# {model.name.rpartition('/')[2]}",
        "Trained with nanochat's recipe and written by nanochat_jax for the transformers library.",
        _table("model", facts),
        f"## How it runs\n\n```python\n{_run(model)}\n```",
        "A special token's name inside a text, such as `<|bos|>`, becomes that token: take it out of what users type. "
        "Nothing runs the Python that an answer may hold between `<|python_start|>` and `<|python_end|>`.",
    ]
    if results:
        parts.append("## Results\n\n" + _table("measured", results))
    if shown := _settings_of(stage_settings, settings):
        parts.append("## How it was trained\n\n" + _table("setting", shown))
    return "\n\n".join(parts) + "\n"


def _front_matter(model: Described, settings: Mapping[str, Any]) -> str:
    """YAML for the hub: how the model is loaded and found, its datasets and its results on those of the hub."""
    from huggingface_hub import EvalResult, ModelCardData  # its import takes 0.2 seconds

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=ON_HUB[task].repo,
            dataset_name=task,
            metric_type="accuracy",
            metric_value=round(share, 4),
        )
        for task, share in model.evaluated.items()
        if task in ON_HUB
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanochat", "nanochat_jax", *(["conversational"] if model.stage != "base" else [])],
        datasets=_datasets(model.stage, settings) or None,
        model_name=model.name.rpartition("/")[2],
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def _datasets(stage: str, settings: Mapping[str, Any]) -> list[str]:
    """Those of the hub that the stage was trained on, as far as its settings tell."""
    if stage == "base":  # the metadata of nanochat's own models of 2025 look the same but for such a field
        return [CLIMBMIX] if "data_dir" in settings and settings["data_dir"] is None else []
    if stage == "rl":
        return [GSM8K.repo] if str(settings.get("task")).lower() == "gsm8k" else []
    custom = settings.get("custom_json")
    files = [str(file) for file in custom] if isinstance(custom, list) else []
    named = [file.removeprefix("hub:").partition(":")[0] for file in files if file.startswith("hub:")]
    return list(dict.fromkeys([task.repo for name, task in MIXTURE.items() if settings.get(name)] + named))


def _run(model: Described) -> str:
    trust = ", trust_remote_code=True" if model.own_code else ""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{model.name}")',
            f'model = AutoModelForCausalLM.from_pretrained("{model.name}"{trust})',
            RUN_BASE if model.stage == "base" else RUN_CHAT,
        ]
    )


def _settings_of(kind: type, settings: Mapping[str, Any]) -> dict[str, str]:
    """The recorded settings about data, lengths and rates, as flags of the stage's command."""
    shown = {}
    for field in dataclasses.fields(kind):
        value = settings.get(field.name)
        if field.metadata.get("group") in (DATA, LENGTH, OPTIMIZATION) and value not in (None, [], ""):
            values = value if isinstance(value, list) else [value]
            is_path = holds_paths(field.type)
            shown[f"`{flag(field.name)}`"] = ", ".join(_name(str(one)) if is_path else str(one) for one in values)
    return shown


def _name(path: str) -> str:
    return path if path.startswith("hub:") else PurePath(path).name


def _table(head: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {' '.join(value.split()).replace('|', '&#124;')[:300]} |" for name, value in rows.items()]
    return "\n".join([f"| {head} | |", "| --- | --- |", *lines])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
