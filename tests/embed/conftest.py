"""The cold start of scenes as a finished model folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderSettings

TEXTS = [row["query"] for row in scenes.rows("test", "triplet", 24)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


def save_model(folder: Path, settings: EncoderSettings) -> Path:
    """The cold start with these settings, and a centre where they have one."""
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    if settings.reader.centre:
        encoder.fit_centre(TEXTS)
    encoder.save(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(instruction=None, max_text_tokens=128, max_rationale_tokens=32)
    return save_model(tmp_path_factory.mktemp("model"), settings)


@pytest.fixture(scope="session")
def context_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(
        reader=ReaderConfig(span="context"),
        instruction=None,
        max_text_tokens=128,
        max_rationale_tokens=32,
    )
    return save_model(tmp_path_factory.mktemp("context"), settings)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that stands for a model which is not loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder
