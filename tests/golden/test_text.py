"""Everything made of text: the golden lines, exactly. A failure names the line."""

import copy
import functools

import numpy as np
import pytest

from nanochat_jax.tasks import CustomJSON, SmolTalk, TaskMixture, TaskSequence
from nanochat_jax.tasks import hub as hub_module
from nanochat_jax.tasks.gsm8k import GSM8K, answer_parts, final_answer
from nanochat_jax.tasks.mmlu import MMLU
from nanochat_jax.tasks.multiple_choice import choice_conversation, is_right
from nanochat_jax.tasks.task import Task
from nanochat_jax.tokenizer import Tokenizer

from . import data


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer.load(data.path(f"checkpoints/{name}/tokenizer"))


def lines(relative: str):
    """(where, line) of a .jsonl file; `where` is what a failure says."""
    return [(f"{relative} line {n}", row) for n, row in enumerate(data.rows(relative), start=1)]


def unmade(cls):
    """A task without its data: its methods that judge and convert need none."""
    return cls.__new__(cls)


def test_vocabularies_texts_and_decoded_ids_are_those_of_nanochat():
    loaded = {}
    for where, row in lines("tokenizer.jsonl"):
        name = row["tokenizer"]
        tokenizer = loaded.setdefault(name, load(name))
        if "vocab_size" in row:
            assert tokenizer.vocab_size == row["vocab_size"], where
            assert tokenizer.special_tokens == row["special_tokens"], where
            assert tokenizer.bos == row["bos"], where
            assert tokenizer.pattern == row["pattern"], where
            assert len(tokenizer.mergeable_ranks) == row["n_mergeable"], where
            ranks = {token.hex(): i for token, i in tokenizer.mergeable_ranks.items()}
            by_id = row["token_bytes_hex"]
            for i, token in by_id.items() if isinstance(by_id, dict) else enumerate(by_id):
                if int(i) < row["n_mergeable"]:
                    assert ranks[token] == int(i), (where, i)
        if "text" in row:
            assert tokenizer.encode(row["text"]) == row["ids"], where
        if "decode_ids" in row:
            assert tokenizer.decode(row["decode_ids"]) == row["decoded"], where


def test_token_bytes_are_those_of_the_file_by_the_rule_of_its_era():
    for where, row in lines("tokenizer.jsonl"):
        if "token_bytes_file" not in row:
            continue
        tokenizer = load(row["tokenizer"])
        ours = tokenizer.token_bytes()
        assert ours.dtype == np.int32, where
        old_rule = ours.copy()  # before 2026-07-03 a token was decoded first: bytes that are not UTF-8 count as U+FFFD
        for i in range(len(tokenizer.mergeable_ranks)):
            old_rule[i] = len(tokenizer.decode([i]).encode())
        assert row["token_bytes_file"] in (ours.tolist(), old_rule.tolist()), where


def test_every_checkpoint_has_a_tokenizer_that_survives_saving(tmp_path):
    for name in data.tokenizers():
        tokenizer = load(name)
        tokenizer.save(tmp_path / name)
        assert Tokenizer.load(tmp_path / name).digest() == tokenizer.digest(), name


def refusal(call, *args) -> str | None:
    """The message of the ValueError that call(*args) raises; None where it raises none."""
    try:
        call(*args)
    except ValueError as e:
        return str(e)
    return None


def limit(row) -> dict:
    return {} if row.get("max_tokens") is None else {"max_tokens": row["max_tokens"]}


def test_conversations_render_to_the_same_ids_and_masks():
    for where, row in lines("render.jsonl"):
        if "error" in row:
            continue
        tokenizer, conversation = load(row["tokenizer"]), row["conversation"]
        before = copy.deepcopy(conversation)
        assert tokenizer.render_conversation(conversation, **limit(row)) == (row["ids"], row["mask"]), where
        if row["completion_ids"] is not None:
            assert tokenizer.render_for_completion(conversation) == row["completion_ids"], where
        else:
            with pytest.raises(ValueError, match="assistant"):
                tokenizer.render_for_completion(conversation)
        assert conversation == before, where


def test_a_batch_renders_to_the_same_ids_and_masks():
    batches = {}
    for where, row in lines("render.jsonl"):
        if "error" not in row:
            batches.setdefault((row["tokenizer"], row.get("max_tokens")), []).append((where, row))
    for (name, _), batch in batches.items():
        rendered = load(name).render_many([row["conversation"] for _, row in batch], **limit(batch[0][1]))
        assert len(rendered) == len(batch)
        for (where, row), (ids, mask) in zip(batch, rendered):
            assert ids.tolist() == row["ids"] and mask.tolist() == row["mask"], where
            assert ids.dtype == np.int32 and mask.dtype == np.uint8, where


def test_conversations_that_nanochat_refuses_are_refused():
    for where, row in lines("render.jsonl"):
        if "error" not in row:
            continue
        tokenizer, conversation = load(row["tokenizer"]), row["conversation"]
        calls = [
            (row["error"], tokenizer.render_conversation, conversation),
            (row["error"], tokenizer.render_many, [conversation]),
            (row["completion_error"], tokenizer.render_for_completion, conversation),
        ]
        for refused, render, argument in calls:
            if refused is None:
                render(argument)
                continue
            message = refusal(render, argument)
            assert message and "\n" not in message, f"{where}: {render.__name__}"


