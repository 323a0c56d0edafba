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
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from grace_rl.inspect import Run
from grace_rl.inspect.checkpoints import checkpoints
from grace_rl.reward import load_rewards
from grace_rl.reward.replay import replay, replay_table, write_replay
from grace_rl.run.checkpoints import mark_complete

pytestmark = pytest.mark.slow
NET = 600_000  # milliseconds: a net under what is waited for, never a measure

FITS = "document.documentElement.scrollWidth <= innerWidth"
LOOKS = [(w, scheme) for w in (1280, 390) for scheme in ("light", "dark")]


@contextmanager
def opened(browser: Any, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page that fails the test for any console error and any request to elsewhere."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
    )
    page, problems = context.new_page(), []
    page.set_default_timeout(NET)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"{message.type}: {message.text}")

    def on_request(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.hostname != "127.0.0.1" and parts.scheme not in ("data", "blob"):
            problems.append(f"a request to {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("request", on_request)
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    yield page
    assert page.evaluate("window.pwned") is None
    context.close()
    assert not problems


@pytest.fixture(scope="session")
def replayed(trained: list[Path]) -> Path:
    """The second run with a replay beside it."""
    run = trained[1]
    pairs = replay(run, load_rewards(["consistency"], "."))
    write_replay(run, "consistency", [replay_table(*pair) for pair in pairs])
    return run


@pytest.fixture(scope="session")
def views(replayed: Path) -> dict[str, tuple[str, str]]:
    """Each view's address, and what shows that it is complete."""
    run = Run(replayed)
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
        "try": (f"/try?text={quote(text)}&with=a+dog", "[data-side=b] [data-part=answer] table"),
        "learned": ("/learned?run=second", "text=Words that changed most"),
        "map": ("/map?run=second", ".map .frame.shown a"),
        "notes": ("/notes?run=second", "role=status"),
        "compare": ("/compare?run=first&with=second", "text=The same texts"),
        "mistake": ("/group?step=1&group=x", "role=alert"),
    }


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_every_view(
    browser: Any, site: str, views: dict, width: int, scheme: str, tmp_path: Path
) -> None:
    """Fits its width, follows the system's colours, has words in every link and its own title, and
    axe finds nothing."""
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    folder, titles = Path(os.environ.get("GRACE_RL_SCREENSHOTS", tmp_path)), set()
    with opened(browser, width, scheme) as page:
        for name, (address, complete) in views.items():
            page.goto(site + address)
            page.locator(complete).first.wait_for()
            assert page.evaluate(FITS), f"{name} scrolls sideways"
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(20, 23, 29)") == (scheme == "dark")
            mute = "[...document.links].filter(a => !a.innerText.trim()).length"
            assert page.evaluate(mute) == page.locator("a.skip").count() - 1
            titles.add(page.title())
            if (width, scheme) in (LOOKS[0], LOOKS[-1]):
                page.evaluate(axe)
                found = page.evaluate("axe.run().then(result => result.violations)")
                assert [(v["id"], v["nodes"][0]["html"]) for v in found] == [], name
            page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)
    assert len(titles) == len(views)


def test_overview_shows_all_runs_and_what_differs(browser: Any, site: str) -> None:
    with opened(browser) as page:
        page.goto(site)
        names = re.compile("^(first|second|written|live)$")
        assert page.locator("h2", has_text=names).count() == 4
        reward = page.locator("figure", has_text="Reward").first
        assert reward.locator("svg.chart path").count() == 4
        assert page.locator("rect.healthy").count() >= 4
        recipe = page.locator("#recipe")
        assert "seed" in recipe.inner_text() and "rewards.stepwise.name" in recipe.inner_text()
        assert (
            "per_device_train_batch_size"
            not in page.locator("#recipe td", has_text="gradient_checkpointing").all_inner_texts()
        )


