"""A curation recipe: YAML and overrides -> one validated, typed recipe, all mistakes together."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grace_rl.errors import UserError
from grace_rl.recipe.source import KeyPath, RecipeSource, read_source

if TYPE_CHECKING:
    from grace_rl.recipe.rows import DataConfig

Engine = Literal["vllm", "transformers"]
GeneratePrompts = Literal["instructions", "completion", "describe"]
RatePrompts = Literal["instructions", "completion"]
Rule = Literal["paper", "published-code"]
STEPS = ("generate", "rate", "filter", "guide")


@dataclass(frozen=True)
class GenerateStep:
    """How entailments and contradictions are written.

    Args:
        model_name_or_path: The language model; `scenes` is the cold start of the scenes world.
        engine: `vllm` for large batches, or `transformers`.
        prompts: `instructions` (a pool of instructions in the chat template, for models that follow
            them), `completion` (examples and a sentence to complete, for base models) or `describe`
            (the text alone in the chat template: an entailment is what the model writes about the
            text, a contradiction what it writes about the text in `opposite_column`).
        opposite_column: For `describe`: the column with a text that means something else.
        candidates: Sampled candidates of each side, at least 0; `greedy` adds one.
        greedy: Also the most likely one.
        temperature: Of the sampled candidates, above 0.
        top_p: Nucleus of the sampled candidates, in (0, 1].
        max_tokens: Longest candidate in tokens, at least 1; one that is cut off is dropped.
        max_text_tokens: Longer texts are cut here, at least 1.
        omega: Contrastive decoding, in [0, 1): logits of the intended instruction minus omega times
            those of the opposite one. 0 is off; 0.3 is usual. Engine transformers only.
        length_ratio: Shortest and longest candidate in words, over those of the text.
        max_overlap: A positive that shares more of its words with the text is a copy, in (0, 1].
        chat_template_kwargs: Keywords for the chat template, such as `{enable_thinking: false}`.
        dtype: Of the weights; `auto` is the model's own.
        batch_size: Prompts per batch of the transformers engine, at least 1.
    """

    model_name_or_path: str
    engine: Engine = "vllm"
    prompts: GeneratePrompts = "instructions"
    opposite_column: str | None = None
    candidates: int = 4
    greedy: bool = True
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 64
    max_text_tokens: int = 256
    omega: float = 0.0
    length_ratio: list[float] = field(default_factory=lambda: [0.4, 2.5])
    max_overlap: float = 0.9
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class RateStep:
    """How alike two texts are, from 0 to 5.

    Args:
        judge: `digits` (the expected value over the log-probabilities of the digits 0 to 5, both
            orders averaged), `likelihood` (5 plus the mean log-probability of a candidate's tokens
            given the text, at least 0; for models that can only continue), `encoder` (5 times the
            cosine of a sentence encoder), or `package.module:Name` or `path/to/file.py:Name` of a
            judge of your own.
        model_name_or_path: The judge's model; null is the generator's.
        engine: As for generate.
        prompts: `instructions` or `completion`, for `digits`.
        options: Keywords of a judge of your own.
        max_text_tokens, chat_template_kwargs, dtype, batch_size: As for generate.
    """

    judge: str = "digits"
    model_name_or_path: str | None = None
    engine: Engine = "vllm"
    prompts: RatePrompts = "instructions"
    options: dict[str, Any] = field(default_factory=dict)
    max_text_tokens: int = 256
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    batch_size: int = 64


@dataclass(frozen=True)
class FilterStep:
    """Which triplets stay: with a the rating of the positive, b of the negative.

    Args:
        alpha: Keep a >= alpha.
        beta: Keep b <= beta.
        gamma: Keep a >= b + gamma. Rule `paper` only.
        rule: `paper`, or `published-code`: what the released code does, ratings to one decimal, no
            text above 4.0 for a negative, and a != b in place of the gap.
        swap: Where the contradiction rates higher it becomes the positive. False drops such rows.
            Rule `paper` only.
    """

    alpha: float = 3.0
    beta: float = 3.0
    gamma: float = 1.0
    rule: Rule = "paper"
    swap: bool = True


@dataclass(frozen=True)
class GuideStep:
    """The frozen encoder behind the false-negative mask.

    Args:
        model_name_or_path: See `grace_rl.data.guide.load_encoder`.
    """

    model_name_or_path: str


@dataclass(frozen=True)
class CurationRecipe:
    """One validated curation recipe. A step that the file does not name is None and not done.

    Attributes:
        data: Where rows come from: `text` to generate for, or query, positive and negative.
        output_dir: Folder of the result; default `curated/<name of the file>`.
        chunk_rows: Rows that are worked on, and written, together.
        seed: Of the samples.
        path: The file.
    """

    data: DataConfig
    output_dir: Path
    chunk_rows: int
    seed: int
    generate: GenerateStep | None
    rate: RateStep | None
    filter: FilterStep | None
    guide: GuideStep | None
    path: Path


CLASSES: dict[str, Any] = {
    "generate": GenerateStep,
    "rate": RateStep,
    "filter": FilterStep,
    "guide": GuideStep,
}


def load_curation(path: str | Path, overrides: Sequence[str] = ()) -> CurationRecipe:
    """Read, override and check a curation recipe.

    Args:
        path: A YAML file.
        overrides: `--key value`, dots go deeper: `--generate.temperature 0.9`.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    from grace_rl.recipe.keys import OWN_KEYS, convert, nearest
    from grace_rl.recipe.rows import data_config

    source = read_source(path, overrides)
    data_keys = {key: hint for key, hint in OWN_KEYS.items() if key.startswith("dataset_")}
    hints = data_keys | {"output_dir": str, "chunk_rows": int, "seed": int}
    values: dict[str, Any] = {}
    for key, value in source.tree.items():
        if key in hints:
            try:
                values[key] = convert(value, hints[key])
            except TypeError as error:
                source.problems.append(source.problem((key,), str(error)))
        elif key not in CLASSES:
            known = [*hints, *CLASSES]
            message = f"unknown key{nearest(key, known)}; there are {', '.join(known)}"
            source.problems.append(source.problem((key,), message))
    steps = {name: _step(source, name) for name in STEPS}
    data = data_config(source, values)
    _check_steps(source, steps)
    if values.get("chunk_rows", 1) < 1:
        source.problems.append(source.problem(("chunk_rows",), "must be at least 1"))
    if source.problems:
        raise UserError(source.problems)
    return CurationRecipe(
        data=data,
        output_dir=Path(values.get("output_dir", f"curated/{source.path.stem}")),
        chunk_rows=values.get("chunk_rows", 256),
        seed=values.get("seed", 0),
        path=source.path,
        **steps,
    )


