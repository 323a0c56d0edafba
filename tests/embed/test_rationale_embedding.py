"""The model as sentence-transformers sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig


@pytest.fixture(scope="module")
def model(model_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(model_folder), device="cpu", trust_remote_code=True)


def test_vectors_are_the_encoders(
    model: SentenceTransformer, model_folder: Path, texts: list[str]
) -> None:
    expected = RationaleEncoder.from_pretrained(model_folder).encode([*texts, ""])
    found = model.encode([*texts, ""], batch_size=5)
    np.testing.assert_allclose(found, expected.vectors.numpy(), atol=1e-5)
    assert model[0].rationales(texts) == expected.rationales[:-1]
    given = model[0].encode_rationales(expected.rationales[:-1])
    torch.testing.assert_close(given, expected.vectors[:-1], atol=1e-5, rtol=0)
    assert model.get_embedding_dimension() == found.shape[1]


def test_settings_of_a_call(model: SentenceTransformer, texts: list[str]) -> None:
    greedy = model.encode(texts[:2])
    for settings in (
        {"rationale": "none"},
        {"max_rationale_tokens": 2},
        {"rationale": "sample", "temperature": 2.0, "seed": 3},
        {"prompt": "Say who it is."},
    ):
        changed = model.encode(texts[:2], **settings)
        assert np.abs(changed - greedy).max() > 1e-3
        np.testing.assert_allclose(changed, model.encode(texts[:2], **settings), atol=1e-6)
    with pytest.raises(ValueError, match="beams"):
        model.encode(texts[:2], beams=4)


def test_query_and_document_prompts_are_instructions(model_folder: Path, texts: list[str]) -> None:
    prompts = {"query": "Say who it is."}
    model = SentenceTransformer(
        str(model_folder), device="cpu", trust_remote_code=True, prompts=prompts
    )
    plain = model.encode(texts[:2])
    np.testing.assert_allclose(model.encode_document(texts[:2]), plain, atol=1e-6)
    told = model.encode_query(texts[:2])
    np.testing.assert_allclose(told, model.encode(texts[:2], prompt="Say who it is."), atol=1e-6)
    assert np.abs(told - plain).max() > 1e-3


@pytest.mark.parametrize("reader", ["model_folder", "context_folder"])
def test_saved_and_loaded_again(
    reader: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = SentenceTransformer(
        str(request.getfixturevalue(reader)), device="cpu", trust_remote_code=True
    )
    first.save_pretrained(str(tmp_path))
    second = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(second.encode(texts), first.encode(texts), atol=1e-6)
    type_ = json.loads((tmp_path / "modules.json").read_text())[0]["type"]
    assert type_ == "grace_rl.embed.encoder.RationaleEncoder"


def test_without_consent_it_is_refused_not_embedded_wrongly(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(model_folder), device="cpu")


def test_other_things_than_texts_are_refused(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="texts"):
        model[0].preprocess([("a", "b")])


FRESH = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer

folder, texts, output = sys.argv[1], open(sys.argv[2]).read().splitlines(), sys.argv[3]
assert not any(name.startswith("grace_rl") for name in sys.modules)
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
np.save(output, model.encode(texts))
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_trainers_embeddings(tmp_path: Path, texts: list[str]) -> None:
    args = GraceGRPOConfig(
        output_dir=str(tmp_path / "run"), num_generations=4, per_device_train_batch_size=16,
        max_completion_length=16, max_steps=2, learning_rate=1e-3, instruction=None,
        roles={"query": {}, "positive": {}, "negative": {"train": False}}, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none", print_rollouts_steps=0,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    rows = scenes.rows("train", "triplet", 8)
    trainer = GraceGRPOTrainer(str(scenes.COLD_START), args, rows, ["contrastive"])
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    written = trainer.encoder().write(texts)
    expected = trainer.reader.finish(trainer.reader.read(written))

    (tmp_path / "fresh.py").write_text(FRESH)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = [sys.executable, "fresh.py", "model", "texts.txt", "vectors.npy"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=900)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected.numpy(), atol=1e-5)
