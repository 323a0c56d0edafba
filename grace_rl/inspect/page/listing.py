"""A list of rollouts or groups as its address says it, and the way through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import address
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD

ROWS = 50


@dataclass(frozen=True)
class Listing:
    """Which rollouts or groups of a run, in which order, and which page of them.

    Attributes:
        run: The run.
        chosen: Which rollouts.
        groups: Whether groups are listed instead.
        sort, descending: Column and direction.
        page: From 1.
    """

    run: Run
    chosen: Filter
    groups: bool = False
    sort: str = "step"
    descending: bool = False
    page: int = 1

    @classmethod
    def read(cls, run: Run, query: Mapping[str, str]) -> Listing:
        """From the parameters of an address.

        Raises:
            UserError: With every value that cannot be read.
        """
        groups = query.get("show") == "groups"
        page = max(1, whole(query, "page")) if query.get("page") else 1
        one = cls(run, Filter.from_query(query), groups, "step", query.get("order") == "down", page)
        sort = query.get("sort") or "step"
        return replace(one, sort=sort if sort in one.sorts() else "step")

    def sorts(self) -> list[str]:
        """What it can be sorted by."""
        labels = self.run.rewards
        if self.groups:
            return ["step", "spread", *(f"spread/{label}" for label in labels)]
        return ["step", "advantage", "total", "tokens", *(REWARD + label for label in labels)]

    def query(self, **more: Any) -> str:
        """The parameters that stand for it."""
        return self.chosen.query(
            show="groups" if self.groups else None,
            sort=None if self.sort == "step" else self.sort,
            order="down" if self.descending else None,
            **more,
        )

    def address(self, page: int | None = None) -> str:
        """Where it is shown; its own page if none is given."""
        page = page or self.page
        more = self.query(run=self.run.name, page=None if page == 1 else page)
        return f"/rollouts?{more}"

    def sorted_by(self, name: str) -> str:
        """Where it is shown sorted by a column; twice the same turns the order round."""
        down = not self.descending if name == self.sort else name != "step"
        return replace(self, sort=name, descending=down, page=1).address()

    def count(self) -> int:
        """How many there are."""
        return (self.run.count_groups if self.groups else self.run.count)(self.chosen)

    def rows(self, limit: int | None = None, offset: int = 0) -> pd.DataFrame:
        """Those from `offset` on; `at` is the place of each in the whole list."""
        ask: Any = self.run.groups if self.groups else self.run.rollouts
        rows = ask(
            self.chosen,
            sort=self.sort,
            descending=self.descending,
            limit=limit,
            offset=offset,
        )
        return rows.assign(at=range(offset, offset + len(rows)))

    def opened(self, row: Mapping[str, Any]) -> str:
        """Where one of them is shown by itself."""
        kind, name = ("/group", "group") if self.groups else ("/rollout", "row")
        return address(
            kind,
            run=self.run.name,
            step=row["step"],
            **{name: row[name]},
            list=self.query(),
            at=row["at"],
        )


def way_through(run: Run, query: Mapping[str, str], otherwise: Listing, at: int) -> dict[str, str]:
    """Addresses from one rollout or group on: `previous`, `next`, and the `list`; "" at an end.

    Args:
        run: The run.
        query: The address: `list` holds the parameters of a list and `at` the place in it.
        otherwise: The list where the address has none.
        at: The place in that.
    """
    listing = otherwise
    if query.get("at"):
        listing = Listing.read(run, dict(parse_qsl(query.get("list", ""))))
        at = whole(query, "at")
    rows = listing.rows(limit=3 if at else 2, offset=max(0, at - 1)).to_dict("records")
    opened = {row["at"]: listing.opened(row) for row in rows}
    return {
        "previous": opened.get(at - 1, ""),
        "next": opened.get(at + 1, ""),
        "list": listing.address(at // ROWS + 1),
    }


def whole(query: Mapping[str, str], name: str) -> int:
    """A whole number from the address.

    Raises:
        UserError: It is missing or is none.
    """
    value = query.get(name, "")
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise UserError(f"{name}: must be a whole number, not {value[:40]!r}")
    return int(value)