def _step(source: RecipeSource, name: str) -> Any:
    """One step's config, or None where it is absent or wrong."""
    from grace_rl.recipe.keys import convert, nearest

    tree = source.tree.get(name)
    if tree is None and not (name == "filter" and name in source.tree):
        return None
    if not isinstance(tree, dict | None):
        message = "must be a mapping (key: value)"
        source.problems.append(source.problem((name,), message))
        return None
    kind = CLASSES[name]
    hints = typing.get_type_hints(kind)
    before, values = len(source.problems), {}
    for key, value in (tree or {}).items():
        if key not in hints:
            message = f"unknown key{nearest(key, hints)}; there are {', '.join(hints)}"
            source.problems.append(source.problem((name, key), message))
            continue
        try:
            values[key] = convert(value, hints[key])
        except TypeError as error:
            source.problems.append(source.problem((name, key), str(error)))
    needed = [f.name for f in dataclasses.fields(kind) if _is_required(f)]
    for key in needed:
        if not (tree or {}).get(key):
            source.problems.append(source.problem((name, key), "is missing"))
    if len(source.problems) > before:
        return None
    return kind(**values)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _check_steps(source: RecipeSource, steps: dict[str, Any]) -> None:
    """What each step's values must fulfil, and what steps need of each other."""

    def problem(path: KeyPath, message: str) -> None:
        source.problems.append(source.problem(path, message))

    if not any(name in source.tree for name in STEPS):
        problem((), f"names no step; there are {', '.join(STEPS)}")
    for name, key, low in (
        ("generate", "max_tokens", 1),
        ("generate", "max_text_tokens", 1),
        ("generate", "batch_size", 1),
        ("generate", "candidates", 0),
        ("rate", "max_text_tokens", 1),
        ("rate", "batch_size", 1),
    ):
        if steps[name] is not None and getattr(steps[name], key) < low:
            problem((name, key), f"must be at least {low}, not {getattr(steps[name], key)}")
    for name in ("generate", "rate"):
        if steps[name] is not None:
            _check_model(steps[name].model_name_or_path, (name, "model_name_or_path"), problem)
    if steps["generate"] is not None:
        _check_generate(steps["generate"], problem)
    if steps["rate"] is not None:
        _check_rate(steps["rate"], steps["generate"], problem)
    if steps["filter"] is not None:
        if "rate" not in source.tree:
            problem(("filter",), "needs ratings: add a rate step")
        if steps["filter"].rule == "published-code":
            for key in ("gamma", "swap"):
                if key in (source.tree["filter"] or {}):
                    problem(("filter", key), "the published code has no such setting; remove it")


