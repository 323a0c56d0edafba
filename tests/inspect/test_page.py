"""The page in headless Chromium: every view on real runs, and on hostile rationales."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from grace_rl.inspect import Run
from grace_rl.reward import load_rewards
from grace_rl.reward.replay import replay, replay_table, write_replay
from grace_rl.run.checkpoints import mark_complete

pytestmark = pytest.mark.slow
WAIT = 60_000  # milliseconds; a model is loaded in some views

FITS = "document.documentElement.scrollWidth <= innerWidth"
LOOKS = [(w, scheme) for w in (1280, 390) for scheme in ("light", "dark")]


@contextmanager
def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page that fails the test for any console error and any request to elsewhere."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
    )
    page, problems = context.new_page(), []
    page.set_default_timeout(WAIT)
    here = urlsplit(address).netloc

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"{message.type}: {message.text}")

    def on_request(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.netloc != here and parts.scheme not in ("data", "blob"):
            problems.append(f"a request to {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("request", on_request)
    page.on("websocket", lambda socket: on_request(socket))
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    yield page
    assert page.evaluate("window.pwned") is None
    context.close()
    assert not problems


def settled(page: Any) -> None:
    page.wait_for_load_state("networkidle")
    assert page.evaluate(FITS), "scrolls sideways"


@pytest.fixture(scope="session")
def views(trained: list[Path]) -> dict[str, tuple[str, str]]:
    """Each view's address, and what shows that it is complete."""
    run = Run(trained[1])
    pairs = replay(run.path, load_rewards(["consistency"], "."))
    write_replay(run.path, "consistency", [replay_table(*pair) for pair in pairs])
    text = run.texts()["text"][0]
    best = run.group(3, int(run.groups(step=3)["group"][0])).iloc[0]
    return {
        "overview": ("/", "text=Spread of advantages over rollouts"),
        "rollouts": ("/rollouts", "table a >> nth=10"),
        "groups": ("/rollouts?run=second&show=groups", "table a >> nth=10"),
        "group": (f"/group?run=second&step=3&group={best['group']}", "article >> nth=7"),
        "rollout": (f"/rollout?run=second&step=3&row={best['row']}", "section table >> nth=1"),
        "texts": ("/training", "table a >> nth=3"),
        "training": (f"/training?text={quote(text)}", "del, ins"),
        "replays": ("/replays?run=second", "table a >> nth=3"),
        "no replays": ("/replays?run=first", "text=No replay is kept"),
        "try": (f"/try?text={quote(text)}&with=a+dog", "[data-side=b] table"),
    }


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_every_view(
    browser: Any, page_of_trained: str, views: dict, width: int, scheme: str, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("GRACE_RL_SCREENSHOTS", tmp_path))
    for name, (address, complete) in views.items():
        with opened(browser, page_of_trained, width, scheme) as page:
            page.goto(page_of_trained + address)
            page.locator(complete).first.wait_for()
            settled(page)
            dark = page.evaluate("document.body.classList.contains('body--dark')")
            assert dark == (scheme == "dark")
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)


def test_overview_shows_both_runs(browser: Any, page_of_trained: str) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(page_of_trained)
        assert page.locator("h2", has_text=re.compile("^(first|second)$")).count() == 2
        reward = page.locator("figure", has_text="Reward").first
        assert reward.locator("path").count() == 2
        assert page.locator("rect.healthy").count() >= 4


def test_a_rollout_has_its_curve_and_neighbours_before_and_after(
    browser: Any, page_of_trained: str, views: dict
) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(page_of_trained + views["rollout"][0])
        page.locator("section table").nth(1).wait_for()
        assert page.locator(".tokens span[title^=advantage]").count() >= 4
        assert page.locator("svg[aria-label='Score s_k of each prefix'] path").count() == 1
        titles = page.locator("section h3").all_inner_texts()
        assert titles[0].startswith("Before: by the text alone (checkpoint-3)")
        assert titles[1] == "After: by the rationale"


def test_training_keeps_the_advantage_of_every_token(trained: list[Path]) -> None:
    """With step-wise scores tokens differ; without, all have the rollout's."""
    names = ["advantage", "token_ids", "token_advantages", "step_ends", "step_scores"]
    plain, stepwise = (Run(path).rollouts(columns=names) for path in trained)
    assert plain["token_advantages"].isna().all() and plain["step_ends"].isna().all()
    rollouts = stepwise[stepwise["advantage"].notna()]
    assert len(rollouts) and stepwise[stepwise["advantage"].isna()]["step_ends"].isna().all()
    for row in rollouts.to_dict("records"):
        each = row["token_advantages"]
        assert len(each) == len(row["token_ids"]) == row["step_ends"][-1]
        assert sum(each) / len(each) == pytest.approx(row["advantage"], abs=1e-4)
        assert len(row["step_ends"]) == len(row["step_scores"])
    assert any(max(each) - min(each) > 0.1 for each in rollouts["token_advantages"])


