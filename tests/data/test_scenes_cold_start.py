"""The cold start that ships: what it writes, and what is left for RL. Read by a naive reader.

The slow test begins the training of `recipes/scenes/sft.yaml` anew, with an eighth of its rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.nn.functional import layer_norm, normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.cli import main
from grace_rl.data import scenes
from grace_rl.rollout.prompts import PromptTemplate

ROOT = Path(__file__).parents[2]
SPLITS = ("test", "transfer")


class Policy:
    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.template = PromptTemplate(self.tokenizer, None)

    def write(self, texts: list[str], sample: bool = False) -> tuple[list[str], list[bool]]:
        """Rationales, and whether each ended by itself within 24 tokens."""
        prompts = self.tokenizer(
            [self.template.render(text).string for text in texts], return_tensors="pt", padding=True
        )
        torch.manual_seed(0)
        written = self.model.generate(
            **prompts, max_new_tokens=24, do_sample=sample, temperature=1.0, top_k=0, top_p=1.0
        )
        written = written[:, prompts["input_ids"].shape[1] :]
        ended = (written == self.tokenizer.eos_token_id).any(1).tolist()
        return self.tokenizer.batch_decode(written, skip_special_tokens=True), ended

    @torch.no_grad()
    def read(self, rationale: str) -> torch.Tensor:
        """The rationale alone, (H,): mean over tokens of LayerNorm(embedding) + LayerNorm(state).

        That is, of the input embeddings and of the last hidden states.
        """
        states = self.model(
            **self.tokenizer(rationale, return_tensors="pt"), output_hidden_states=True
        ).hidden_states
        return sum(
            layer_norm(state[0], state.shape[-1:]) for state in (states[0], states[-1])
        ).mean(0)


def similarity_scores(policy: Policy, rationales: list[str]) -> tuple[float, float]:
    """Recall@1, triplet accuracy: rationales of queries, positives, hard negatives; a tie fails."""
    vectors = torch.stack([policy.read(rationale) for rationale in rationales])
    queries, positives, negatives = normalize(vectors - vectors.mean(0), dim=-1).chunk(3)
    similarity = queries @ torch.cat([positives, negatives]).T
    own = similarity.diagonal()
    rivals = similarity.masked_fill(torch.eye(*similarity.shape, dtype=torch.bool), -torch.inf)
    recall = (own > rivals.amax(1)).float().mean()
    triplet = (own > (queries * negatives).sum(-1)).float().mean()
    return float(recall), float(triplet)


@dataclass
class Quality:
    coverage: float
    precision: float
    reserved_precision: float
    ended: float
    recall: float
    triplet: float
    oracle_recall: float
    oracle_triplet: float


def quality(policy: Policy, split: str, count: int = 200) -> Quality:
    rows = scenes.rows(split, "triplet", count)
    texts = (
        [row["query"] for row in rows]
        + [row["positive"] for row in rows]
        + [row["negative"][0] for row in rows]
    )
    truth = [row["scene"] for row in rows] * 2 + [row["negative_scene"] for row in rows]
    rationales, ended = policy.write(texts)
    readings = [scenes.read_facts(rationale) for rationale in rationales]
    precisions = [reading.precision(scene) for reading, scene in zip(readings, truth, strict=True)]
    reserved = [
        bool(scenes.TRANSFER_WORDS & set(re.findall(r"\w+", text.lower()))) for text in texts
    ]
    return Quality(
        mean(reading.coverage(scene) for reading, scene in zip(readings, truth, strict=True)),
        mean(precisions),
        mean([p for p, marked in zip(precisions, reserved, strict=True) if marked] or [1.0]),
        mean(ended),
        *similarity_scores(policy, rationales),
        *similarity_scores(policy, [scenes.reference_rationale(scene) for scene in truth]),
    )


def assert_good_start(policy: Policy) -> None:
    for split in SPLITS:
        found = quality(policy, split)
        print(split, found)
        assert found.ended == 1.0
        assert found.precision > 0.95
        assert found.reserved_precision > 0.9
        assert 0.4 < found.coverage < 0.8
        # The reader would find a perfect rationale ...
        assert found.oracle_recall > 0.95 and found.oracle_triplet > 0.95
        # ... and the policy does not write it yet.
        assert found.recall < 0.5 and 0.1 < found.triplet < 0.6


@pytest.fixture(scope="module")
def shipped() -> Policy:
    return Policy(scenes.COLD_START)


def test_it_fits_into_the_package():
    assert sum(file.stat().st_size for file in scenes.COLD_START.iterdir()) <= 2 * 2**20
    assert (scenes.COLD_START / "README.md").exists()


def test_it_has_the_tokenizer_and_shape_of_an_untrained_policy(tmp_path: Path):
    fresh = scenes.save_untrained(tmp_path / "fresh")
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (scenes.COLD_START / file).read_bytes() == (fresh / file).read_bytes()


def test_it_writes_true_rationales_and_leaves_room_for_rl(shipped: Policy):
    assert_good_start(shipped)


def test_its_samples_differ_from_each_other(shipped: Policy):
    texts = [row["text"] for row in scenes.rows("train", "unsupervised", 8) for _ in range(8)]
    rationales, ended = shipped.write(texts, sample=True)
    assert all(ended)
    assert len(set(rationales)) > 0.9 * len(rationales)


@pytest.mark.slow
def test_its_recipe_finds_the_facts(tmp_path: Path):
    few = ["--dataset_rows", "12500", "--output_dir", str(tmp_path / "run")]
    assert main(["train", str(ROOT / "recipes/scenes/sft.yaml"), *few]) == 0
    for split in SPLITS:
        found = quality(Policy(tmp_path / "run" / "model"), split, 50)
        print(split, found)
        assert found.ended > 0.9
        assert found.precision > 0.9 and found.coverage > 0.4
        assert found.oracle_recall > 0.8
