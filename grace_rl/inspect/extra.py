"""What `grace-rl inspect` needs beyond the rest of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from grace_rl.errors import UserError

PACKAGES = ("duckdb", "pandas", "nicegui", "fastapi", "uvicorn")


@contextmanager
def needs_extra() -> Iterator[None]:
    """Within it a missing package of the extra becomes a sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PACKAGES:
            raise
        raise UserError(
            f"looking at runs needs {error.name}: pip install 'grace-rl[inspect]'"
        ) from None
