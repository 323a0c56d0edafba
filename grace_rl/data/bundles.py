"""From rows to the rollouts of one generation batch.

A row's texts play roles. The texts of trained roles are rolled out `num_generations` times each;
all of a row's rollouts form its bundle, and a bundle never leaves its generation batch, so that
rewards find every counterpart in the pool.
Texts of untrained roles are anchors: written once per row and batch, compared with, never trained
on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from grace_rl.errors import UserError
from grace_rl.recipe.roles import RoleConfig, role_problems


@dataclass(frozen=True)
class Role:
    """A role: how many rationales each of its texts gets; whether the policy learns from them."""

    name: str
    samples: int
    train: bool


@dataclass(frozen=True)
class RoleText:
    """One text of one row.

    Attributes:
        role: Name of the role.
        text: The text itself.
        example: Row number in the data set.
        group: Number of this text, unique over the data set: rollouts of one text share it.
        side: Texts of one row with the same side mean the same: 0 for query, positive, text and
            anchor, 1 + i for the i-th negative, 1 for its paraphrase.
    """

    role: str
    text: str
    example: int
    group: int
    side: int


def parse_roles(roles: Mapping[str, RoleConfig], num_generations: int) -> list[Role]:
    """The roles in the order of the recipe, each with its number of rationales.

    Raises:
        UserError: With every mistake: supervised and unsupervised roles mixed, no trained role, or
            a trained role whose `samples` is not `num_generations`.
    """
    problems = list(role_problems(roles, num_generations))
    if problems:
        raise UserError(problems)
    return [
        Role(name, role.samples or (num_generations if role.train else 1), role.train)
        for name, role in roles.items()
    ]


class Bundles:
    """The texts of every row by role, and the data set of prompts that TRL iterates over.

    Args:
        rows: Rows as `grace_rl.data.rows.read_rows` returns them.
        roles: From `parse_roles`.

    Raises:
        UserError: Rows lack the text of a trained role (all such rows are named).
    """

    def __init__(self, rows: Sequence[dict[str, Any]], roles: Sequence[Role]) -> None:
        self.rows = rows
        self.roles = list(roles)
        self.trained = [role for role in self.roles if role.train]
        texts = [self._texts(example, row) for example, row in enumerate(rows)]
        stride = max((len(row) for row in texts), default=1)
        problems = []
        self.anchors: list[list[tuple[RoleText, int]]] = []
        self.prompts: list[RoleText] = []
        for example, row_texts in enumerate(texts):
            numbered = [
                RoleText(role, text, example, example * stride + slot, side)
                for slot, (role, text, side) in enumerate(row_texts)
            ]
            for role in self.trained:
                found = [t for t in numbered if t.role == role.name]
                if not found:
                    problems.append(
                        f"row {example}: has no '{role.name}', "
                        "a trained role needs one in every row"
                    )
                self.prompts.extend(found[:1])
            self.anchors.append(
                [
                    (t, role.samples)
                    for role in self.roles
                    if not role.train
                    for t in numbered
                    if t.role == role.name
                ]
            )
        if problems:
            shown = problems[:20] + (
                [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            )
            raise UserError(shown)

    def prompts_of(self, example: int) -> list[RoleText]:
        """The trained texts of a row."""
        count = len(self.trained)
        return self.prompts[example * count : (example + 1) * count]

    def _texts(self, example: int, row: dict[str, Any]) -> list[tuple[str, str, int]]:
        """`(role, text, side)` of every text of a row that some role of the recipe asks for."""
        wanted = {role.name for role in self.roles}
        if "text" in row:
            found = [("text", row["text"], 0), ("anchor", row["text"], 0)]
        else:
            negatives = row.get("negative") or []
            negatives = [negatives] if isinstance(negatives, str) else negatives
            found = [
                (role, row[role], side)
                for role, side in (("query", 0), ("positive", 0), ("negative_positive", 1))
                if row.get(role)
            ]
            found += [("negative", negative, 1 + i) for i, negative in enumerate(negatives)]
        return [text for text in found if text[0] in wanted]

    def anchors_of(self, examples: Iterable[int]) -> list[RoleText]:
        """The anchors of these rows, each as often as it is written."""
        return [
            text
            for example in examples
            for text, samples in self.anchors[example]
            for _ in range(samples)
        ]

    def sampler(
        self, key: str, batch_size: int, samples: int, repeat_count: int = 1, **order: Any
    ) -> BundleSampler:
        """Prompt numbers of batches of whole bundles.

        Args:
            key: What the user sets `batch_size` by.
            batch_size: Rollouts of a batch, on all processes.
            samples: Rollouts of each text.
            repeat_count, order: As in `BundleSampler`.

        Raises:
            UserError: Whole bundles do not fill a batch.
        """
        bundle = len(self.trained) * samples
        if batch_size % bundle:
            raise UserError(
                f"{key} = {batch_size} must be a multiple of trained roles x samples = "
                f"{len(self.trained)} x {samples} = {bundle}"
            )
        return BundleSampler(
            rows=len(self.rows),
            texts_per_row=len(self.trained),
            samples=samples,
            rows_per_batch=batch_size // bundle,
            repeat_count=repeat_count,
            **order,
        )

    def dataset(self) -> Any:
        """A `datasets.Dataset`: an item per trained text, the texts of a row next to each other."""
        from datasets import Dataset  # a look before a run, or at a reward, needs none

        return Dataset.from_dict(
            {
                "prompt": [t.text for t in self.prompts],
                "prompt_number": list(range(len(self.prompts))),
            }
        )


class BundleSampler(Sampler[int]):
    """Yields prompt numbers so that every generation batch holds whole bundles.

    Rows are shuffled per epoch; a generation batch is `rows_per_batch` rows, each row's texts
    `samples` times in a row. Each batch is repeated `repeat_count` times in all, because TRL uses
    one generation batch for several steps. Rows that do not fill a last batch are left out of that
    epoch. The order depends on `seed` and epoch only, so a resumed run continues in the same order.

    >>> list(BundleSampler(rows=2, texts_per_row=2, samples=2, rows_per_batch=1,
    ...                    repeat_count=1, shuffle=False))
    [0, 0, 1, 1, 2, 2, 3, 3]
    """

    def __init__(
        self,
        *,
        rows: int,
        texts_per_row: int,
        samples: int,
        rows_per_batch: int,
        repeat_count: int,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.rows = rows
        self.texts_per_row = texts_per_row
        self.samples = samples
        self.rows_per_batch = rows_per_batch
        self.repeat_count = repeat_count
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.rows)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.rows, generator=generator)
        for start in range(0, self.rows - self.rows_per_batch + 1, self.rows_per_batch):
            batch = [
                row * self.texts_per_row + text
                for row in order[start : start + self.rows_per_batch].tolist()
                for text in range(self.texts_per_row)
                for _ in range(self.samples)
            ]
            for _ in range(self.repeat_count):
                yield from batch

    def __len__(self) -> int:
        batches = self.rows // self.rows_per_batch
        return batches * self.rows_per_batch * self.texts_per_row * self.samples * self.repeat_count
