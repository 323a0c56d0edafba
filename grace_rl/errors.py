"""The one exception a user's mistake becomes."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """One or more mistakes in what the user gave, each a sentence that says what to do.

    The command line prints the problems to stderr and exits with code 2; nothing else is caught.

    >>> str(UserError(["a.yaml: 'lerning_rate' is unknown; did you mean 'learning_rate'?"]))
    "a.yaml: 'lerning_rate' is unknown; did you mean 'learning_rate'?"
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
