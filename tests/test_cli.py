"""The command line is thin: exit codes, plain messages, and no torch before it is needed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import yaml

from grace_rl.cli import main
from grace_rl.errors import UserError

SMALL = """\
model_name_or_path: scenes
dataset_name: scenes
dataset_rows: 8
rewards: [{name: contrastive}]
num_generations: 4
max_completion_length: 16
per_device_train_batch_size: 16
bf16: false
use_cpu: true
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return str(path)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "grace_rl", *arguments], capture_output=True, text=True, timeout=900
    )


def test_importing_the_command_line_loads_no_torch():
    code = (
        "import sys, grace_rl.cli, grace_rl.recipe; "
        "print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "set()"
    )


def test_help_names_the_verbs_and_how_to_find_keys():
    assert "train" in run("--help").stdout and "check" in run("--help").stdout
    assert "docs/recipes.md" in run("train", "--help").stdout


ASK = """\
source /dev/stdin
for words in "$@"; do
  COMP_WORDS=(grace-rl $words) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  _shtab_grace_rl
  echo "${COMPREPLY[*]}"
done
"""


def test_the_shell_completes_verbs_options_keys_and_files(tmp_path):
    pytest.importorskip("shtab", reason="needs shtab")
    (tmp_path / "file.yaml").touch()
    expected = {
        "ins": "inspect",
        "inspect --termi": "--terminal",
        "rewards new --kind con": "contrastive",
        "train --learning_rat": "--learning_rate",
        "train ./fi": "./file.yaml",
    }
    script = run("--print-completion", "bash").stdout
    told = subprocess.run(
        ["bash", "-c", ASK, "bash", *expected],
        input=script, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    for answer, line in zip(expected.values(), told.stdout.splitlines(), strict=True):
        assert answer in line.split(), told.stderr


def test_a_mistake_is_a_line_each_on_stderr_and_exit_code_2(recipe):
    result = run("train", recipe, "--lerning_rate", "1", "--beta", "0.1", "--max_steps", "many")
    assert result.returncode == 2 and result.stdout == ""
    assert "--lerning_rate: unknown key; did you mean learning_rate?" in result.stderr
    assert "--max_steps: must be a whole number" in result.stderr
    assert "--beta" not in result.stderr and "Traceback" not in result.stderr


def test_dry_run_prints_the_resolved_recipe_and_the_plan(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe, "--dry-run", "--beta", "0.1"]) == 0
    printed = capsys.readouterr().out
    tree = yaml.safe_load(printed)  # the plan is comments
    assert tree["beta"] == 0.1 and tree["output_dir"] == "runs/mine" and tree["roles"]
    assert "2 rows x 2 trained roles (query, positive)" in printed and "8 rows" in printed
    assert not (tmp_path / "runs").exists()


def test_check_reads_rows_and_rewards(recipe, capsys):
    assert main(["check", recipe]) == 0
    assert "in order" in capsys.readouterr().out
    assert main(["check", recipe, "--roles", "{text: {}}"]) == 2
    assert "has no 'text'" in capsys.readouterr().err


def test_interrupting_is_130(recipe, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("grace_rl.recipe.stages.load", interrupt)
    assert main(["check", recipe]) == 130


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_folder_is_a_line_on_stderr(number, tmp_path, monkeypatch, capsys):
    def write(path, text):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("grace_rl.run.files.write_text", write)
    assert main(["rewards", "new", str(tmp_path / "mine.py")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'mine.py'}: {os.strerror(number)}\n"


def test_wrong_usage_is_the_users_mistake():
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2


def test_what_is_left_is_our_bug_a_file_and_a_line(recipe, tmp_path, monkeypatch, capsys):
    secret = "a-secret-in-a-message"

    def fail(*_):
        raise RuntimeError(f"not possible, {secret}")

    monkeypatch.setenv("MY_API_KEY", secret)
    monkeypatch.setattr("grace_rl.recipe.stages.load", fail)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert main(["check", recipe]) == 1
    line = capsys.readouterr().err
    (file,) = tmp_path.glob("traceback-*.txt")
    assert line.count("\n") == 1 and str(file) in line and "RuntimeError" in line
    told = file.read_text(encoding="utf-8")
    assert "Traceback" in told and secret not in told + line


def test_a_message_reaches_the_terminal_without_control_characters(recipe, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("a.yaml:1: '\x1b]0;title\x07\u202e' is unknown")

    monkeypatch.setattr("grace_rl.recipe.stages.load", refuse)
    assert main(["check", recipe]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_sigterm_is_130_and_the_handler_is_given_back(recipe, monkeypatch):
    def end(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("grace_rl.recipe.stages.load", end)
    assert main(["check", recipe]) == 130
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_encoding_that_lacks_letters_changes_no_exit_code(tmp_path):
    (tmp_path / "a.yaml").write_text("\u00e4\u4e2d: 1\n", encoding="utf-8")
    for encoding in ("ascii", "utf-8"):
        result = subprocess.run(
            [sys.executable, "-m", "grace_rl", "train", str(tmp_path / "a.yaml"), "--dry-run"],
            capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        assert result.returncode == 2 and result.stderr and b"Traceback" not in result.stderr


def test_a_dry_run_shows_no_secret(recipe, capsys):
    secret = "hf_secret_of_a_dry_run"
    assert main(["train", recipe, "--dry-run", "--hub_token", secret]) == 0
    printed = capsys.readouterr()
    assert "hub_token" in printed.out and secret not in printed.out + printed.err


def test_a_masked_secret_must_be_given_again(recipe, tmp_path, capsys):
    kept = tmp_path / "kept.yaml"
    kept.write_text(SMALL + "hub_token: '********'\n", encoding="utf-8")
    assert main(["check", str(kept)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "hub_token" in one]
    assert line.startswith(f"{kept}:10: hub_token")


def test_a_reader_that_has_seen_enough_changes_no_exit_code(recipe):
    """As with `| head`: by plain prints and by tables, to stdout and to stderr."""
    for code, *words in ((0, "rewards", "list"), (0, "train", recipe, "--dry-run"), (2, "check")):
        reader, writer = os.pipe()
        os.close(reader)
        told = subprocess.run(
            [sys.executable, "-m", "grace_rl", *words], stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        assert told.returncode == code, told.stderr
        assert b"Traceback" not in told.stderr and b"BrokenPipe" not in told.stderr


def test_a_verb_that_is_none_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspct", "runs/x"])
    assert ended.value.code == 2 and "did you mean inspect?" in capsys.readouterr().err
