"""Settings of a stage: flag > file > checkpoint > default, and what is refused with which sentence."""

import dataclasses
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_jax import base, rl, sft
from nanochat_jax.cli import main as cli_main
from nanochat_jax.cli import settings
from nanochat_jax.cli.command_line import parse
from nanochat_jax.cli.settings import Maybe, at_least, between, check_bounds, one_of, setting
from nanochat_jax.flags.stage import StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(StageConfig):
    """A stage."""

    steps: int = setting(10, "number of steps", at_least(1, "at least 1, or -1", also=-1))
    matrix_lr: Maybe[float] = setting(None, "rate of matrices; default: inherited", between(0, 1000), inherited=0.9)
    tag: Maybe[str] = setting(None, "name", inherited="fallback")
    mask: bool = setting(True, "documents apart")
    files: tuple[Path, ...] = setting((), "data")
    load: int = setting(1, "1 or 0", one_of(0, 1))


def parsed(*argv):
    return parse(Settings, list(argv), prog="stage")


def toml(folder, text):
    path = folder / "preset.toml"
    path.write_text(text)
    return f"--config={path}"


def refused(*argv, capsys=None):
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code != 0
    return str(stop.value.code) if isinstance(stop.value.code, str) else "".join(capsys.readouterr())


def test_without_flags_everything_is_the_default_and_nothing_is_given():
    assert parsed() == Settings()
    assert parsed().given == frozenset()


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = toml(tmp_path, 'steps = 20\nmatrix-lr = 0.5\ntag = "from file"\nmask = false')
    cfg = parsed(file, "--steps", "30")
    assert (cfg.steps, cfg.matrix_lr, cfg.tag, cfg.mask) == (30, 0.5, "from file", False)
    assert cfg.given == {"config", "steps", "matrix_lr", "tag", "mask"}
    assert parsed("--steps=30", file) == cfg  # also where the flag comes first
    assert parsed("--mask", file).mask is True


def test_the_four_levels_of_precedence_in_one_run(tmp_path):
    said = []
    recorded = {"matrix_lr": 0.1, "steps": 5, "load": 3}
    assert settings.inherit(parsed(), recorded, "the base model", said.append).matrix_lr == 0.1
    file = toml(tmp_path, "matrix_lr = 0.2")
    assert settings.inherit(parsed(file), recorded, "the base model", said.append).matrix_lr == 0.2
    cfg = settings.inherit(parsed(file, "--matrix-lr", "0.3"), recorded, "the base model", said.append)
    assert (cfg.matrix_lr, cfg.tag, cfg.steps) == (0.3, "fallback", 10)  # steps are not inherited
    assert said == [
        "Inherited from the base model: matrix_lr 0.1",
        "Using the default of what the base model does not record: tag fallback",
        "NOTE: --matrix-lr=0.2 overrides the 0.1 that the base model was trained with",
        "Using the default of what the base model does not record: tag fallback",
        "NOTE: --matrix-lr=0.3 overrides the 0.1 that the base model was trained with",
        "Using the default of what the base model does not record: tag fallback",
    ]
    said.clear()
    assert settings.inherit(parsed("--matrix-lr=0.1", "--tag=a"), recorded, "it", said.append).matrix_lr == 0.1
    assert said == []
    assert settings.inherit(parsed(), {"matrix_lr": 0.1, "tag": "b"}, "it", said.append).tag == "b"
    assert said == ["Inherited from it: matrix_lr 0.1, tag b"]  # one line


@pytest.mark.parametrize("recorded", [None, "0.1", [0.1], {}, True])
def test_a_recorded_value_that_is_no_number_does_not_count(recorded):
    assert settings.inherit(parsed(), {"matrix_lr": recorded}, "it", str).matrix_lr == 0.9


def test_underscores_and_dashes_are_the_same_in_flags_and_files(tmp_path):
    assert parsed("--matrix_lr", "2").matrix_lr == parsed(toml(tmp_path, "matrix-lr = 2")).matrix_lr == 2.0
    assert parsed(toml(tmp_path, "matrix_lr = 3"), "--matrix-lr", "4").matrix_lr == 4.0


def test_a_repeated_flag_and_a_list_in_the_file_give_several_values_and_flags_replace_lists(tmp_path):
    two = (Path("a b"), Path("c"))
    assert parsed("--files", "a b", "--files", "c").files == two
    file = toml(tmp_path, 'files = ["a b", "c"]')
    assert parsed(file).files == two
    assert parsed(file, "--files", "d").files == (Path("d"),)
    assert parsed(toml(tmp_path, 'files = "one"')).files == (Path("one"),)


def test_booleans_have_a_flag_to_switch_them_off_and_zero_is_not_none(tmp_path):
    assert parsed("--no-mask").mask is False
    assert parsed(toml(tmp_path, "mask = false\nload = 0")).mask is False
    assert parsed(toml(tmp_path, "load = false")).load == 0
    cfg = settings.inherit(parsed("--matrix-lr", "0"), {"matrix_lr": 0.1}, "it", str)
    assert cfg.matrix_lr == 0.0


