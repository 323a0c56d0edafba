"""The cold start of scenes as a finished model folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import ReaderConfig
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
    folder.mkdir(exist_ok=True)
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    encoder.save(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(ReaderConfig(), None, 128, 32)
    return save_model(tmp_path_factory.mktemp("model"), settings)


@pytest.fixture(scope="session")
def context_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(ReaderConfig(span="context"), None, 128, 32)
    return save_model(tmp_path_factory.mktemp("context"), settings)
