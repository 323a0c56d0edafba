"""The credit of a stored step, from its notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grace_rl.credit.by_critic import CriticCredit
from grace_rl.credit.by_group import GroupCredit
from grace_rl.credit.by_segment import SegmentCredit
from grace_rl.credit.credit import Credit
from grace_rl.credit.segments import ShapingConfig

KEYS = ("kind", "progress")


def restored_credit(notes: Mapping[str, Any]) -> tuple[Credit, float]:
    """The credit and the progress of a step, from `Credit.notes`."""
    settings = {name: value for name, value in notes.items() if name not in KEYS}
    progress = float(notes.get("progress", 0.0))
    if notes.get("kind") == "segments":
        credit = SegmentCredit(ShapingConfig(**settings["shaping"]), settings["scale"])
        credit.load_state_dict(settings["calibration"])
        return credit, progress
    if notes.get("kind") == "critic":
        return CriticCredit(**settings), progress
    return GroupCredit(**settings), progress
