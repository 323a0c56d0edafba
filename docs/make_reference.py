"""docs/reference/: every key, metric, command and public class, out of the code that has them.

    python docs/make_reference.py

Nothing in that folder is written by hand; a test compares it with what this makes.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import grace_rl
from grace_rl.cli import COMMANDS, _parsers
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.reference import Key, recipe_keys_of
from grace_rl.run.files import write_text

FOLDER = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/make_reference.py; change the code, not this page. -->"
CLASSES = {
    "grace_rl": grace_rl.__all__,
    "grace_rl.train.ppo": ["GracePPOTrainer"],
    "grace_rl.train.ppo_config": ["GracePPOConfig"],
    "grace_rl.train.gircse_config": ["GIRCSEConfig"],
    "grace_rl.train.infonce_config": ["InfoNCEConfig"],
    "grace_rl.train.reconstruction_config": ["ReconstructionConfig"],
    "grace_rl.train.sft_config": ["GraceSFTConfig"],
    "grace_rl.embed.soft_token_encoder": ["SoftTokenEncoder"],
    "grace_rl.embed.settings": ["EncoderSettings"],
    "grace_rl.embed.reader": ["Reader"],
    "grace_rl.embed.reader_config": ["ReaderConfig"],
    "grace_rl.rollout.rollouts": ["Rollouts"],
    "grace_rl.credit.credit": ["Credit"],
    "grace_rl.reward": ["RewardSpec"],
    "grace_rl.inspect.run": ["Run"],
    "grace_rl.errors": ["UserError"],
}


def pages() -> dict[str, str]:
    """File name -> content."""
    made = {
        "recipes.md": _recipes(),
        "metrics.md": _metrics(),
        "commands.md": _commands(),
        "python.md": _python(),
        "gallery.md": _gallery(),
    }
    return {name: f"{MADE}\n\n{text.rstrip()}\n" for name, text in made.items()}


def _recipes() -> str:
    """One row for each key: its home first, then the methods that have it."""
    homes = {
        "recipe": "Keys of every recipe",
        "grace-rl": "Keys of the methods",
        "TRL": "Keys of TRL and transformers",
        "model": "Keys of the model (TRL's `ModelConfig`)",
    }
    by_method = {method: recipe_keys_of(method) for method in METHODS}
    parts = [
        "# Every key of a recipe",
        "Types, ranges and defaults are those that are checked. `stages` chains several methods "
        "([reconstruction.md](../reconstruction.md)); [recipes.md](../recipes.md) explains.",
    ]
    for home, title in homes.items():
        found: dict[tuple[str, str, str, str], list[str]] = {}
        for method, keys in by_method.items():
            for key in keys.values():
                if key.home == home:
                    cells = (key.name, kind_of(key), key.default, key.meaning)
                    found.setdefault(cells, []).append(method)
        rows = [
            (f"`{name}`", "all" if len(who) == len(METHODS) else ", ".join(who), *_shown(*rest))
            for (name, *rest), who in sorted(found.items())
        ]
        parts += [f"## {title}", _table(("key", "methods", "type", "default", "meaning"), rows)]
    return "\n\n".join(parts)


def _shown(kind: str, default: str, meaning: str) -> tuple[str, str, str]:
    return kind, f"`{default}`" if default else "", meaning


def kind_of(key: Key) -> str:
    """Type and range in a few words."""
    return _kind(key.schema, key.schema.get("$defs", {}))


def _kind(schema: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _kind(known.get(schema["$ref"].rpartition("/")[2], {}), known)
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one, known) for one in schema["anyOf"]))
    kind = schema.get("type", "anything")
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": "list",
        "object": "mapping",
    }
    limits = [
        f"{sign} {schema[name]:g}"
        for name, sign in (
            ("minimum", "&ge;"),
            ("exclusiveMinimum", "&gt;"),
            ("maximum", "&le;"),
            ("exclusiveMaximum", "&lt;"),
        )
        if name in schema and abs(schema[name]) < 2**31 - 1
    ]
    inner = f" of {_kind(schema['items'], known)}" if isinstance(schema.get("items"), dict) else ""
    keys = ", ".join(schema.get("properties", {}))
    inside = f" ({keys})" if keys else ""
    return " ".join([names.get(str(kind), str(kind)) + inner + inside, *limits])


def _metrics() -> str:
    """The healthy ranges of the troubleshooting page, and the charts of the page of a run."""
    panels = yaml.safe_load(
        (Path(grace_rl.__file__).parent / "inspect" / "panels.yaml").read_text(encoding="utf-8")
    )
    text = (Path(__file__).parent / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Healthy ranges")[2].partition("\n## ")[0].strip()
    table = re.sub(r"\]\((?=[a-z_-]+\.md)", "](../", table)
    rows = []
    for group, charts in panels.items():
        for chart in charts:
            low, high = chart.get("low"), chart.get("high")
            healthy = " and ".join(
                f"{sign} {limit:g}"
                for sign, limit in (("&ge;", low), ("&le;", high))
                if limit is not None
            )
            names = ", ".join(f"`{name}`" for name in chart["metrics"])
            rows.append((group, names, chart["title"], healthy, chart.get("advice", "")))
    head = ("group", "metrics", "what it is", "healthy", "otherwise")
    return f"# Every metric\n\n## With its healthy range\n\n{table}\n\n## As charts\n\n" + _table(
        head, rows
    )


def _gallery() -> str:
    """Every shipped recipe by its first comment, and what it writes at most, from its numbers."""
    root = Path(__file__).parents[1] / "recipes"
    rows = []
    for path in sorted(root.rglob("*.yaml")):
        if path.parent.name in ("accelerate", "curate", "evaluate"):
            continue
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        comment = " ".join(re.match(r"(?:#.*\n)*", text)[0].replace("#", " ").split())
        told = re.split(r"(?<=[.:]) |(?= grace-rl | accelerate | pip )", comment)[0].strip(" :")
        if "stages" in recipe:
            rows.append((path, told, "stages", recipe.get("model_name_or_path", ""), "", "", ""))
            continue
        batch = recipe.get("per_device_train_batch_size", 8)
        batch *= recipe.get("gradient_accumulation_steps", 1)
        steps = recipe.get("max_steps", "")
        method = recipe.get("method", "grpo")
        written: Any = ""
        if METHODS[method].rollouts and steps:
            written = f"{batch * steps * recipe.get('max_completion_length', 256):,}"
        model = recipe.get("model_name_or_path", "")
        rows.append((path, told, method, model, batch, steps, written))
    lines = [(f"`{path.relative_to(root.parent)}`", *rest) for path, *rest in rows]
    head = ("recipe", "what it is", "method", "model", "examples a step", "steps")
    return "\n\n".join(
        [
            "# Gallery of recipes",
            "What a run costs is decided by the tokens that it writes and then learns from: at "
            "most examples x steps x the longest rationale, for one process. Divide by what your "
            "machine writes a second; a run's `time/rollout` and `time/train` say how much comes "
            "on top. Seconds that were measured are in [results.md](../results.md).",
            _table((*head, "tokens written at most"), lines),
        ]
    )


def _commands() -> str:
    """Every command with its options, as the parsers have them."""
    parsers = _parsers({name: import_module(f"grace_rl.commands.{name}") for name in COMMANDS})
    codes = (
        "Each also as `python -m grace_rl ...`. Exit codes: 0 done; 2 a mistake of the user's; 75 "
        "the vLLM server was lost and 130 interrupted, both saved; 1 a bug of ours."
    )
    parts = ["# Every command", codes]
    for name in COMMANDS:
        for title, parser in _with_verbs(f"grace-rl {name}", parsers[name]):
            parts += [f"## {title}", str(parser.description or "")]
            parts.append(_table(("argument", "meaning"), list(_arguments(parser))))
    return "\n\n".join(part for part in parts if part)


def _with_verbs(
    title: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield title, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help for choice in action._choices_actions}
            for verb, inner in action.choices.items():
                inner.description = inner.description or told.get(verb)
                yield f"{title} {verb}", inner


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = action.metavar if action.option_strings and action.nargs != 0 else ""
        if not value and action.option_strings and action.nargs != 0:
            value = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
        told = (action.help or "").replace("%%", "%")
        given = action.default not in (None, False, argparse.SUPPRESS, [])
        default = f" Default: `{action.default}`." if given and "default" not in told else ""
        yield f"`{f'{names} {value}'.strip()}`", f"{told}{default}"


def _python() -> str:
    parts = ["# Every public class"]
    for module, names in CLASSES.items():
        for name in names:
            thing = getattr(import_module(module), name)
            parts += [f"## {name}", f"`from {module} import {name}`", _documented(thing)]
    return "\n\n".join(parts)


def _documented(thing: Any) -> str:
    text = [_fence(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing):
        for name, member in sorted(vars(thing).items()):
            function = getattr(member, "__func__", member)
            if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
                told = _fence(f"{name}{_signature(function)}\n\n{inspect.getdoc(function)}")
                text.append(told)
    return "\n\n".join(text)


def _signature(function: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(function)))


def _fence(text: str) -> str:
    end = "\n" if ">>> " in text else ""  # an example ends at an empty line
    return f"```text\n{text}\n{end}```"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row] for row in rows]
    if not lines:
        return ""
    head = list(head)
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Write the pages anew."""
    os.chdir(Path(__file__).parents[1])
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        write_text(FOLDER / name, text)


if __name__ == "__main__":
    main()
