"""One table of what was written, from generation to the run directory.

A row is one rationale. Columns are filled in the order in which things happen: what was written,
how it is read (vectors), what rewards say, which advantage follows. Each step takes a table and
returns a fuller one; what a step has not filled yet is empty or NaN.

What rewards see are views of it (`grace_rl.reward.RewardBatch` and its pool), and what the run
directory keeps is the same table on disk (`to_arrow`, `from_arrow`; grace_rl/rollout/store.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa
import torch
from torch import Tensor

from grace_rl.data.bundles import RoleText
from grace_rl.rollout.columns import (
    lists,
    matrix,
    padded,
    prefix_columns,
    row_columns,
    row_texts,
    vector,
)
from grace_rl.rollout.store import NOTES, REWARD, arrow_table


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollouts:
    """N rationales with the texts that they were written for, and what became of them.

    Args:
        texts: the user's texts.
        rationales: what the policy wrote for them.
        roles: query, positive, negative, negative_positive, text or anchor.
        token_ids: the rationale's token ids, up to and including the first end token.
        example: (N,) long, the row's number in the data set.
        group: (N,) long; the rollouts of one text of one row share it, on every process.
        side: (N,) long; texts of one example with the same side mean the same. Query, positive,
            text and anchor are 0; the i-th negative and its paraphrase are 1 + i.
        truncated: (N,) bool, True where the rationale was cut off before its end token.
        embeddings: (N, D) float32, L2-normalised, of the policy that wrote the rationales; (N, 0)
            until they are read.
        prompts: the rendered prompts, as the policy read them; may be left out.
        columns: the other fields of the data rows, each a list of N; may be left out.
        prefix_embeddings: (N, K+1, D) float32, or None where no reward asks for them: the embedding
            without any rationale, then after each of K segments; the last is `embeddings`. A reader
            that sees the rationale only has zeros without one.
        prefix_ends: (N, K+1) long, or None: the number of rationale tokens in each prefix, from 0
            to all. A rationale too short for K segments is one: 0, n, ..., n.
        trained: (N,) bool, False for anchors, which are compared with and never trained on.
        scores: what each reward said, label -> (N,) float32, NaN = not scored.
        step_scores: (N, K+1) float32, the score of each prefix, where a reward scores steps.
        totals: (N,) float32, the weighted total, gates applied; NaN where nothing was scored.
        advantages: (N,) float32, the mean over the rationale's tokens where they differ.
        token_advantages: (N, T) float32, T the longest rationale, 0 after its end; None where all
            tokens have `advantages`.
        token_values: (N, T) float32, what a critic said before each token; NaN after a rationale's
            end and where a token does not count. None without a critic.
        token_kl: (N, T) float32, the KL to the reference that each token pays for. None without.
        step: the optimizer step that these rollouts train.
        seed: the run's.
        notes: what a replay needs to know of the step beside its rows, as JSON would hold it.

    Raises:
        ValueError: a column has the wrong length, shape or dtype.
    """

    texts: list[str]
    rationales: list[str]
    roles: list[str]
    token_ids: list[list[int]]
    example: Tensor
    group: Tensor
    side: Tensor
    truncated: Tensor
    embeddings: Tensor = field(default_factory=_nothing)
    prompts: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    prefix_embeddings: Tensor | None = None
    prefix_ends: Tensor | None = None
    trained: Tensor = field(default_factory=_nothing)
    scores: dict[str, Tensor] = field(default_factory=dict)
    step_scores: Tensor | None = None
    totals: Tensor = field(default_factory=_nothing)
    advantages: Tensor = field(default_factory=_nothing)
    token_advantages: Tensor | None = None
    token_values: Tensor | None = None
    token_kl: Tensor | None = None
    step: int = 0
    seed: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.texts)
        empty: dict[str, Tensor] = {
            "embeddings": torch.empty(count, 0),
            "trained": torch.ones(count, dtype=torch.bool),
            "totals": torch.full((count,), torch.nan),
            "advantages": torch.full((count,), torch.nan),
        }
        for name, value in empty.items():
            if getattr(self, name).shape == (0,):
                object.__setattr__(self, name, value.to(self.example.device))
        for name in ("rationales", "roles", "token_ids"):
            _check_length(self, name, getattr(self, name), count)
        _check_length(self, "prompts", self.prompts or [""] * count, count)
        for name, values in {**self.columns, **self.scores}.items():
            _check_length(self, f"columns['{name}']", values, count)
        for name in ("example", "group", "side"):
            _check_tensor(self, name, (count,), torch.long)
        for name in ("truncated", "trained"):
            _check_tensor(self, name, (count,), torch.bool)
        for name in ("totals", "advantages"):
            _check_tensor(self, name, (count,), torch.float32)
        _check_tensor(self, "embeddings", (count, None), torch.float32)
        for name in TOKENS:
            if getattr(self, name) is not None:
                _check_tensor(self, name, (count, None), torch.float32)
        if (self.prefix_embeddings is None) and self.step_scores is not None:
            raise ValueError(f"{type(self).__name__}.step_scores come with prefix_embeddings")
        if self.prefix_ends is None:
            if self.prefix_embeddings is not None:
                raise ValueError(f"{type(self).__name__}.prefix_embeddings come with prefix_ends")
            return
        _check_tensor(self, "prefix_ends", (count, None), torch.long)
        for name, shape in (
            ("prefix_embeddings", (*self.prefix_ends.shape, self.embeddings.shape[1])),
            ("step_scores", tuple(self.prefix_ends.shape)),
        ):
            if getattr(self, name) is not None:
                _check_tensor(self, name, shape, torch.float32)

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def to_write(
        cls, texts: Sequence[RoleText], anchors: Sequence[RoleText], device: torch.device
    ) -> Self:
        """A table of texts for which nothing is written yet: those to train on, then anchors."""
        rows = [*texts, *anchors]

        def column(name: str) -> Tensor:
            numbers = [getattr(row, name) for row in rows]
            return torch.tensor(numbers, dtype=torch.long, device=device)

        return cls(
            texts=[row.text for row in rows],
            rationales=[""] * len(rows),
            roles=[row.role for row in rows],
            token_ids=[[]] * len(rows),
            example=column("example"),
            group=column("group"),
            side=column("side"),
            truncated=torch.zeros(len(rows), dtype=torch.bool, device=device),
            trained=torch.tensor([i < len(texts) for i in range(len(rows))], device=device),
        )

    def with_scores(
        self, scores: Mapping[str, Tensor], totals: Tensor, step_scores: Tensor | None
    ) -> Self:
        """The table with what rewards say of its W trained rollouts, which come first.

        Args:
            scores: label -> (W,).
            totals: (W,).
            step_scores: (W, K+1), where a reward scores steps.
        """
        return dataclasses.replace(
            self,
            scores={label: self._column(values) for label, values in scores.items()},
            totals=self._column(totals),
            step_scores=None if step_scores is None else self._column(step_scores),
        )

    def with_advantages(self, advantages: Tensor) -> Self:
        """The table with the advantages of its W trained rollouts, which come first.

        Args:
            advantages: (W,), or (W, T) where tokens differ; then `advantages` is their mean.
        """
        if advantages.dim() == 1:
            return dataclasses.replace(
                self, advantages=self._column(advantages), token_advantages=None
            )
        lengths = torch.tensor([len(ids) for ids in self.token_ids[: len(advantages)]])
        written = torch.arange(advantages.shape[1]) < lengths[:, None]
        means = (advantages * written).sum(1) / lengths.clamp(min=1)
        return dataclasses.replace(
            self, advantages=self._column(means), token_advantages=self._column(advantages)
        )

    def _column(self, values: Tensor) -> Tensor:
        """A column of which the anchors, which come last, have nothing."""
        more = values.new_full((len(self) - len(values), *values.shape[1:]), torch.nan)
        return torch.cat([values, more])

    def take(self, rows: slice | Tensor) -> Self:
        """Some rows in some order; those of a slice are views."""
        numbers = torch.arange(len(self))[rows if isinstance(rows, slice) else rows.cpu()].tolist()

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows]
            if isinstance(value, dict):
                return {name: taken(column) for name, column in value.items()}
            return [value[i] for i in numbers] if value else value

        return dataclasses.replace(
            self, **{name: taken(getattr(self, name)) for name in row_fields(self)}
        )

    @property
    def trained_rows(self) -> Self:
        """The rollouts without the anchors."""
        return self.take(self.trained.nonzero()[:, 0])

    # -- between processes ---------------------------------

    def gather(
        self,
        anchors: int,
        gather: Callable[[Tensor], Tensor],
        gather_object: Callable[[list[Any]], list[Any]],
    ) -> Self:
        """The table of all processes: their trained rollouts in world order, then their anchors.

        Every process calls it with as many rows, before they are scored or have their columns.

        Args:
            anchors: how many anchors all have together; repeats that fill up a share are left out.
            gather, gather_object: accelerate's.
        """
        vectors = {
            name: gather(value)
            for name in ("embeddings", "prefix_embeddings")
            if (value := getattr(self, name)) is not None
        }
        numbers = ("example", "group", "side", "truncated", "trained", "prefix_ends")
        words = ("texts", "rationales", "roles", "token_ids", "prompts")
        own = {name: getattr(self, name) for name in words} | {
            name: value.tolist() for name in numbers if (value := getattr(self, name)) is not None
        }
        everybody = gather_object([own])
        world = {name: [v for part in everybody for v in part[name]] for name in own}
        place = [i for i, trained in enumerate(world["trained"]) if trained]
        place += [i for i, trained in enumerate(world["trained"]) if not trained][:anchors]
        device = self.example.device
        kept: dict[str, Any] = {name: [world[name][i] for i in place] for name in world}
        kept |= {
            name: torch.tensor(kept[name], dtype=getattr(self, name).dtype, device=device)
            for name in numbers
            if name in kept
        }
        rows = torch.tensor(place, device=device)
        kept |= {name: value[rows.to(value.device)] for name, value in vectors.items()}
        return dataclasses.replace(self, **kept, totals=_nothing(), advantages=_nothing())

    # -- on disk ---------------------------------

    def to_arrow(self) -> pa.Table:
        """The table as `SCHEMA` has it; vectors and scores are exactly these float32 numbers."""
        count = len(self)
        trained = self.trained.cpu()
        columns: dict[str, Any] = {
            "step": [self.step] * count,
            "example": self.example.tolist(),
            "group": self.group.tolist(),
            "role": self.roles,
            "text": self.texts,
            "rationale": self.rationales,
            "token_ids": self.token_ids,
            "truncated": self.truncated.tolist(),
            "advantage": self.advantages.cpu().numpy(),
            "step_scores": lists(self.step_scores, trained),
            "step_ends": lists(self.prefix_ends, trained),
            **{name: self._by_token(getattr(self, name), trained) for name in TOKENS},
            "embedding": lists(self.embeddings) if self.embeddings.shape[1] else None,
            "side": self.side.tolist(),
            "prompt": self.prompts or None,
            "row_columns": row_texts(self.columns, count),
            "total": self.totals.cpu().numpy(),
            "prefix_embeddings": lists(self.prefix_embeddings, trained),
        }
        columns |= {REWARD + label: values.cpu().numpy() for label, values in self.scores.items()}
        return arrow_table(columns, {"seed": self.seed, **self.notes})

    def _by_token(self, values: Tensor | None, there: Tensor) -> list[list[float] | None] | None:
        """One list per rollout, as long as it; None for those that are not `there`."""
        if values is None:
            return None
        rows = zip(values.tolist(), self.token_ids, there.tolist(), strict=True)
        return [row[: len(ids)] if kept else None for row, ids, kept in rows]

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Self:
        """What `to_arrow` gave; a file of an older version leaves out what it does not have.

        Raises:
            ValueError: there are no rows, or not of one step, or no embeddings.
        """
        steps = set(table["step"].to_pylist())
        if len(steps) != 1:
            raise ValueError(f"rollouts of one step are wanted, not of {sorted(steps)}")
        data = {name: table[name].combine_chunks() for name in table.schema.names}
        embeddings = matrix(data["embedding"])
        if embeddings is None or embeddings.isnan().any():
            raise ValueError("they were stored without embeddings")
        if data["side"].null_count:
            raise ValueError("they were stored without sides, by an older version")
        notes = json.loads((table.schema.metadata or {}).get(NOTES, b"{}"))
        whole: dict[str, Any] = {name: data[name].to_pylist() for name in _PLAIN}
        words: dict[str, Any] = {plural: whole[name] for plural, name in _LISTS.items()}
        tokens: dict[str, Any] = {name: padded(data[name], empty) for name, empty in TOKENS.items()}
        prefixes = prefix_columns(data, whole["token_ids"], embeddings)
        return cls(
            **words,
            **prefixes,
            example=torch.tensor(whole["example"]),
            group=torch.tensor(whole["group"]),
            side=torch.tensor(whole["side"]),
            truncated=torch.tensor(whole["truncated"]),
            embeddings=embeddings,
            prompts=[] if None in whole["prompt"] else whole["prompt"],
            columns={}
            if None in whole["row_columns"]
            else row_columns([json.loads(row) for row in whole["row_columns"]]),
            trained=torch.tensor(data["advantage"].is_valid().to_pylist()),
            scores={
                name.removeprefix(REWARD): vector(data[name])
                for name in data
                if name.startswith(REWARD)
            },
            totals=vector(data["total"]),
            advantages=vector(data["advantage"]),
            **tokens,
            step=steps.pop(),
            seed=notes.pop("seed", 0),
            notes=notes,
        )


TOKENS = {"token_advantages": 0.0, "token_values": torch.nan, "token_kl": 0.0}
"""Columns by token, and what stands in them after a rationale's end."""
_LISTS = {"texts": "text", "rationales": "rationale", "roles": "role", "token_ids": "token_ids"}
_PLAIN = (
    *_LISTS.values(),
    *("example", "group", "side", "truncated", "prompt", "row_columns"),
)
_WHOLE = ("step", "seed", "notes")  # of all rows alike


def row_fields(rollouts: Rollouts) -> list[str]:
    """The fields of a table that have an entry for each row."""
    names = [f.name for f in dataclasses.fields(Rollouts) if f.name not in _WHOLE]
    return [name for name in names if getattr(rollouts, name) is not None]


def _check_length(owner: object, name: str, values: Any, length: int) -> None:
    if len(values) != length:
        raise ValueError(
            f"{type(owner).__name__}.{name} has {len(values)} entries, expected {length}"
        )


def _check_tensor(
    owner: object, name: str, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    """`None` in `shape` allows any size."""
    tensor = getattr(owner, name)
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(
            f"{type(owner).__name__}.{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, "
            f"expected {wanted} and {dtype}"
        )
