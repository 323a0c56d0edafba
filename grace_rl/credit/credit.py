"""Credit: scores -> advantages, one interface for groups, segments and a critic.

A credit sees the trained rollouts of all processes with their scores, and returns an advantage for
each, (N,), or for each of its tokens, (N, T). It is a function of the table alone, so the same
credit on the same stored table gives the same advantages: `notes` says what to build it from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grace_rl.rollout.rollouts import Rollouts


class Credit:
    """See the module."""

    def __call__(self, rollouts: Rollouts, progress: float = 0.0) -> Tensor:
        """Advantages on the CPU.

        Args:
            rollouts: the N trained rollouts of all processes, with their scores.
            progress: the share of training that is over, 0 to 1.

        Returns:
            (N,) or (N, T) float32, T the longest rationale; 0 where nothing was scored.
        """
        raise NotImplementedError

    def notes(self, progress: float) -> dict[str, Any]:
        """What `grace_rl.credit.restored` builds this credit from, as it is now."""
        raise NotImplementedError

    def learn(self, rollouts: Rollouts) -> str | None:
        """Take in a batch after it was used; what to tell the user, if anything."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
