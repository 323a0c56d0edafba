"""The pictures of docs/inspect.md, of a run on the machine of whoever makes them.

    python benchmarks/pictures.py runs/quickstart

Needs Chromium (`make browser`). Each view is opened in the page of `grace-rl inspect` and written
to docs/images/inspect-<view>.png, in 256 colours; the rollout is the best one of the last stored
step.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from grace_rl.inspect import Run

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH, HEIGHT = 1120, 1040
PATIENCE = 600_000  # milliseconds


def main(paths: list[str]) -> None:
    run = Run(paths[0])
    step = run.steps()[-1]
    best = run.rollouts(step=step, sort="total", descending=True, limit=1).iloc[0]
    measured = "[data-stream*='/credit'][aria-busy=false]"  # what each word earned
    views = {
        "overview": ("/", "figure svg path"),
        "rollout": (f"/rollout?step={step}&row={best['row']}", measured),
        "group": (f"/group?step={step}&group={best['group']}", measured),
        "learned": ("/learned", "text=Words that changed most"),
        "map": ("/map", ".map .frame.shown a"),
    }
    command = [sys.executable, "-m", "grace_rl", "inspect", *paths, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = next(line for line in server.stdout if "http://" in line)
        address = line[line.index("http://") :].split()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(PATIENCE)
            for name, (place, there) in views.items():
                page.goto(address + place)
                page.locator(there).first.wait_for()
                picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
                path = IMAGES / f"inspect-{name}.png"
                picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
                print(f"docs/images/{path.name}: {path.stat().st_size / 1000:.0f} kB")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
