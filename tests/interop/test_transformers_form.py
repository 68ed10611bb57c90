"""What we write for transformers computes what our network does, in that library itself, and is read back as it was.

Run: python -m pytest tests/interop/test_transformers_form.py
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nanochat_jax.checkpoints import find, store
from nanochat_jax.distributed.sharding import flatten_by_path
from nanochat_jax.files.plain_pickle import Refused
from nanochat_jax.files.safetensors_read import INDEX, read_safetensors, read_shards
from nanochat_jax.files.safetensors_write import write_safetensors, write_shards
from nanochat_jax.files.torch_write import Tensor
from nanochat_jax.interop import transformers_model
from nanochat_jax.interop.nanochat_model import ERAS
from nanochat_jax.nanochat_export import describe, export_for_transformers
from nanochat_jax.tokenizer import BadConversation
from tests.golden.models import built
from tests.support import tiny
from tests.support.compare import needs_transformers, run_transformers
from tests.support.models import random_params, tiny_config

SIZES = {"vocab_size": 265, "padded_vocab": 320}
NETWORKS = {
    "everything": tiny_config(**SIZES),
    "smear_only": tiny_config(
        **SIZES, residual_lambdas=False, value_embed_scale=0.0, backout=False, windows=(-1, 5, 64), logit_cap=20.0
    ),
    "no_smear": tiny_config(
        **SIZES, smear=False, value_embed_scale=2.0, value_gate_channels=32, n_layer=2, windows=(9, 9), qk_scale=1.15
    ),
    "one_layer": tiny_config(**SIZES, n_layer=1, windows=(3,), rope_base=10_000.0, n_kv_head=1),
    "of_2025": tiny_config(**SIZES, **ERAS["A"].fields | {"rope_base": 500.0}, windows=(-1,) * 3, logit_cap=30.0),
}
TEXTS = ["Hello <|bos|> world", "naïve 你好 🚀\n\n  12345", "", "don't  stop\t\r\n  now"]
PARTS = [{"type": "text", "text": "So "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
CONVERSATIONS = [
    [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}],
    [{"role": "system", "content": "be  kind"}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": PARTS}, {"role": "user", "content": " y "}],
    [{"role": "assistant", "content": "c"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image", "text": "y"}]}],
    [{"role": "tool", "content": "x"}],
]
every_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder for each network: <name>/model as it is exported, <name>/base where it was found."""
    root = tmp_path_factory.mktemp("networks")
    for name, model in NETWORKS.items():
        write_base(root / name / "base", model)
        export(root / name / "base", root / name / "model")
    return root


def write_base(base, model):
    tokenizer = tiny.tokenizer()
    tokenizer.save(base / "tokenizer")
    meta = {"model_config": dataclasses.asdict(model), "user_config": {}, "tokenizer": tokenizer.digest()}
    store.write(base / "base_checkpoints/d/1", flatten_by_path(random_params(model)), None, meta)


def export(base, folder, dtype="float32"):
    found = find.find_model("base", base=base)
    card = dataclasses.replace(describe(found, "me/model"), stage="sft" if "everything" in str(base) else "base")
    export_for_transformers(found, tiny.tokenizer(), folder, dtype, card, log=lambda line: None)


def ours(folder):
    """(config, parameters) of the model that was exported."""
    return find.load_params(find.find_model("base", base=folder / "base"))[:2]


def rows(model, B=2, T=60):
    return np.random.default_rng(0).integers(0, model.vocab_size, (B, T), dtype=np.int32)


@pytest.fixture(scope="module")
def compared(exported):
    """Those folders with what transformers computes."""
    for name, model in NETWORKS.items():
        extra = {"thorough": rows(model, 1, 24)} if name in ("everything", "smear_only") else {}
        np.savez(exported / name / "inputs.npz", ids_x=rows(model), **extra)
        (exported / name / "card.txt").write_text("me/model")
    texts = {"texts": TEXTS, "conversations": CONVERSATIONS}
    (exported / "everything" / "texts.json").write_text(json.dumps(texts))
    run_transformers(*(exported / name for name in NETWORKS))
    return exported