def _check_model(name: str | None, path: KeyPath, problem: Any) -> None:
    from grace_rl.recipe.rows import looks_like_path

    if name and looks_like_path(name) and not Path(name).is_dir():
        problem(path, f"there is no folder {name}; paths start at {Path.cwd()}")


def _check_generate(step: GenerateStep, problem: Any) -> None:
    at = ("generate",)
    if step.engine == "vllm" and step.omega:
        problem(
            (*at, "omega"),
            "vLLM cannot do contrastive decoding: a logits processor sees the logits of one step, "
            "and nothing keeps a request and its opposite in the same step; use engine: "
            "transformers, or leave it out and let the filter choose among more candidates",
        )
    if not 0 <= step.omega < 1:
        problem((*at, "omega"), f"must be from 0 to below 1, not {step.omega}")
    if step.temperature <= 0:
        problem((*at, "temperature"), f"must be above 0, not {step.temperature}")
    for key in ("top_p", "max_overlap"):
        if not 0 < getattr(step, key) <= 1:
            problem((*at, key), f"must be above 0 and at most 1, not {getattr(step, key)}")
    if not (step.greedy or step.candidates):
        problem((*at, "candidates"), "must be at least 1 without greedy")
    ratio = step.length_ratio
    if len(ratio) != 2 or not 0 <= ratio[0] < ratio[1]:
        problem((*at, "length_ratio"), f"must be two numbers, low and high, not {ratio}")
    if (step.prompts == "describe") != (step.opposite_column is not None):
        problem((*at, "opposite_column"), "belongs to prompts: describe, which needs it")


def _check_rate(step: RateStep, generate: GenerateStep | None, problem: Any) -> None:
    from grace_rl.curate.judges import JUDGES

    if step.judge not in JUDGES and ":" not in step.judge:
        known = ", ".join(JUDGES)
        problem(
            ("rate", "judge"),
            f"must be one of {known}, or package.module:Name or path/to/file.py:Name, "
            f"not {step.judge!r}",
        )
    if step.options and ":" not in step.judge:
        problem(("rate", "options"), "are for a judge of your own; remove it")
    needs_model = step.judge in JUDGES and step.model_name_or_path is None
    if needs_model and (generate is None or step.judge == "encoder"):
        problem(("rate", "model_name_or_path"), f"is missing; the judge {step.judge} needs one")


def settings(step: Any) -> dict[str, Any]:
    """A step's values as plain data."""
    found: dict[str, Any] = dataclasses.asdict(step)
    return found
