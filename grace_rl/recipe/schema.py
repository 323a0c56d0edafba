"""The base of every typed section, and how mistakes in one become sentences with a place.

A section is a pydantic model. Ranges, choices and types stand in its fields; a rule of several
fields is a validator that raises `UserError`, every problem beginning with its key:

    class Shaping(Section):
        recipe_key = "shaping"

        gae_lambda: float = Field(1.0, ge=0, le=1)
        penalty: float = Field(0.0, ge=0)
        margin: float | None = Field(None, ge=0)
        layers: Items[int] = (0, -1)          # a tuple; YAML's and Python's lists are taken

        @model_validator(mode="after")
        def _rules(self) -> Self:
            if self.margin is not None and not self.penalty:
                raise UserError("margin: has no effect without penalty")
            return self

Sections are frozen; unknown keys, numbers that are not finite, booleans or fractions for whole
numbers and texts for numbers are mistakes. A section is made

- by Python users: `Shaping(penalty=0.1)`, which raises `UserError` with every mistake, each
  `shaping.key: message`; nested sections may be given as mappings;
- from a mapping or a section, whichever the user gave: `Shaping.of(values)`, raises the same;
- from a file: `section = read_section(Shaping, source, ("shaping",))` puts every mistake with its
  file and line (or `--key`) into `source.problems` and returns None where there is one.

`section.given()` has what was given, as plain data; `section.model_dump()` has everything, and
`section.changed(key=value)` is a checked copy.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, ValidationError, field_validator

from grace_rl.errors import UserError

if TYPE_CHECKING:
    from grace_rl.recipe.source import RecipeSource

KeyPath = tuple[str | int, ...]
T = TypeVar("T")
S = TypeVar("S", bound="Section")

Items = Annotated[tuple[T, ...], Strict(False)]
"""A tuple, given as a list or a tuple."""

FilePath = Annotated[Path, Strict(False), AfterValidator(Path.expanduser)]
"""A path, given as a text; `~` is the home directory."""

MOST_EXACT = 2**53
"""Whole numbers beyond it are rounded by the floats and seeds that they end up in."""

CHECKS = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
"""How every value is checked, in sections and in the fields of TRL's configs."""


RENAMED = {
    "batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_length",
    "max_prompt_length": "max_text_tokens",
    "max_seq_length": "max_text_tokens",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "torch_dtype": "dtype",
    "warmup_ratio": "warmup_steps (a share of the steps below 1)",
}
"""What others, or earlier versions, call a key."""