def test_a_rollout_has_its_curve_its_sum_and_neighbours(
    browser: Any, site: str, views: dict
) -> None:
    with opened(browser) as page:
        page.goto(site + views["rollout"][0])
        page.locator("section table").nth(1).wait_for()
        assert page.locator(".tokens span[title^=advantage]").count() >= 4
        assert page.locator("svg[aria-label='Score s_k of each prefix'] path").count() == 1
        titles = page.locator("section h3").all_inner_texts()
        assert titles[0].startswith("Before: by the text alone (checkpoint-3)")
        assert titles[1] == "After: by the rationale"
        facts = dict(zip(*(page.locator(f".facts {tag}").all_inner_texts() for tag in ("dt", "dd")),
                         strict=True))  # fmt: skip
        parts = float(facts["stepwise"]) + float(facts["length"])
        assert float(facts["total"]) == pytest.approx(parts, abs=2e-3)
        heads = page.locator("section").nth(1).locator("th").all_inner_texts()
        assert "best rationale" in heads


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
    browser: Any, site: str, trained: list[Path]
) -> None:
    run = Run(trained[0])
    expected = run.count(step=(2, 4), role="query", text="facts", score="tokens < 9")
    assert 0 < expected < run.count()
    with opened(browser) as page:
        page.goto(f"{site}/rollouts")
        page.get_by_text(f"{run.count():,} rollouts").wait_for()
        page.get_by_label("Step", exact=True).fill("2-4")
        page.get_by_label("Text or rationale contains").fill("FACTS")
        page.get_by_label("Scores").fill("tokens < 9")
        page.get_by_label("Role").select_option("query")
        page.get_by_text(f"{expected:,} rollouts").wait_for()
        address = page.url
        with page.expect_download() as download:
            page.get_by_role("link", name="download first-rollouts as csv").click()
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8"))))
        assert len(rows) == expected and {row["role"] for row in rows} == {"query"}
        page.get_by_label("Show").select_option("groups")
        page.locator(".count", has_text="groups").wait_for()
        page.goto(address)
        page.get_by_text(f"{expected:,} rollouts").wait_for()
        assert page.get_by_label("Step", exact=True).input_value() == "2-4"
        page.get_by_label("Step", exact=True).fill("nonsense")
        page.locator("#list [role=alert]").wait_for()


def test_lists_turn_and_sort_and_lead_through(browser: Any, site: str, trained: list[Path]) -> None:
    """Pages, column heads, previous and next (j and k) in the list's order, and back again."""
    run = Run(trained[0])
    order = run.rollouts(sort="advantage", descending=True, columns=["step", "row"], limit=60)
    places = [f"step={step}&row={row}&" for step, row in order.values]
    with opened(browser) as page:
        page.goto(f"{site}/rollouts?page=9999")
        assert page.locator("tbody tr").first.inner_text()
        page.get_by_role("link", name="advantage", exact=True).click()
        page.wait_for_url("**sort=advantage&order=down**")
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("advantage")
        page.get_by_role("link", name="next", exact=True).click()
        page.wait_for_url("**page=2**")
        page.locator("td[data-label=rationale] a").first.click()
        page.wait_for_url(f"**{places[50]}**")
        page.keyboard.press("j")
        page.wait_for_url(f"**{places[51]}**")
        page.keyboard.press("k")
        page.wait_for_url(f"**{places[50]}**")
        page.get_by_role("link", name="previous rollout").click()
        page.wait_for_url(f"**{places[49]}**")
        page.get_by_role("link", name="the list").click()
        page.get_by_text("page 1 of").wait_for()
        page.goto(f"{site}/rollouts?page={quote('²')}")
        page.get_by_text("page: must be a whole number").wait_for()


def test_back_from_a_rollout_is_where_one_was(browser: Any, site: str) -> None:
    with opened(browser) as page:
        page.goto(f"{site}/rollouts")
        page.locator("td[data-label=rationale] a").nth(40).click()
        page.get_by_role("heading", name="Nearest texts").wait_for()
        page.go_back()
        page.locator("td[data-label=rationale] a").nth(40).wait_for()
        page.wait_for_function("() => scrollY > 200")


def test_the_keyboard_reaches_everything(browser: Any, site: str) -> None:
    with opened(browser) as page:
        page.goto(f"{site}/rollouts")
        page.locator("table a").first.wait_for()
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    "(document.activeElement.getAttribute('aria-label') || "
                    "document.activeElement.labels?.[0]?.innerText || "
                    "document.activeElement.innerText || '').trim()"
                )
            )
        wanted = {"to the content", "Overview", "Try it", "light or dark", "Step", "Role", "Order"}
        assert wanted <= set(reached)
        assert any(label.startswith("download") for label in reached)
        page.get_by_role("button", name="light or dark").focus()
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.documentElement.dataset.theme === 'dark'")
        page.locator("td[data-label=rationale] a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/rollout?**")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # remembered


def test_one_text_through_training_in_two_runs(
    browser: Any, site: str, views: dict, trained: list[Path]
) -> None:
    with opened(browser) as page:
        page.goto(site + views["training"][0])
        asks = page.get_by_role("button", name="Ask every checkpoint")
        asks.nth(1).wait_for()
        assert page.locator("section.card h3").count() == 4
        assert page.locator("del, ins").count() >= 1
        asks.first.click()
        page.get_by_text("greedy rationale", exact=True).wait_for()
        rows = page.locator("section.card").first.locator("table").last.locator("tbody tr")
        names = [text.split("\t")[0] for text in rows.all_inner_texts()]
        assert names == ["start", "checkpoint-3", "checkpoint-6", "model"]
        page.goto(f"{site}/training")
        run, other = (Run(path) for path in trained)
        count = len(run.texts())
        page.get_by_text(f"{count} texts").wait_for()
        row = page.locator("tbody tr").first
        text = row.locator("td").first.inner_text()
        assert row.locator("td[data-label='stored steps']").inner_text() == str(
            len(run.through_training(text))
        )
        assert row.locator("td[data-label='stored steps in second']").inner_text() == str(
            len(other.through_training(text))
        )
        assert page.get_by_text("page 1 of").count() == (count > 40)


def test_replays_are_linked_from_their_groups(browser: Any, site: str, views: dict) -> None:
    with opened(browser) as page:
        page.goto(site + views["replays"][0])
        page.locator("td[data-label=text] a").first.click()
        page.locator("article").first.wait_for()
        names = page.locator("article .facts dt").all_inner_texts()
        cards = page.locator("article").count()
        assert names.count("advantage in replay consistency") == cards
        assert names.count("total") == cards
        page.get_by_role("link", name="replay consistency").click()
        page.wait_for_url("**/replays?run=second&name=consistency")


def test_an_edited_rationale_moves_the_neighbours(
    browser: Any, site: str, trained: list[Path]
) -> None:
    """The text is of no scene, so nothing is written of it, and the page says so."""
    run = Run(trained[0])
    rollout = run.rollouts(step=6, role="query").iloc[0]
    with opened(browser) as page:
        page.goto(f"{site}/try?a=first:start&b=first:model")
        page.get_by_label("Text", exact=True).fill("nothing of all this")
        page.get_by_role("button", name="Write").click()
        page.locator("[data-side][aria-busy=false]").nth(1).wait_for()
        assert page.locator("[data-side] > h2").all_inner_texts() == [
            "first, start",
            "first, model",
        ]
        side = page.locator("[data-side=b]")
        near, words = side.locator("[data-part=answer]"), side.locator("[data-part=credit]")
        assert "Nothing is written" in words.inner_text()
        assert "Empty: every text without a rationale" in near.inner_text()
        before = near.locator("tbody td[data-label=text]").first.inner_text()
        cosine = float(near.locator("tbody tr td").nth(2).inner_text())
        edit(side, str(rollout["rationale"]))
        assert words.get_by_role("heading").inner_text() == "Which words do it"
        assert words.locator(".tokens span").count() == len(rollout["rationale"].split())
        assert near.locator("tbody td[data-label=text]").first.inner_text() != before
        assert "▲" in near.locator("tbody").inner_text()
        assert float(near.locator("tbody tr td").nth(2).inner_text()) > cosine
        assert "text=nothing+of+all+this" in page.url
        edit(side, " ")
        assert "Nothing is written" in words.inner_text() and not words.locator("span").count()


