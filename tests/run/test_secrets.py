"""One rule for what is secret; one door to the terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.table import Table

from grace_rl.run.files import write_text
from grace_rl.run.printing import safe
from grace_rl.run.screen import Screen
from grace_rl.run.secrets import MASK, is_secret, masked, masked_text, masked_words, remember

SECRET = "s3cr3t-value-of-a-test"


@pytest.mark.parametrize(
    "name",
    ["hub_token", "push_to_hub_token", "HF_TOKEN", "token", "api_key", "OPENAI_API_KEY", "password"]
    + [
        "AWS_SECRET_ACCESS_KEY",
        "client_secret",
        "credentials",
        "headers.Authorization",
        "--api-key",
    ],
)
def test_secret_by_name(name: str) -> None:
    assert is_secret(name)
    assert SECRET not in str(masked({name: SECRET}))
    assert SECRET not in str(masked({name: [SECRET]}))
    assert SECRET not in str(masked({name: {"x": SECRET}}))


def test_nothing_of_trl_but_its_token_is_secret() -> None:
    import trl

    names = {
        field.name
        for config in (trl.GRPOConfig, trl.SFTConfig, trl.ModelConfig)
        for field in dataclasses.fields(config)
    }
    assert {name for name in names if is_secret(name)} == {"hub_token"}


def test_secret_by_type_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def get_secret_value(self) -> str:
            return SECRET + "2"

    assert masked([Hidden()]) == [MASK]
    assert SECRET not in masked_text(f"cannot log in with {SECRET}2")
    monkeypatch.setenv("MY_SERVICE_TOKEN", "from-the-environment")
    assert masked_text("x from-the-environment") == f"x {MASK}"
    assert masked_words(["--judge.api_key", SECRET]) == ["--judge.api_key", MASK]


def test_control_characters_and_secrets_do_not_pass_the_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    remember(SECRET)
    screen = Screen(force_terminal=False, width=100)
    table = Table(f"head \x1b[2J{SECRET}")
    table.add_row("cell \x1b]0;title\x07 \u202e")
    screen.print(table)
    screen.print(f"[red]{SECRET}\x9b31m", style="bold")
    shown = capsys.readouterr().out
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e")
    assert SECRET not in shown and "[red]" in shown
    assert safe("a\nb\tc") == "a\nb\tc"


def test_what_a_killed_writer_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    from grace_rl.run.files import whole_file

    with whole_file(tmp_path / "a.json") as unfinished:
        unfinished.write_text("1")
    dead = 2**22 + 1  # above any process number
    left = tmp_path / unfinished.name.replace(unfinished.name.split("-")[-1], f"{dead}.writing")
    left.write_text("half")
    alive = tmp_path / unfinished.name.replace(unfinished.name.split("-")[-1], "1.writing")
    alive.write_text("half")
    write_text(tmp_path / "a.json", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "a.json"]