def test_filters_act_in_place_and_their_address_can_be_shared(
    browser: Any, page_of_trained: str, trained: list[Path]
) -> None:
    run = Run(trained[0])
    expected = run.count(step=(2, 4), role="query", text="facts", score="tokens < 9")
    assert 0 < expected < run.count()
    with opened(browser, page_of_trained) as page:
        page.goto(f"{page_of_trained}/rollouts")
        page.get_by_text(f"{run.count():,} rollouts").wait_for()
        page.get_by_label("Step").fill("2-4")
        page.get_by_label("Text or rationale contains").fill("FACTS")
        page.get_by_label("Scores").fill("tokens < 9")
        page.get_by_label("Role").click()
        page.get_by_role("option", name="query").click()
        page.get_by_text(f"{expected:,} rollouts").wait_for()
        address = page.url
        with page.expect_download() as download:
            page.get_by_role("button", name="download first-rollouts as csv").click()
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8"))))
        assert len(rows) == expected and {row["role"] for row in rows} == {"query"}
        page.get_by_label("Scores").fill("nonsense")
        page.get_by_role("alert").wait_for()
    with opened(browser, page_of_trained) as page:
        page.goto(address)
        page.get_by_text(f"{expected:,} rollouts").wait_for()
        assert page.get_by_label("Step").input_value() == "2-4"


def test_a_page_after_the_last_is_the_last(browser: Any, page_of_trained: str) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(f"{page_of_trained}/rollouts?page=9999")
        assert page.locator("tbody tr").first.inner_text()
        page.goto(f"{page_of_trained}/rollouts?page={quote('²')}")
        page.get_by_text("page: must be a whole number").wait_for()


def test_pages_of_a_list_turn(browser: Any, page_of_trained: str, trained: list[Path]) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(f"{page_of_trained}/rollouts?sort=advantage&order=down")
        first = page.locator("tbody tr").first.inner_text()
        page.locator(".q-pagination").get_by_text("2", exact=True).click()
        page.wait_for_url("**page=2**")
        page.wait_for_function(
            "first => document.querySelector('tbody tr').innerText !== first", arg=first
        )


def test_the_keyboard_reaches_everything(browser: Any, page_of_trained: str) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(f"{page_of_trained}/rollouts")
        page.locator("table a").first.wait_for()
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    "(document.activeElement.getAttribute('aria-label') || "
                    "document.activeElement.innerText || '').trim()"
                )
            )
        wanted = {"to the content", "Overview", "Try it", "light or dark", "Step", "Role", "Order"}
        assert wanted <= set(reached)
        assert any(label.startswith("download") for label in reached)
        page.get_by_role("button", name="light or dark").focus()
        page.keyboard.press("Enter")
        page.wait_for_function("document.body.classList.contains('body--dark')")
        page.locator("table a").nth(1).focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/rollout?**")
        page.wait_for_function("document.body.classList.contains('body--dark')")  # remembered


def test_one_text_through_training_in_two_runs(
    browser: Any, page_of_trained: str, views: dict
) -> None:
    with opened(browser, page_of_trained) as page:
        page.goto(page_of_trained + views["training"][0])
        asks = page.get_by_role("button", name="Ask every checkpoint")
        asks.nth(1).wait_for()
        assert page.locator("section.card h3").count() == 2
        assert page.locator("del, ins").count() >= 1
        asks.first.click()
        page.get_by_text("greedy rationale", exact=True).wait_for()
        rows = page.locator("section.card").first.locator("table").last.locator("tbody tr")
        names = [text.split("\t")[0] for text in rows.all_inner_texts()]
        assert names == ["start", "checkpoint-3", "checkpoint-6", "model"]


def test_an_edited_rationale_moves_the_neighbours(
    browser: Any, page_of_trained: str, trained: list[Path]
) -> None:
    run = Run(trained[0])
    rollout = run.rollouts(step=6, role="query").iloc[0]
    with opened(browser, page_of_trained) as page:
        page.goto(f"{page_of_trained}/try?a=first:model&b=first:start")
        page.get_by_label("Text", exact=True).fill("nothing of all this")
        page.get_by_role("button", name="Write").click()
        page.locator("[data-side=b] table").wait_for()
        side = page.locator("[data-side=a]")
        before = side.locator("tbody tr").first.inner_text()
        cosine = float(side.locator("tbody tr td").nth(2).inner_text())
        side.get_by_label("Rationale (edit it)").fill(str(rollout["rationale"]))
        page.wait_for_function(
            "before => document.querySelector('[data-side=a] tbody tr').innerText !== before",
            arg=before,
        )
        assert "▲" in side.locator("tbody").inner_text()
        assert float(side.locator("tbody tr td").nth(2).inner_text()) > cosine
        assert "text=nothing+of+all+this" in page.url


