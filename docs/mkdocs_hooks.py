"""What mkdocs must know of this folder: pages that lie above it, notebooks, the project's files.

The pages stay as they are read on their own: links to what lies outside are turned here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {
    "README.md": "start.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # where the extra docs is installed

    for name, page in ABOVE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_turned(text, ROOT)))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, page, content=_markdown(notebook)))
        files.remove(files.get_file_from_path(f"notebooks/{notebook.name}"))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    markdown = markdown.replace("```python notest\n", "```python\n")  # a word for our tests
    if page.file.generated_by:
        return markdown
    return _turned(markdown, (ROOT / "docs" / page.file.src_path).parent)


def _turned(text: str, folder: Path) -> str:
    """Links of a page in `folder`; what is no page of the site is named, not linked."""

    def turn(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        anchor = match[2] or ""
        if target.parent == ROOT and target.name in ABOVE:
            up = "" if folder in (ROOT, ROOT / "docs") else "../"
            return f"]({up}{ABOVE[target.name]}{anchor})"
        if ROOT / "docs" in target.parents and target.exists():
            if folder == ROOT:
                return f"]({target.relative_to(ROOT / 'docs')}{anchor})"
            return match[0]
        if target.exists():
            return "]" + f"(#only-in-the-project:{target.relative_to(ROOT)})"
        return match[0]  # mkdocs says that it is broken

    turned = LINK.sub(turn, text)
    return re.sub(r"\[([^\]]*)\]\(#only-in-the-project:[^)]*\)", r"\1", turned)


def _markdown(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
