"""A model card written from a run: README.md beside a model that is shared.

Everything in it is read from the run directory; what is not there is said to be unknown. Texts and
rationales are shown as code, so that none of them can become markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from grace_rl import __version__
from grace_rl.errors import UserError
from grace_rl.run.directory import RunDirectory
from grace_rl.run.records import read_metrics, read_recipe, rollout_files
from grace_rl.run.secrets import masked_text

EXAMPLES = 5
LIMITS = """\
- It is as good as the scores above say, on data like those; nothing else was measured.
- A rationale is what the vector was made of, not a proof that the text says it: it may be wrong.
- Writing costs: a text takes a generation, not only a forward pass. Without a rationale
  (`rationale="none"`) it is as fast as any encoder of its size, and scores as the row `none` says.
- Languages, lengths and subjects that the data do not have were not tried."""


def model_card(run: str | Path, repo: str = "NAME/MODEL") -> str:
    """The card of a finished run, as Markdown with the hub's front matter.

    Args:
        run: The run directory.
        repo: What the model will be called; only for the lines that use it.

    Raises:
        UserError: The run has no model, or its records cannot be read.
    """
    path = Path(run)
    directory = RunDirectory(path)
    if not directory.model.is_dir():
        raise UserError(f"{run}: has no model/; finish the run first")
    recipe = read_recipe(path)
    base, data = (str(recipe.get(k, "unknown")) for k in ("model_name_or_path", "dataset_name"))
    front = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "grace-rl", str(recipe.get("method", "grpo"))],
    }
    if "/" in base and not Path(base).exists():
        front["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo.rpartition('/')[2]}\n\nA text encoder that writes a rationale for each text and "
        "is embedded by it, trained with grace-rl.",
        "## What it was made from\n\n" + _facts(path, recipe, base, data),
        "## Scores\n\n" + _scores(directory.evaluation),
        "## What it writes\n\n" + _examples(path),
        "## How to use it\n\n" + _uses(repo),
        "## Limits\n\n" + LIMITS,
        "## The recipe\n\n" + _code(yaml.safe_dump(_public(recipe), sort_keys=False), "yaml"),
    ]
    return masked_text("\n\n".join(parts)) + "\n"


def _facts(run: Path, recipe: Mapping[str, Any], base: str, data: str) -> str:
    rewards = ", ".join(str(reward.get("name")) for reward in recipe.get("rewards", ())) or "none"
    steps = max((int(logged["step"]) for logged in read_metrics(run)), default=0)
    facts = {
        "base model": _name(base),
        "data": _name(data),
        "method": str(recipe.get("method", "grpo")),
        "rewards": rewards,
        "steps": str(steps),
        "seed": str(recipe.get("seed", "unknown")),
        "made with": f"grace-rl {__version__}",
    }
    return _table(("", ""), facts.items())


def _scores(path: Path) -> str:
    """Before and after; the first row is the baseline."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
        lines = [
            [row["name"], row.get("rationale", ""), *(_number(row["scores"], n) for n in names)]
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return "The run scored nothing (`evaluation:` in the recipe, or `grace-rl evaluate`)."
    return _table(("model", "rationale", *names), lines)


def _number(scores: Mapping[str, Any], name: str) -> str:
    value = scores.get(name)
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _examples(run: Path) -> str:
    """Rationales of the last step that was kept, one for each text."""
    files = rollout_files(run)
    if not files:
        return "This method keeps no rationales."
    kept = pq.read_table(list(files.values())[-1], columns=["text", "rationale"]).to_pylist()
    first: dict[str, str] = {}
    for row in kept:
        first.setdefault(str(row["text"]), str(row["rationale"]))
    shown = list(first.items())[:EXAMPLES]
    return "\n\n".join(_code(f"text:      {text}\nrationale: {told}") for text, told in shown)


def _uses(repo: str) -> str:
    return f"""\
`pip install grace-rl`, then with sentence-transformers (which asks for the consent because the
encoder's class is not its own; none of the model's files is code):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}", trust_remote_code=True)
vectors = model.encode(["a text"])
```

with the rationales:

```python
from huggingface_hub import snapshot_download

from grace_rl import RationaleEncoder

encoder = RationaleEncoder.from_pretrained(snapshot_download("{repo}"))
encoded = encoder.encode(["a text"])
print(encoded.rationales, encoded.vectors.shape)
```

and for many texts, from the command line:

```bash
grace-rl embed $(hf download {repo}) --input texts.jsonl --output vectors.parquet --rationales
```

The writer alone is a language model: `vllm serve {repo}`."""


def _public(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the places of the machine that it ran on."""
    return {
        key: _name(value) if isinstance(value, str) else value
        for key, value in recipe.items()
        if key not in ("output_dir", "logging_dir", "hub_token", "resume_from_checkpoint")
    }


def _name(value: str) -> str:
    """A local path by its last part: where it lay is nobody's business."""
    return Path(value).name if value.startswith(("/", "~", ".")) else value


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in one] for one in lines]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(one)} |" for one in cells)


def _code(text: str, language: str = "text") -> str:
    """A fence that is longer than any inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
