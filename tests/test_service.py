"""The example of a service: what it answers is what the encoder gives."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.settings import EncoderSettings

TEXTS = [row["query"] for row in scenes.rows("test", "triplet", 2)]


class Answer:
    """What vLLM's server answers to a request for completions, out of order."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told

    def raise_for_status(self) -> None: ...

    def json(self) -> dict[str, Any]:
        assert self.told["temperature"] == 0
        choices = [{"index": i, "text": f"Facts: {i}"} for i in range(len(self.told["prompt"]))]
        return {"choices": choices[::-1]}


@pytest.mark.parametrize("writer", [None, "http://127.0.0.1:1"])
def test_a_text_is_answered_by_its_vector_and_what_was_written(
    writer: str | None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("starlette.testclient", reason="needs starlette and httpx")
    settings = EncoderSettings(instruction=None, max_rationale_tokens=8)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    encoder.save(tmp_path)
    monkeypatch.setattr("requests.post", lambda url, json, timeout: Answer(json))
    service = runpy.run_path(str(root / "examples" / "service" / "service.py"))["service"]
    asked = client.TestClient(service(str(tmp_path), writer))
    told = asked.get("/embed", params=[("text", text) for text in TEXTS]).json()
    if writer is None:
        encoded = encoder.encode(TEXTS)
        rationales, vectors = encoded.rationales, encoded.vectors
    else:
        rationales = ["Facts: 0", "Facts: 1"]
        vectors = encoder.encode_rationales(rationales, TEXTS)
    assert told["rationales"] == rationales
    torch.testing.assert_close(torch.tensor(told["vectors"]), vectors, atol=1e-5, rtol=0)
