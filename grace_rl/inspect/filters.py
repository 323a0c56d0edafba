"""Which rollouts: one filter for the page's addresses, the terminal's options and notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from grace_rl.errors import UserError
from grace_rl.inspect.database import quoted
from grace_rl.inspect.patterns import PATTERNS, WORD
from grace_rl.rollout.store import REWARD

_CONDITION = re.compile(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*")
_STEPS = re.compile(r"([0-9]{0,18})\s*(?:(-)\s*([0-9]{0,18}))?")


@dataclass(frozen=True)
class Filter:
    """What rollouts must be; what is None does not matter.

    Attributes:
        step: An optimizer step, or the first and last of several, each of which may be None.
        role: `query`, `positive`, `negative`, ...
        text: What the text or the rationale contains, in any case of letters.
        example: Row of the data set.
        group: Within a step.
        truncated: Whether the rationale never ended.
        empty: Whether nothing was written.
        score: Conditions such as `contrastive >= 0.5, advantage < 0`: a reward's label, `advantage`
            or `tokens`, compared with a number.
        word: A whole word of the rationale, in any case of letters.
        pattern: One of `grace_rl.inspect.patterns.PATTERNS`, such as `repetition`.

    >>> Filter(step=(10, None), text="red fox").query()
    'step=10-&text=red+fox'
    >>> Filter.from_query({"step": "10-20"}) == Filter(step=(10, 20))
    True
    """

    step: int | tuple[int | None, int | None] | None = None
    role: str | None = None
    text: str | None = None
    example: int | None = None
    group: int | None = None
    truncated: bool | None = None
    empty: bool | None = None
    score: str | None = None
    word: str | None = None
    pattern: str | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Filter:
        """From the parameters of an address; unknown and empty ones are left out.

        Raises:
            UserError: With every value that cannot be read.
        """
        problems: list[str] = []
        given = {name: query[name].strip() for name in _READERS if query.get(name, "").strip()}
        values: dict[str, Any] = {}
        for name, value in given.items():
            try:
                values[name] = _READERS[name](value)
            except UserError as error:
                problems += error.problems
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise UserError(problems)
        return cls(**values)

    def query(self, **more: Any) -> str:
        """As the parameters of an address."""
        values = {**{name: _written(getattr(self, name)) for name in _READERS}, **more}
        return urlencode({name: v for name, v in values.items() if v not in (None, "")})

    def conditions(self) -> Iterator[tuple[str, str, float]]:
        """What `score` says: column, operator, number.

        >>> list(Filter(score="length >= 0.5, advantage < 0").conditions())
        [('reward/length', '>=', 0.5), ('advantage', '<', 0.0)]

        Raises:
            UserError: It cannot be read.
        """
        for part in (self.score or "").split(","):
            if not part.strip():
                continue
            match = _CONDITION.fullmatch(part)
            try:
                if match is None:
                    raise ValueError
                own = match[1] in ("advantage", "tokens", "total")
                yield match[1] if own else REWARD + match[1], match[2], float(match[3])
            except ValueError:
                raise UserError(
                    f"score: cannot read {part.strip()!r}; write for example contrastive >= 0.5"
                ) from None

    def sql(self) -> tuple[list[str], list[Any]]:
        """Conditions on the table `rollouts` (`pattern` needs the table `patterns` too), and the
        values of their question marks.

        >>> Filter(step=(10, None), role="query").sql()
        (['step >= ?', '"role" = ?'], [10, 'query'])

        Raises:
            UserError: `score` or `pattern` cannot be read.
        """
        asked: list[tuple[str, list[Any]]] = []
        first, last = self.step if isinstance(self.step, tuple) else (self.step, self.step)
        for end, compared in ((first, ">="), (last, "<=")):
            if end is not None:
                asked.append((f"step {compared} ?", [end]))
        for name in ("role", "example", "group", "truncated"):
            if (value := getattr(self, name)) is not None:
                asked.append((f"{quoted(name)} = ?", [value]))
        if self.empty is not None:
            asked.append(("(trim(rationale) = '') = ?", [self.empty]))
        if self.text:
            either = "contains(lower(text), lower(?)) OR contains(lower(rationale), lower(?))"
            asked.append((f"({either})", [self.text, self.text]))
        if self.pattern is not None:
            if self.pattern not in PATTERNS:
                raise UserError(f"pattern: must be one of {', '.join(PATTERNS)}")
            showing = f"SELECT (step, row) FROM patterns WHERE {quoted(self.pattern)}"
            asked.append((f"(step, row) IN ({showing})", []))
        if self.word:
            words = "regexp_extract_all(lower(rationale), ?)"
            asked.append((f"list_contains({words}, lower(?))", [WORD, self.word]))
        for column, compared, number in self.conditions():
            asked.append((f"{quoted(column)} {compared} ?", [number]))
        return [condition for condition, _ in asked], [v for _, values in asked for v in values]


def _steps(value: str) -> int | tuple[int | None, int | None]:
    match = _STEPS.fullmatch(value)
    if match is None or not (match[1] or match[3]):
        raise ValueError(f"cannot read {value!r}; write 10, 10-50, 10- or -50")
    if not match[2]:
        return int(match[1])
    return (int(match[1]) if match[1] else None, int(match[3]) if match[3] else None)


def _whole(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", value):
        raise ValueError(f"must be a whole number, not {value!r}")
    return int(value)


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"must be true or false, not {value!r}")
    return value == "true"


def _score(value: str) -> str:
    list(Filter(score=value).conditions())
    return value


_READERS: dict[str, Any] = {
    "step": _steps,
    "role": str,
    "text": str,
    "example": _whole,
    "group": _whole,
    "truncated": _truth,
    "empty": _truth,
    "score": _score,
    "word": str,
    "pattern": str,
}


def _written(value: Any) -> str | None:
    if isinstance(value, tuple):
        return "-".join("" if end is None else str(end) for end in value)
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)