def test_hostile_rationales_are_text(browser: Any, page_of_written: str, written: Path) -> None:
    pairs = replay(written, load_rewards(["consistency"], "."))
    write_replay(written, "consistency", [replay_table(*pair) for pair in pairs])
    hostile = Run(written).rollouts(step=3)
    pages = [
        "/rollouts?step=3",
        "/rollouts?step=3&show=groups",
        *(f"/rollout?step=3&row={row}" for row in range(8)),
        *(f"/group?step=3&group={group}" for group in range(4)),
        "/training",
        f"/training?text={quote('a grey wolf <b>sleeps</b>')}",
        f"/rollouts?text={quote('<img src=x onerror=window.pwned=6>')}",
        f"/try?text={quote(hostile['rationale'][0])}",
        f"/rollouts?run={quote('<script>window.pwned=7</script>')}",
        "/replays",
        f"/replays?name={quote('<script>window.pwned=9</script>')}",
        f"/replays?name={quote('../../recipe')}",
        f"/rollouts?score={quote('<script>window.pwned=8</script> > 1')}",
    ]
    for width in (1280, 390):
        with opened(browser, page_of_written, width) as page:
            for address in pages:
                page.goto(page_of_written + address)
                page.wait_for_timeout(300)
                assert page.evaluate(FITS)
            page.goto(f"{page_of_written}/rollouts?step=3")
            page.locator("table a").first.wait_for()
            assert "<script>window.pwned = 1</script>" in page.inner_text("table")
            assert "‹U+202E›gnirts" in page.inner_text("table")
            assert page.locator("table script, table img, table svg, table b").count() == 0
            with page.expect_download() as download:
                page.get_by_role("button", name="download written-rollouts as csv").click()
            assert "\"'=HYPERLINK(" in Path(download.value.path()).read_text("utf-8")
            page.goto(f"{page_of_written}/rollout?step=3&row=0")  # a run without a model
            page.get_by_role("link", name="try this text").click()
            page.get_by_text("No run here has a model yet").wait_for()


def test_soft_tokens_as_words_and_alarms(browser: Any, page_of_written: str) -> None:
    with opened(browser, page_of_written) as page:
        page.goto(f"{page_of_written}/training")
        page.get_by_text("fox 0.50, <i>red</i> 0.25").first.wait_for()
        page.goto(page_of_written)
        assert "alarms/stale_engine" in page.locator(".alarms").inner_text()
        entropy = page.locator("figure", has_text="Entropy of the policy")
        assert entropy.locator("line.alarm").count() == 1


def ask(address: str, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """A raw request: nothing tidies the path or the headers."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_server_gives_nothing_from_outside_and_takes_nothing(
    page_of_written: str, written: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    secret = written.parent / "secret.txt"
    secret.write_text("top secret")
    version = re.search(rb"/_nicegui/([\d.]+)/", ask(page_of_written, "GET", "/")[1])
    assert version is not None
    static = f"/_nicegui/{version[1].decode()}"
    steps = "../" * 12
    for path in (
        f"/{steps}{secret}",
        f"/..%2f..%2f..%2f{secret}",
        "/rollouts/../secret.txt",
        f"{static}/static/{steps}{secret}",
        f"{static}/static/..%2f..%2f..%2f..%2f..%2fsetup.cfg",
        f"{static}/resources/x/{steps}{secret}",
        f"{static}/esm/x/{steps}{secret}",
        f"{static}/components/{secret}",
        f"{static}/libraries/{secret}",
        f"/rollouts?run={quote(str(written.parent))}",
        f"/rollouts?run={steps}{quote(str(secret))}",
        f"/try?a={quote(str(secret))}:model",
        f"/rollout?run=written&step={steps}{secret}&row=0",
    ):
        status, body = ask(page_of_written, "GET", path)
        assert b"top secret" not in body and status in (200, 400, 404)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(page_of_written, method, "/")[0] == 405
        assert ask(page_of_written, method, "/_nicegui_ws/socket.io/?EIO=4")[0] == 405
    assert ask(page_of_written, "GET", "/", Host="evil.example")[0] == 421
    assert ask(page_of_written, "GET", "/rollouts", Origin="http://evil.example")[0] == 403
    socket = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    address = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    assert ask(page_of_written, "GET", address, **socket)[0] == 403
    assert ask(page_of_written, "GET", address, **socket, Origin="http://evil.example")[0] == 403
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_step_that_is_written_meanwhile_appears(
    browser: Any, run_folder: Path, add_step: Any, serve: Any
) -> None:
    server = serve(run_folder)
    try:
        with opened(browser, server.address) as page:
            page.goto(f"{server.address}/rollouts")
            page.get_by_text("27 rollouts").wait_for()
            add_step(run_folder, 4)
            with (run_folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 4, "seconds": 9.0, "reward": 0.9}) + "\n")
            page.wait_for_timeout(1100)
            page.reload()
            page.get_by_text("36 rollouts").wait_for()
            page.goto(server.address)
            assert "4 of 9" in page.inner_text(".facts")
            checkpoint = run_folder / "checkpoints" / "checkpoint-4"
            checkpoint.mkdir(parents=True)
            (checkpoint / "config.json").write_text("{}")
            mark_complete(checkpoint)
            page.goto(f"{server.address}/rollout?step=4&row=0")  # there is no finished model yet
            there = page.get_by_role("link", name="try this text").get_attribute("href")
            assert "a=written%3Acheckpoint-4" in str(there)
    finally:
        server.stop()