def test_gsm8k_conversations_answers_and_rewards():
    task, found = unmade(GSM8K), lines("gsm8k_eval.jsonl")
    rendered = [row["conversation"] for _, row in found if row["kind"] == "render"]  # a row's number is its place here
    for where, row in found:
        if row["kind"] == "render":
            assert task.conversation(row) == row["conversation"], where
            assert answer_parts(row["answer"]) == row["conversation"]["messages"][1]["content"], where
        else:
            conversation = rendered[row["row"]]
            reference = conversation["messages"][1]["content"][-1]["text"]
            assert final_answer(reference) == row["reference_extracted"], where
            assert final_answer(row["completion"]) == row["predicted_extracted"], where
            assert task.evaluate(conversation, row["completion"]) == row["evaluate"], where
            reward = task.reward(conversation, row["completion"])
            assert isinstance(reward, float) and reward == row["reward"], where


def test_multiple_choice_conversations_prompts_and_letters():
    mmlu = unmade(MMLU)
    for where, row in lines("multiple_choice.jsonl"):
        if "row" not in row:
            continue
        if row["task"] == "mmlu":
            conversation = mmlu.conversation(row["row"])
        else:
            choices = row["row"]["choices"]
            conversation = choice_conversation(
                row["row"]["question"], choices["text"], choices["label"], row["row"]["answerKey"]
            )
        assert conversation == row["conversation"], where
        for name in [key for key in row if key.startswith("completion_ids_")]:  # completion_ids_c1: by tokenizer c1_...
            prefix = name.removeprefix("completion_ids_")
            for checkpoint in [c for c in data.tokenizers() if c.split("_")[0] == prefix]:
                assert load(checkpoint).render_for_completion(conversation) == row[name], where
        for letter, expected in row["evaluate"].items():
            assert mmlu.evaluate(conversation, letter) == expected, (where, letter)


def test_letters_that_are_no_choice_are_refused():
    found = lines("multiple_choice.jsonl")
    asked = [(row["task"], row["conversation"]) for _, row in found if "row" in row]
    for where, row in found:
        if "row" in row:
            continue
        for task, conversation in asked:
            if row["task"] == f"{task}_bad_letter" and row["response"] not in conversation["letters"]:
                message = refusal(is_right, conversation, row["response"])
                assert message and "must be one of" in message, where


def test_smoltalk_accepts_and_refuses_the_same_message_lists():
    task = unmade(SmolTalk)
    for where, row in lines("smoltalk_accept.jsonl"):
        if row["accepted"]:
            assert task.conversation({"messages": row["messages"]}) == {"messages": row["messages"]}, where
        else:
            assert refusal(task.conversation, {"messages": row["messages"]}), where


def test_custom_json_accepts_and_refuses_the_same_files(tmp_path):
    """Files that nanochat refuses and that are deliberately taken here are in tests/tasks/test_custom_json.py."""
    path = tmp_path / "conversations.jsonl"
    taken = []
    for where, row in lines("customjson.jsonl"):
        if row.get("missing_file"):  # nanochat goes on without the file: we stop, deliberately
            with pytest.raises(FileNotFoundError):
                CustomJSON(tmp_path / "missing.jsonl", log=lambda text: None)
            continue
        path.write_bytes(row["file_text"].encode())
        message = refusal(functools.partial(CustomJSON, allow_empty=True), path)
        if row["accepted"]:
            task = CustomJSON(path, allow_empty=True)
            assert len(task) == row["num_conversations"], where
            assert [task[i] for i in range(len(task))] == row["conversations"], where
        elif message is None:
            taken.append(row["file_text"])
    system, of_object, array, mark = taken
    assert system.startswith('[{"role": "system"') and of_object.startswith('{"messages"')
    assert array.startswith("[[") and mark.startswith("\ufeff")


class Numbered(Task):
    """`size` conversations that are their own number."""

    def __init__(self, size, **slice_):
        super().__init__(**slice_)
        self.size = size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return index


def test_mixtures_and_sequences_have_the_same_order():
    for n, case in enumerate(data.load_json("mixture.json")["mixtures"]):
        tasks = [Numbered(length) for length in case["lengths"]]
        mixture, sequence = TaskMixture(tasks), TaskSequence(tasks)
        assert mixture.pairs.tolist() == case["mixture_order"], n
        assert sequence.pairs.tolist() == case["sequence_order"], n
        assert mixture.pairs.dtype == np.int32
        assert [mixture[i] for i in range(len(mixture))] == [index for _, index in case["mixture_order"]], n


def test_slices_have_the_same_length_and_indices():
    for n, case in enumerate(data.load_json("mixture.json")["slices"]):
        slice_ = {key: case[key] for key in ("start", "stop", "step")}
        as_nanochat = Numbered(case["num_examples"], **slice_, clip=False)
        assert len(as_nanochat) == case["len"], n
        assert [as_nanochat.source_index(i) for i in range(len(as_nanochat))] == case["indices"], n
        clipped = Numbered(case["num_examples"], **slice_)
        inside = [i for i in case["indices"] if i < case["num_examples"]]
        assert [clipped[i] for i in range(len(clipped))] == inside, n


def test_datasets_are_permuted_the_same_way():
    for size, expected in data.load_json("mixture.json")["dataset_shuffle_seed42_order"].items():
        order = np.random.default_rng(hub_module.SHUFFLE_SEED).permutation(int(size))
        assert order.tolist() == expected, size


def test_the_mirror_of_the_fine_tuning_runs_reads_from_end_to_end():
    mirror, tokenizer = data.path("sft_run/task_data"), load(data.tokenizers()[0])
    for make in (SmolTalk, GSM8K, MMLU):
        for split in ("train", "test"):
            task = make(split, data_dir=mirror)
            rendered = tokenizer.render_many([task[i] for i in range(min(len(task), 100))])
            assert rendered and all(ids[0] == tokenizer.bos and mask.any() for ids, mask in rendered), (make, split)
