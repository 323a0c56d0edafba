"""docs/reference/ is what the code says today, and the site has every page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_reference.py"


def test_the_generated_reference_is_current() -> None:
    """Else: make reference"""
    spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.pages()
    kept = {path.name: path.read_text(encoding="utf-8") for path in module.FOLDER.glob("*.md")}
    assert set(kept) == set(made)
    assert [name for name, text in made.items() if kept[name] != text] == []


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    made = {"start.md", "contributing.md", "security.md", "changes.md"}

    def places(node: Any) -> set[str]:
        if isinstance(node, str):
            return {node}
        parts = node.values() if isinstance(node, dict) else node
        return {place for part in parts for place in places(part)}

    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (docs / "notebooks").glob("*.ipynb")}
    assert places(config["nav"]) == pages | notebooks | made