def edit(side: Any, rationale: str) -> None:
    """Write a rationale on one side of Try, and wait until all that it changes is there."""
    asked = side.get_attribute("data-asked")
    side.get_by_label("Rationale (edit it)").fill(rationale)
    side.page.wait_for_function(
        "([side, asked]) => side.dataset.asked !== asked && side.ariaBusy === 'false'",
        arg=[side.element_handle(), asked],
    )


def test_words_are_coloured_by_what_they_earned(browser: Any, site: str, views: dict) -> None:
    with opened(browser) as page:
        page.goto(site + views["rollout"][0])
        words = page.locator("[data-part^=credit] .tokens span[title*=positive]")
        words.first.wait_for()
        assert "contrastive" in str(words.first.get_attribute("title")) or page.get_by_text(
            "asks a model"
        )
        page.get_by_text("Credit of each word, as a table").click()
        rows = page.locator("[data-part^=credit] tbody tr")
        assert rows.count() == words.count()
        page.goto(site + views["group"][0])
        page.locator("article [data-part^=credit] .tokens").nth(3).wait_for()


def test_the_map_moves_through_the_steps(browser: Any, site: str, trained: list[Path]) -> None:
    steps = Run(trained[0]).panel_steps()
    assert steps[0] == 0 and steps[-1] == 6
    with opened(browser) as page:
        page.goto(f"{site}/map?run=first")
        shown = page.locator(".map .frame.shown")
        assert shown.get_attribute("data-step") == "6"
        page.get_by_label("Step").focus()
        page.keyboard.press("Home")
        page.locator(".map .frame.shown[data-step='0']").wait_for()
        assert shown.count() == 1 and shown.locator("line.to").count() > 0
        shown.locator("a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/training?**")
        page.locator("td[data-label=by]", has_text="greedy").first.wait_for()


def test_a_rollout_is_flagged_by_keyboard(browser: Any, site: str, live: Path) -> None:
    """The flag, a label and a note come back on the page, in the list, and as rows to train on."""
    with opened(browser) as page:
        page.goto(f"{site}/rollout?run=live&step=1&row=0")
        page.get_by_role("heading", name="Notes").wait_for()
        page.keyboard.press("g")
        page.locator("#said", has_text="good").wait_for()
        page.get_by_label("Label").fill("<b>kind</b>")
        page.keyboard.press("Enter")
        page.locator("#said", has_text="<b>kind</b>").wait_for()
        page.goto(f"{site}/notes?run=live")
        assert page.locator("td[data-label=label]").inner_text() == "<b>kind</b>"
        with page.expect_download() as download:
            page.get_by_role("link", name="good ones as SFT rows").click()
        row = json.loads(Path(download.value.path()).read_text("utf-8"))
        assert row == {"text": "a red fox runs", "rationale": "step 1, rollout 0"}
    for origin in ({}, {"Origin": "http://evil.example"}):
        assert ask(site, "POST", "/note", **origin)[0] == 403


def test_hostile_rationales_are_text(browser: Any, site: str, written: Path) -> None:
    pairs = replay(written, load_rewards(["consistency"], "."))
    write_replay(written, "consistency", [replay_table(*pair) for pair in pairs])
    hostile = Run(written).rollouts(step=3)
    pages = [
        "/rollouts?run=written&step=3",
        "/rollouts?run=written&step=3&show=groups",
        *(f"/rollout?run=written&step=3&row={row}" for row in range(8)),
        *(f"/group?run=written&step=3&group={group}" for group in range(4)),
        "/training?run=written",
        f"/training?text={quote('a grey wolf <b>sleeps</b>')}",
        f"/rollouts?text={quote('<img src=x onerror=window.pwned=6>')}",
        f"/try?text={quote(hostile['rationale'][0])}",
        f"/rollouts?run={quote('<script>window.pwned=7</script>')}",
        "/replays?run=written",
        f"/replays?run=written&name={quote('<script>window.pwned=9</script>')}",
        f"/replays?run=written&name={quote('../../recipe')}",
        f"/rollouts?score={quote('<script>window.pwned=8</script> > 1')}",
    ]
    for width in (1280, 390):
        with opened(browser, width) as page:
            for address in pages:
                page.goto(site + address, wait_until="networkidle" if "/try" in address else "load")
                assert page.evaluate(FITS)
            page.goto(f"{site}/rollouts?run=written&step=3")
            assert "<script>window.pwned = 1</script>" in page.inner_text("table")
            assert "‹U+202E›gnirts" in page.inner_text("table")
            assert page.locator("table script, table img, table svg, table b").count() == 0
            with page.expect_download() as download:
                page.get_by_role("link", name="download written-rollouts as csv").click()
            assert "\"'=HYPERLINK(" in Path(download.value.path()).read_text("utf-8")