def test_text_in_a_file_may_look_like_a_flag_or_a_number(tmp_path):
    assert parsed(toml(tmp_path, 'tag = "--steps=3"')).tag == "--steps=3"
    assert parsed(toml(tmp_path, 'tag = "7"\nsteps = -1')) == Settings(
        tag="7", steps=-1, config=tmp_path / "preset.toml"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = ", "must be a readable TOML file"),
        ("stepps = 3", "stepps is not a flag of this stage; did you mean steps?"),
        ("qqq = 3", "qqq is not a flag of this stage"),
        ('config = "other.toml"', "config is not a flag of this stage"),
        ("[optimizer]\nsteps = 3", "optimizer is not a flag"),
        ("[steps]\na = 3", "steps must be a plain value or a list of them"),
        ("files = [[1]]", "files must be a plain value or a list of them"),
        ("steps = [1, 2]", "steps must be one value, got [1, 2]"),
        (f"steps = {'[' * 100_000}", "must be a flat TOML file: it is nested too deeply"),
        ("mask = 1", "mask must be true or false, got 1"),
    ],
)
def test_a_file_that_does_not_work_is_refused_with_its_name(tmp_path, text, words):
    message = refused(toml(tmp_path, text))
    assert words in message and "preset.toml" in message


def test_a_missing_file_or_one_that_is_no_text_is_refused(tmp_path):
    assert refused(f"--config={tmp_path}/no.toml") == f"--config={tmp_path}/no.toml does not exist"
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "readable TOML" in refused("--config", f"{tmp_path}/bytes.toml")
    assert "readable TOML" in refused(f"--config={tmp_path}")


@pytest.mark.parametrize("argv", [["--stepps", "3"], ["--steps", "three"], ["--config"], ["--steps"], ["word"]])
def test_a_wrong_flag_is_refused_without_a_traceback(argv, capsys):
    assert "Traceback" not in refused(*argv, capsys=capsys)


def test_a_bad_value_in_a_file_is_refused_by_the_flags_name(tmp_path, capsys):
    assert "--steps" in refused(toml(tmp_path, "steps = 1.5"), capsys=capsys)


def test_help_shows_types_and_defaults_but_no_none(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert "number of steps (default: 10)" in text
    assert "--matrix-lr X" in text and "--load {0,1}" in text and "--preflight [SLICE]" in text
    assert "--mask, --no-mask" in text and "documents apart (default: on)" in text
    assert "None" not in text


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError, FloatingPointError, FileNotFoundError])
def test_what_goes_wrong_in_a_users_hands_is_a_sentence(error):
    def main(cfg):
        raise error("the sentence")

    with pytest.raises(SystemExit, match=r"^error: the sentence$"):
        cli_main.run_stage(main, None)


def test_the_exit_code_is_that_of_main_and_130_after_an_interrupt():
    def interrupted(cfg):
        raise KeyboardInterrupt

    for main, code in ((lambda cfg: 0, 0), (lambda cfg: 143, 143), (interrupted, 130)):
        with pytest.raises(SystemExit) as stop:
            cli_main.run_stage(main, None)
        assert stop.value.code == code


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_the_terminals_encoding_lacks_is_shown_as_its_number(encoding):
    main = "lambda text: print(text) or print(text, file=sys.stderr)"
    command = f"import sys; from nanochat_jax.cli.main import run_stage; run_stage({main}, '漢')"
    how = {"env": os.environ | {"PYTHONIOENCODING": encoding}, "capture_output": True, "check": False}
    done = subprocess.run([sys.executable, "-c", command], **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u6f22\n", b"\\u6f22\n")


def test_a_closed_stream_is_nothing_to_configure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        cli_main.run_stage(lambda cfg: 0, None)
    assert stop.value.code == 0


@pytest.mark.parametrize("argv", [["--files", ""], ["--files="], ["--files", "a", "--files", ""], ["--config", ""]])
def test_an_empty_path_is_not_the_working_directory(argv, capsys):
    said = refused(*argv, capsys=capsys)
    assert argv[-2 if not argv[-1] else 0].rstrip("=") in said and "a path must not be empty" in said


def test_an_empty_path_in_a_file_is_refused_and_a_dot_is_one(tmp_path, capsys):
    said = refused(toml(tmp_path, 'files = ""'), capsys=capsys)
    assert "--files" in said and "a path must not be empty" in said
    assert parsed("--files", ".", "--tag", "").files == (Path("."),)


def test_fields_of_paths_are_told_from_others():
    kinds = {field.name: settings.holds_paths(field.type) for field in dataclasses.fields(Settings)}
    assert [name for name, holds in kinds.items() if holds] == ["output_dir", "config", "files"]


def test_parsing_needs_no_jax():
    command = "import sys; import nanochat_jax.cli.settings; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device: free some space, or choose another",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied: free some space, or"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), "/x/y: No such file or directory"),
        (FileExistsError("--out mine must be a new folder"), "--out mine must be a new folder"),
    ],
)
def test_what_the_system_says_is_told_with_its_place_and_without_its_number(error, sentence):
    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli_main.run_stage(main, None)
    assert ended.value.code.startswith(f"error: {sentence}") and "Errno" not in ended.value.code


@pytest.mark.parametrize("stage", [base.BaseConfig, sft.SFTConfig, rl.RLConfig])
def test_every_flag_of_a_stage_has_help(stage):
    fields = [field for field in dataclasses.fields(stage) if field.name != "given"]
    assert len(fields) > 40
    assert [field.name for field in fields if not field.metadata.get("help")] == []


def test_a_value_out_of_its_bounds_is_named_with_what_must_hold():
    for argv, sentence in (
        (["--steps", "0"], "--steps must be at least 1, or -1, got 0"),
        (["--matrix-lr", "-0.1"], "--matrix-lr must be between 0 and 1000, got -0.1"),
        (["--matrix-lr", "nan"], "--matrix-lr must be between 0 and 1000, got nan"),
        (["--load", "2"], "--load must be 0 or 1, got 2"),
        (["--remat", "some"], "--remat must be auto, none, elementwise or block, got some"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            check_bounds(parsed(*argv))
    check_bounds(parsed("--steps", "-1", "--matrix-lr", "0"))  # bounds belong to them, and None is not checked
