"""The `rewards` of a recipe: what each entry may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from grace_rl.recipe.schema import Section, shown, validated
from grace_rl.recipe.source import RecipeSource, read_source


class RewardSpec(Section):
    """One entry of a recipe's `rewards`.

    Args:
        name: An entry point's name, `package.module:Name` or `path/to/file.py:Name`.
        weight: Factor in the total; 0 only logs the reward (and switches its gate off).
        on_error: `raise` ends the run; `abstain` leaves the rows unscored by this reward.
        timeout: Seconds for one call, above 0; None is no limit. A call that takes longer is an
            error.
        label: The name in metrics; the default is the name's last part.
        keywords: Arguments of the class or function. In a recipe they stand beside the other keys.

    Raises:
        UserError: With every mistake in the values, but for the keywords, which `load_rewards`
            compares with the reward's signature.
    """

    recipe_key = "rewards"

    name: str
    weight: float = 1.0
    on_error: Literal["raise", "abstain"] = "raise"
    timeout: float | None = Field(None, gt=0)
    label: str | None = None
    keywords: dict[Any, Any] = {}  # keys that are no texts are told as unknown arguments

    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(name=name, **values)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # see Section

    @field_validator("label")
    @classmethod
    def _one_word(cls, label: str | None) -> str | None:
        if label is not None and (not label or set(label) & set("/ ")):
            raise ValueError(f"must not be empty or contain '/' or a space, as {label!r}")
        return label

    def entry(self) -> dict[str, Any]:
        """As it is written in a recipe."""
        values = self.model_dump(exclude_none=True)
        keywords: dict[str, Any] = values.pop("keywords")
        return values | keywords


def reward_specs(source: RecipeSource) -> list[RewardSpec]:
    """The entries of `rewards`; what is wrong with them goes to the source."""
    source.missing("rewards", "give at least one, for example [{name: contrastive}]")
    entries = source.tree.get("rewards") or []
    if not isinstance(entries, list):
        source.add(
            ("rewards",), f"must be a list, such as [{{name: contrastive}}], not {shown(entries)}"
        )
        entries = []
    specs = []
    reserved = set(RewardSpec.model_fields) - {"keywords"}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            source.add(("rewards", i), f"must be a mapping (name: ...), not {shown(entry)}")
            continue
        own = {key: value for key, value in entry.items() if key in reserved}
        own["keywords"] = {key: value for key, value in entry.items() if key not in reserved}
        name = str(entry.get("name", ""))
        place, colon, attribute = name.rpartition(":")
        # A file is relative to the recipe, and made absolute so that a run's copy still finds it.
        if colon and place.endswith(".py"):
            name = own["name"] = f"{(source.path.parent / place).resolve()}:{attribute}"
        spec = validated(RewardSpec, own, source, ("rewards", i))
        if not name:
            source.unreadable.add(("rewards", i))
        specs.append(spec or RewardSpec(name, keywords=own["keywords"]))
    return specs


def read_rewards(path: str | Path) -> list[RewardSpec]:
    """Only the `rewards` of a YAML file, which may be a whole recipe or have nothing else.

    Raises:
        UserError: There are none, or an entry is wrong.
    """
    source = read_source(path)
    return source.settled(reward_specs(source))
