"""The table of named tasks: what a user may type, and what is made of it."""

import pytest

from nanochat_jax.tasks import registry
from nanochat_jax.tasks.registry import NAMES, TASKS, find_name, make_task


def test_a_name_is_found_in_any_case_and_by_its_alias():
    assert [find_name(name.swapcase()) for name in TASKS] == list(TASKS)
    assert find_name("spelling") == find_name("Spelling") == "SpellingBee"
    assert find_name("my_module:Class") == "my_module:Class"
    assert set(NAMES.values()) == set(TASKS)


def test_an_unknown_name_is_refused_with_the_flag_the_names_and_the_nearest():
    with pytest.raises(ValueError, match=r"^--task must name tasks among ARC-Easy, .*'gsm9k'; did you mean GSM8K\?"):
        make_task("gsm9k", flag="--task")
    with pytest.raises(ValueError, match=r"^-a must name tasks among .*, or module:Class, got ''$"):
        find_name("")


def test_a_made_up_task_has_the_size_that_is_asked_for_and_trains_on_other_problems_than_sft():
    assert [len(make_task("arithmetic", split, size)) for split in ("train", "test") for size in (None, 7)] == [
        *(registry.MADE_UP, 7, registry.MADE_UP, 7)
    ]
    assert make_task("arithmetic", "train").seed == 1 and make_task("arithmetic").seed == 0


def test_split_and_folder_reach_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "words_alpha.txt").write_text("\n".join(f"{a}{b}{c}" for a in "bcd" for b in "aeiou" for c in "lmnrst"))
    for name in ("spelling", "simplespelling"):
        task = make_task(name, "train", data_dir=tmp_path)
        assert (task.split, len(task)) == ("train", registry.MADE_UP)


def test_a_task_of_a_module_is_loaded_and_a_fault_names_the_flag():
    with pytest.raises(ValueError, match=r"^--eval-task no_such_module_here:X: cannot import"):
        make_task("no_such_module_here:X", "test", flag="--eval-task")


def test_humaneval_needs_a_guard_or_unsafe(monkeypatch):
    monkeypatch.setattr(registry.sandbox, "guard_fault", lambda: "nothing holds programs here")
    with pytest.raises(ValueError, match=r"^nothing holds programs here, so HumanEval.*--unsafe-exec"):
        make_task("HumanEval")
