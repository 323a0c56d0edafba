"""What a reader reads, and with which weights: the recipe's `reader`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from grace_rl.errors import UserError
from grace_rl.recipe.schema import Items, Section

Span = Literal["context", "rationale", "bottleneck", "joint"]
Pool = Literal["mean", "last"]


class ReaderConfig(Section):
    """What to read, and with which weights.

    Args:
        span: `context`, `rationale`, `bottleneck` or `joint`.
        weight: Of `joint`, how much a rationale's vector counts beside its text's, at least 0.
        learn_weight: Of `joint`: begin with `weight`, and follow what `reader_loss` is least at.
        layers: Hidden layers, 0 (input embeddings) to -1 (after the final norm). Left out they are
            `(0, -1)` for what is read alone (bottleneck, joint), else `(-1,)`. Several are
            normalised and added.
        centre: Subtract the running mean.
        pool: `mean` over the span's tokens, or its `last` token.
        weights: `policy` (the current weights), `frozen` (a copy from before training), or the name
            or path of a sentence-transformers model that embeds the written strings.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "reader"

    span: Span = "bottleneck"
    weight: float = Field(default=1.0, ge=0)
    learn_weight: bool = False
    layers: Items[int] = Field(default=(), min_length=1)
    centre: bool = True
    pool: Pool = "mean"
    weights: str = Field(default="policy", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("layers", ()) is None:
            return {key: value for key, value in values.items() if key != "layers"}
        return values

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.reads_with_language_model and self.span == "rationale":
            raise UserError(
                "span: a sentence encoder cannot read the rationale's tokens with the text in "
                "view; use bottleneck (the rationale alone), joint or context (text and rationale)"
            )
        if self.span != "joint" and (self.weight != 1.0 or self.learn_weight):
            raise UserError("weight and learn_weight: have an effect with span: joint only")
        if self.learn_weight and not self.weight:
            raise UserError("weight: one that is learned must begin above 0")
        if not self.layers:  # and stays a key that was not given
            object.__setattr__(self, "layers", (0, -1) if self.reads_alone else (-1,))
        return self

    def deciding_raw(self) -> dict[str, Any]:
        """What decides a raw vector, which is neither centred nor weighted, as plain data."""
        return self.model_dump(mode="json", exclude={"centre", "weight", "learn_weight"})

    @property
    def reads_alone(self) -> bool:
        """Whether a rationale is read with its text hidden."""
        return self.span in ("bottleneck", "joint")

    @property
    def parts(self) -> int:
        """How many vectors a raw one is made of: `joint` keeps text and rationale side by side."""
        return 2 if self.span == "joint" else 1

    @property
    def reads_with_language_model(self) -> bool:
        return self.weights in ("policy", "frozen")

    @property
    def in_context(self) -> bool:
        """Whether the vector comes from a forward over prompt and rationale together."""
        return self.reads_with_language_model and not self.reads_alone