class Section(BaseModel):
    """One typed part of what a user gave; see the module.

    Attributes:
        recipe_key: The key that it stands under in a recipe; mistakes of Python users begin with
            it.
    """

    model_config = ConfigDict(**CHECKS, extra="forbid", frozen=True, protected_namespaces=())

    recipe_key: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            place = (self.recipe_key,) if self.recipe_key else ()
            raise UserError(
                [
                    f"{dotted((*place, *path))}: {message}" if (*place, *path) else message
                    for path, message in mistakes(error, values, type(self))
                ]
            ) from None

    # Nested sections are then validated in place, not each by a call of its own.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def of(cls, values: Self | Mapping[str, Any]) -> Self:
        """The section that a user gave, or the one of a mapping."""
        return values if isinstance(values, cls) else cls(**_mapping(values, cls.recipe_key))

    def given(self) -> dict[str, Any]:
        """What was given, as plain data; `type(self)(**self.given())` is equal."""
        return self.model_dump(mode="json", exclude_unset=True)

    def changed(self, **values: Any) -> Self:
        """A copy with some values changed, and checked."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | values)

    @field_validator("*", mode="before")
    @classmethod
    def _exact(cls, value: Any) -> Any:
        return exact(value)


def exact(value: Any) -> Any:
    """The value, unless it is a number that would be rounded on its way.

    Raises:
        ValueError: With what it must be.
    """
    if type(value) in (int, float) and abs(value) > MOST_EXACT:
        raise ValueError(f"must be at most 2^53 in size, not {shown(value)}")
    return value


def read_section(cls: type[S], source: RecipeSource, path: KeyPath) -> S | None:
    """The section that was written at a path of a file; nothing there is an empty mapping.

    Its mistakes go to `source.problems`. Returns None where there is one.
    """
    values: Any = source.tree
    for part in path:
        values = values.get(part) if isinstance(values, dict) else values[part]
    return validated(cls, {} if values is None else values, source, path)


def validated(kind: Any, values: Any, source: RecipeSource, path: KeyPath = ()) -> Any:
    """A value as a section class or a `TypeAdapter` has it; mistakes go to `source.problems`."""
    model = kind if isinstance(kind, type) and issubclass(kind, Section) else None
    try:
        return model.model_validate(values) if model else kind.validate_python(values)
    except ValidationError as error:
        for inner, message in mistakes(error, values, model):
            source.add((*path, *inner), message)
        return None


def mistakes(
    error: ValidationError, values: Any, model: type[Section] | None = None
) -> list[tuple[KeyPath, str]]:
    """What pydantic found, one sentence for each wrong value.

    Args:
        error: What it raised.
        values: What was validated.
        model: The section class, whose keys are suggested for unknown ones.

    Returns:
        (path of the key, what to do), in the order of the fields.
    """
    wanted: dict[KeyPath, list[str]] = {}  # "must be ...": a value may be wrong in several ways
    inputs: dict[KeyPath, Any] = {}
    others: list[tuple[KeyPath, str]] = []
    for one in error.errors(include_url=False):
        kind, context = one["type"], one.get("ctx", {})
        path = _path_of(one["loc"], values, kind)
        if kind == "extra_forbidden":
            keys = list(_fields(_section_at(model, path[:-1]))) if model else []
            others.append((path, unknown_key(path[-1], keys)))
        elif kind == "missing":
            others.append((path, "is missing"))
        elif isinstance(context.get("error"), UserError):
            for problem in context["error"].problems:
                key, message = split_key(problem)
                others.append(((*path, *key), message))
        elif kind == "value_error":
            others.append((path, str(context["error"])))
        else:
            phrase = _PHRASES.get(kind, "").format(**context) or one["msg"]
            phrases = wanted.setdefault(path, [])
            if kind == "literal_error":
                phrase = phrase.replace("'", "").replace(" or ", ", ")
            if phrase not in phrases:
                phrases.append(phrase)
            inputs[path] = one["input"]
    musts = [
        (path, f"must be {' or '.join(phrases)}, not {shown(inputs[path])}")
        for path, phrases in wanted.items()
        # An item of a list that could also be a text: say what is wrong with the item.
        if not any(len(other) > len(path) and other[: len(path)] == path for other in wanted)
    ]
    return list(dict.fromkeys(musts + others))


_PHRASES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "literal_error": "one of {expected}",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "path_type": "a path",
}


def _path_of(location: Iterable[str | int], values: Any, kind: str) -> KeyPath:
    """pydantic's location without the names of a union's members."""
    path: list[str | int] = []
    for part in location:
        if isinstance(values, Section):
            values = values.given()
        if isinstance(values, list | tuple):
            inside = isinstance(part, int) and part < len(values)
        else:
            inside = isinstance(values, Mapping) and part in values
        if inside:
            values = values[part]
        elif kind != "missing":
            continue
        path.append(part)
    return tuple(path)


def _section_at(model: type[Section], path: KeyPath) -> type[Section]:
    for part in path:
        model = section_in(_fields(model).get(str(part))) or model
    return model


def _fields(model: type[Section]) -> dict[str, Any]:
    """Key as it is written -> annotation."""
    return {one.alias or name: one.annotation for name, one in model.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """The section class that an annotation names, such as `dict[str, RoleConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (section_in(argument) for argument in typing.get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _mapping(values: Any, key: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{key}: must be a mapping (key: value), not {shown(values)}")
    return {str(name): value for name, value in values.items()}


def unknown_key(key: Any, known: Iterable[str]) -> str:
    """What to say of a key that nobody knows.

    >>> unknown_key("wieght", ["weight", "temperature"])
    'unknown key; did you mean weight?; there are weight, temperature'
    """
    names = list(known)
    return f"unknown key{nearest(key, names)}" + (
        f"; there are {', '.join(names)}" if names else ""
    )


def unknown_recipe_key(key: str, known: Sequence[str]) -> str:
    """What to say of a key that no recipe has.

    >>> unknown_recipe_key("torch_dtype", ["dtype"]), unknown_recipe_key("sead", ["seed"])
    ('unknown key; it is called dtype', 'unknown key; did you mean seed?')
    """
    renamed = RENAMED.get(key, "")
    if renamed.partition(" ")[0] in known:
        return f"unknown key; it is called {renamed}"
    return f"unknown key{nearest(key, known)}"


def nearest(key: Any, names: Iterable[Any]) -> str:
    """`; did you mean NAME?`, or nothing where no name is near."""
    close = difflib.get_close_matches(str(key), [str(name) for name in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def dotted(path: KeyPath) -> str:
    """`("rewards", 0, "weight")` -> `rewards.0.weight`."""
    return ".".join(str(part) for part in path)


def split_key(problem: str) -> tuple[KeyPath, str]:
    """A problem's key and message; no key where it begins with none.

    >>> split_key("rewards[0].weight: must be a number")
    (('rewards', 0, 'weight'), 'must be a number')
    """
    match = re.match(r"([A-Za-z_][\w.-]*(?:\[\d+\][\w.-]*)*)(?: \([^)]*\))?: ", problem)
    if match is None:
        return (), problem
    words = match[1].replace("[", ".").replace("]", "").split(".")
    return tuple(int(word) if word.isdigit() else word for word in words), problem[match.end() :]


def shown(value: Any) -> str:
    """A value in a message: on one line, and short."""
    if type(value) is int and abs(value) > MOST_EXACT:
        return "a number of more than 15 digits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
