"""Run models with torch and transformers, which the tests' own environment does not have: a process of its own.

ENVIRONMENT/bin/python tests/support/transformers_run.py CASE...

A case is a folder with a model in model/ and inputs.npz; what came out is written as outputs.npz beside:
ids_K -> logits_K; prompt_K and new_K -> tokens_K, the greedy text of at most so many tokens;
thorough -> results of all other ways to run the model, see `thorough`.
Where it has card.txt, the code of the model's README.md is run, with the model in place of the name in that file.
Where it has texts.json, ids of the texts and of the conversations in it are written as ids.json.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

torch.set_num_threads(1)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def continue_greedily(model, prompt, new, **options):
    """The new tokens alone."""
    ids = torch.tensor(np.atleast_2d(prompt).astype(np.int64))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": int(new)} | options
    return model.generate(ids, **options)[:, ids.shape[1] :].numpy()


def thorough(model, ids):
    """ids [1,T]; what must be logits [1,T,V] of one pass, and texts that must be equal."""
    T, found = ids.shape[1], {}
    whole = model(ids).logits
    cache, steps = DynamicCache(), []
    for begin, end in ((0, 1), (1, 9), *((t, t + 1) for t in range(9, T))):
        steps.append(model(ids[:, begin:end], past_key_values=cache).logits)
    found["stepped"] = torch.cat(steps, 1)
    cache.crop(-6)
    found["cropped"] = torch.cat([whole[:, : T - 6], model(ids[:, T - 6 :], past_key_values=cache).logits], 1)
    returned = model(ids[:, :5])
    rest = model(ids[:, 5:], past_key_values=getattr(returned, "cache", None) or returned.past_key_values)
    found["returned_cache"] = torch.cat([whole[:, :5], rest.logits], 1)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([torch.cat([padding, ids], 1), torch.cat([ids, ids[:, :4]], 1)])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    found["left_padded"] = model(padded, attention_mask=mask).logits[:1, 4:]
    found["kept"] = torch.cat([whole[:, :-3], model(ids, logits_to_keep=3).logits], 1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found["saved_again"] = load(folder)(ids).logits
    bfloat16 = load(model.config._name_or_path, dtype=torch.bfloat16)
    found["bfloat16"] = bfloat16(ids).logits.float()
    assert (model.dtype, bfloat16.dtype) == (torch.float32, torch.bfloat16)
    kinds = {name: str(p.dtype) for name, p in bfloat16.named_parameters()}
    found["float32_of_bfloat16"] = np.array([name for name, kind in kinds.items() if kind == "torch.float32"])
    loss = torch.nn.functional.cross_entropy(whole[0, :-1].double(), ids[0, 1:])
    found["loss"] = torch.stack([model(ids, labels=ids).loss.double(), loss])
    for name, options in {"sampled_beams": {"num_beams": 3}, "batch": {}}.items():
        prompts = ids[:, :8].repeat(2, 1)
        with_cache, without = (continue_greedily(model, prompts, 6, use_cache=use, **options) for use in (True, False))
        found[name] = np.stack([with_cache, without])
    masked = continue_greedily(model, padded[:, :12], 6, attention_mask=mask[:, :12], pad_token_id=0)[0]
    found["padded_text"] = np.stack([masked, continue_greedily(model, ids[:, :8], 6)[0]])
    return {f"thorough_{name}": np.asarray(value) for name, value in found.items()}


def texts_to_ids(folder, texts, conversations):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = []
    for messages in conversations:
        try:
            rendered.append(tokenizer.apply_chat_template(messages, return_dict=False))
        except Exception as e:
            rendered.append(type(e).__name__)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    decoded = [tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    prompt = prompt if isinstance(prompt, list) else prompt["input_ids"]
    return {"ids": ids, "decoded": decoded, "rendered": rendered, "prompt": prompt, "eos": tokenizer.eos_token_id}


@torch.no_grad()
def run(case):
    inputs, outputs = np.load(case / "inputs.npz"), {}
    model = load(case / "model")
    outputs["class"] = np.array(type(model).__name__)
    for name in inputs.files:
        kind, _, key = name.partition("_")
        if kind == "ids":
            outputs[f"logits_{key}"] = model(
                torch.tensor(inputs[name].astype(np.int64)), use_cache=False
            ).logits.numpy()
        elif kind == "prompt":
            outputs[f"tokens_{key}"] = continue_greedily(model, inputs[name], inputs[f"new_{key}"])[0]
        elif kind == "thorough":
            outputs |= thorough(model, torch.tensor(inputs[name].astype(np.int64)))
    np.savez(case / "outputs.npz", **outputs)
    if (case / "card.txt").exists():
        (code,) = re.findall(r"```python\n(.*?)```", (case / "model" / "README.md").read_text(), re.DOTALL)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code.replace((case / "card.txt").read_text(), str(case / "model")), {})
        (case / "said.txt").write_text(said.getvalue())
    if (case / "texts.json").exists():
        result = texts_to_ids(case / "model", **json.loads((case / "texts.json").read_text()))
        (case / "ids.json").write_text(json.dumps(result))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in sys.argv[1:]:
        run(Path(case))