def test_soft_tokens_as_words_and_alarms(browser: Any, site: str) -> None:
    with opened(browser) as page:
        page.goto(f"{site}/training")
        page.get_by_text("fox 0.50, <i>red</i> 0.25").first.wait_for()
        page.goto(site)
        alarms = page.locator(".alarms", has_text="Alarms of written")
        assert "alarms/stale_engine" in alarms.inner_text()
        entropy = page.locator("figure", has_text="Entropy of the policy")
        assert entropy.locator("line.alarm").count() == 2  # of written and live


def ask(address: str, method: str, path: str, **headers: str) -> tuple[int, bytes]:
    """A raw request: nothing tidies the path or the headers."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_server_gives_nothing_from_outside_and_takes_nothing(site: str, written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    secret = written.parent / "secret.txt"
    secret.write_text("top secret")
    steps = "../" * 12
    for path in (
        f"/{steps}{secret}",
        f"/..%2f..%2f..%2f{secret}",
        "/rollouts/../secret.txt",
        f"/csv/{steps}{secret}",
        f"/csv/replay?run=written&name={steps}{quote(str(secret))}",
        f"/rollouts?run={quote(str(written.parent))}",
        f"/rollouts?run={steps}{quote(str(secret))}",
        f"/try?a={quote(str(secret))}:model",
        f"/stream/try?of=written:{steps}{quote(str(secret))}&text=x",
        f"/rollout?run=written&step={steps}{secret}&row=0",
    ):
        status, body = ask(site, "GET", path)
        assert b"top secret" not in body and status in (200, 400, 404)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert ask(site, method, "/")[0] == 405
    assert ask(site, "GET", "/", Host="evil.example")[0] == 421
    assert ask(site, "GET", "/rollouts", Origin="http://evil.example")[0] == 403
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_page_follows_its_run(browser: Any, site: str, live: Path, add_step: Any) -> None:
    """Steps, scores and the end of a run appear by themselves; place, fields and folds stay."""
    with opened(browser) as page, opened(browser) as overview:
        overview.goto(site)
        assert "live: running" in overview.inner_text("#as-of")
        overview.locator("summary").first.click()  # shuts what differs
        page.goto(f"{site}/rollouts?run=live")
        page.get_by_text("27 rollouts").wait_for()
        page.get_by_label("Text or rationale contains").fill("fox")
        page.get_by_text("6 rollouts").wait_for()
        link = page.locator("td[data-label=rationale] a").nth(4)
        link.focus()
        place = page.evaluate("scrollY")
        add_step(live, 4)
        with (live / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "seconds": 9.0, "reward": 0.9}) + "\n")
        page.get_by_text("8 rollouts").wait_for()
        assert page.evaluate("scrollY") == place
        assert page.get_by_label("Text or rationale contains").input_value() == "fox"
        assert page.evaluate("document.activeElement.tagName") == "A"
        overview.get_by_text("4 of 9").wait_for()
        status = {"grace_rl": "0", "status": "finished"}
        (live / "status.json").write_text(json.dumps(status))
        overview.get_by_text("live: finished").wait_for()
        assert overview.locator("#recipe").get_attribute("open") is None
        assert page.locator("#as-of time").inner_text()
        checkpoint = live / "checkpoints" / "checkpoint-4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        mark_complete(checkpoint)
        assert list(checkpoints(Run(live))) == ["checkpoint-4"]
        page.goto(f"{site}/rollout?run=live&step=4&row=0")  # there is no finished model yet
        there = page.get_by_role("link", name="try this text").get_attribute("href")
        assert "b=live%3Acheckpoint-4" in str(there)
