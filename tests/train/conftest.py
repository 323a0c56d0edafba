"""The tiny policy that the trainers' tests start from."""

from __future__ import annotations

import pytest

from grace_rl.data import scenes


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a random policy with the tokenizer of scenes."""
    return str(scenes.save_untrained(tmp_path_factory.mktemp("policy"), 0))