# ------------------------------------------------------------------------------------------------------- read by us
@every_network
def test_a_network_of_any_kind_is_read_back_as_it_was(exported, name):
    (config, params), (want_config, want) = (
        transformers_model.read_model(exported / name / "model"),
        ours(exported / name),
    )
    library = name == "of_2025"  # its class has no place for the rows that pad the vocabulary
    assert config == (dataclasses.replace(want_config, padded_vocab=265) if library else want_config)
    got, want = flatten_by_path(params), flatten_by_path(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        padded = library and path in ("wte", "lm_head")
        assert np.array_equal(got[path], array[:265] if padded else array), path


def test_bfloat16_is_for_all_but_the_lambdas(exported, tmp_path):
    export(exported / "everything" / "base", tmp_path / "model", "bfloat16")
    tensors = read_shards(tmp_path / "model")
    assert {name.rpartition(".")[2] for name, t in tensors.items() if t.dtype == np.float32} == {
        *("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")
    }
    _, params = transformers_model.read_model(tmp_path / "model")
    exact = flatten_by_path(ours(exported / "everything")[1])
    for path, array in flatten_by_path(params).items():
        np.testing.assert_allclose(array, exact[path], rtol=2**-8)


def test_a_model_in_several_files_is_the_same_and_no_file_is_larger_than_it_must_be(tmp_path):
    model = NETWORKS["everything"]
    params = jax.tree.map(np.asarray, random_params(model))
    tensors = transformers_model.transformers_tensors(params, model, np.dtype(np.float32))
    fields = transformers_model.transformers_config(model, bos=256, eos=260, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_shards(tmp_path, tensors, shard_bytes=50_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[2].name == f"model-00003-of-{len(files):05d}.safetensors" and len(files) > 5
    for file in files:
        content = read_safetensors(file)
        assert len(content) == 1 or sum(array.nbytes for array in content.values()) <= 50_000
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in read_shards(tmp_path).values())
    config, again = transformers_model.read_model(tmp_path)
    assert config == model
    for path, array in flatten_by_path(params).items():
        assert np.array_equal(flatten_by_path(again)[path], array)


def test_a_safetensors_file_begins_with_its_length_and_is_aligned(tmp_path):
    tensors = {
        "b": Tensor((2, 3), np.dtype("f4"), [np.arange(3), np.arange(3, 6)]),
        "ä": Tensor((), np.dtype("i8"), [7]),
    }
    write_safetensors(tmp_path / "x", tensors)
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert header["b"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert header["ä"] == {"dtype": "I64", "shape": [], "data_offsets": [24, 32]}
    assert np.frombuffer(raw[8 + length :], "f4", 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert read_safetensors(tmp_path / "x")["ä"] == 7


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("windows", [7, -2, 40], "windows must be a list of distances"),
        ("windows", [7, -1], "windows needs one entry a layer, got 2"),
        ("windows", 7, "windows must be a list"),
        ("windows", [7, 1 << 60, 40], "windows must be a list"),
        ("windows", None, "windows must be a list"),
        ("smear", 1, "smear must be true or false, got 1"),
        ("padded_vocab_size", 200, "padded_vocab must be at least vocab_size"),
        ("padded_vocab_size", 1 << 40, "padded_vocab_size must be an integer from 1 to"),
        ("qk_scale", 0, "qk_scale must be a number above 0"),
        ("qk_scale", "1", "qk_scale must be a number"),
        ("rope_theta", 1e300, "rope_theta must be a number above 0 and below"),
        ("rms_norm_eps", 1e-6, "rms_norm_eps must be 1.19"),
        ("architectures", ["Another"], "architectures must be"),
        ("model_type", "llama", "model_type must be .nanochat. or .nanochat_jax."),
        ("sliding_window", 5, "fields this reader does not know.*sliding_window"),
        ("value_gate_channels", 100, "n_embd must be at least the 100 channels"),
    ],
)
def test_a_config_that_is_not_of_our_class_is_refused_by_its_field(field, value, match):
    fields = transformers_model.transformers_config(NETWORKS["everything"], bos=1, eos=2, dtype="float32")
    assert transformers_model.config_of(json.loads(json.dumps(fields))) == NETWORKS["everything"]
    with pytest.raises(Refused, match=match):
        transformers_model.config_of(json.loads(json.dumps(fields | {field: value})))


# ------------------------------------------------------------------------------------------------ read by transformers
@needs_transformers
@every_network
def test_transformers_computes_the_logits_of_our_network(compared, name):
    config, params = ours(compared / name)
    with np.load(compared / name / "outputs.npz") as got:
        assert got["class"] == ("NanoChatForCausalLM" if name == "of_2025" else "NanochatJaxForCausalLM")
        want = np.asarray(built(config, params)(rows(config)))
        assert got["logits_x"].shape == want.shape and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got["logits_x"], want, atol=2e-5, rtol=1e-4)


@needs_transformers
@pytest.mark.parametrize("name", ["everything", "smear_only"])
def test_a_cache_padding_beams_and_saving_again_change_nothing(compared, name):
    config, params = ours(compared / name)
    ids = rows(config, 1, 24)
    want = np.asarray(built(config, params)(ids))
    with np.load(compared / name / "outputs.npz") as got:
        for way in ("stepped", "cropped", "returned_cache", "left_padded", "kept", "saved_again"):
            np.testing.assert_allclose(got[f"thorough_{way}"], want, atol=2e-5, rtol=1e-4, err_msg=way)
        np.testing.assert_allclose(got["thorough_bfloat16"], want, atol=0.03 * np.abs(want).max())
        lambdas = {"resid_lambdas", "x0_lambdas"} if config.residual_lambdas else set()
        lambdas |= {"smear_lambda"} | ({"backout_lambda"} if config.backout else set())
        kept = {name.rpartition(".")[2] for name in got["thorough_float32_of_bfloat16"].tolist()}
        assert kept == lambdas
        for way in ("sampled_beams", "batch", "padded_text"):
            one, other = got[f"thorough_{way}"]
            assert np.array_equal(one, other), way
        np.testing.assert_allclose(*got["thorough_loss"], rtol=1e-5)


@needs_transformers
@every_network
def test_the_code_of_the_card_runs(compared, name):
    chat = (compared / name / "model" / "README.md").read_text().count("apply_chat_template")
    assert chat == (name == "everything") and (compared / name / "said.txt").read_text().strip()


@needs_transformers
def test_the_fast_tokenizer_and_the_template_give_our_ids(compared):
    found, tokenizer = json.loads((compared / "everything" / "ids.json").read_text()), tiny.tokenizer()
    assert found["eos"] == tokenizer.special("<|assistant_end|>")
    for text, ids, decoded in zip(TEXTS, found["ids"], found["decoded"]):
        before, _, after = text.partition("<|bos|>")
        special = [tokenizer.bos] if "<|bos|>" in text else []
        assert ids == tokenizer.encode(before) + special + tokenizer.encode(after) and decoded == text
    for messages, ids in zip(CONVERSATIONS, found["rendered"]):
        try:
            assert ids == tokenizer.render_conversation({"messages": messages})[0]
        except BadConversation:
            assert ids == "TemplateError"
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    assert found["prompt"] == tokenizer.render_for_completion({"messages": prompt})
