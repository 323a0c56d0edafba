"""The mask in InfoNCE: against the formula, chunked and not, and in a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.data.false_negatives import FalseNegativeConfig, FalseNegatives
from grace_rl.data.guide import build_guide
from grace_rl.rollout.policy import load_policy
from grace_rl.train.guided_infonce import CachedGuidedInfoNCE, GuidedInfoNCE, Marks, row_numbers
from grace_rl.train.infonce import InfoNCETrainer, contrastive_examples
from grace_rl.train.infonce_config import InfoNCEConfig

SCALE = 10.0
ROWS = [
    {
        "query": f"q{i} a",
        "positive": f"p{i} a",
        "negative": [f"n{i} a"],
        "negative_positive": f"m{i}",
    }
    for i in range(4)
]


def encode(texts):
    """Rows 0 and 1 mean the same; a row's negatives are near it."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    number = {0: 0, 1: 0, 2: 2, 3: 3}
    return torch.stack([base[number[int(t[1])]] + 0.3 * (t[0] in "nm") * base[5] for t in texts])


@pytest.fixture
def false_negatives(tmp_path):
    def build(**keywords):
        guide = build_guide(tmp_path, lambda: ROWS, "encode", encode)
        return FalseNegatives(FalseNegativeConfig(guide="encode", **keywords), guide)

    return build


def expected(embeddings, examples, rows, false_negatives):
    """InfoNCE of the queries, pair by pair, straight from the definition."""
    count, columns = len(examples), len(embeddings)
    losses = []
    for i in range(count):
        logits, own = [], None
        for column in range(1, columns):
            for j in range(count):
                weight = false_negatives.weights(
                    [examples[i][0]], [examples[j][column]], [examples[i][1]]
                ).item()
                if column == 1 and i == j:
                    weight, own = 1.0, len(logits)
                if not false_negatives.config.own_negatives and rows[i] == rows[j]:
                    weight = 1.0
                cosine = torch.cosine_similarity(embeddings[0][i], embeddings[column][j], dim=0)
                logits.append(SCALE * cosine + torch.tensor(weight).log())
        losses.append(-torch.stack(logits).log_softmax(0)[own])
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "keywords",
    [
        {"mode": "absolute", "sigma": 0.9},
        {"mode": "absolute", "sigma": 0.9, "own_negatives": False},
        {"mode": "margin", "margin": 0.1},
        {"mode": "ratio", "margin": 0.1},
        {"mode": "soft", "sigma": 0.5, "width": 0.2},
    ],
)
def test_the_loss_is_infonce_without_what_the_guide_masks(false_negatives, keywords):
    mask = false_negatives(**keywords)
    examples, rows = contrastive_examples(ROWS), row_numbers(ROWS)
    torch.manual_seed(0)
    embeddings = [torch.randn(len(examples), 5, requires_grad=True) for _ in examples[0]]
    loss = GuidedInfoNCE(None, Marks(mask, examples, rows), scale=SCALE)
    found = loss.compute_loss_from_embeddings(embeddings, torch.arange(len(examples)))
    torch.testing.assert_close(found, expected(embeddings, examples, rows, mask))
    marks = Marks(mask, examples, rows)
    chunked = CachedGuidedInfoNCE(
        torch.nn.Sequential(torch.nn.Identity()), marks, scale=SCALE, mini_batch_size=3
    )
    chunked._numbers = list(range(len(examples)))
    torch.testing.assert_close(chunked.calculate_loss([e.split(3) for e in embeddings]), found)


def test_a_masked_candidate_gets_no_gradient_and_has_no_influence(false_negatives):
    mask = false_negatives(mode="absolute", sigma=0.9)
    examples = [(row["query"], row["positive"]) for row in ROWS]
    marks = Marks(mask, examples, range(4))
    loss = GuidedInfoNCE(None, marks, scale=SCALE)
    queries, positives = (torch.randn(4, 5) for _ in range(2))

    def first(positives):
        """The part of the loss that is the first query's."""
        similarity = marks.similarity(
            marks.append(queries, 0, range(4)), marks.append(positives, 1, range(4)), SCALE
        )
        return -(similarity[0] * SCALE).log_softmax(0)[0]

    positives.requires_grad_(True)
    (gradient,) = torch.autograd.grad(first(positives), positives)
    assert gradient[1].abs().max() == 0 and gradient[2].abs().max() > 0
    moved = positives.detach().clone()
    moved[1] = torch.randn(5)
    torch.testing.assert_close(first(moved), first(positives))
    unlabelled = loss.compute_loss_from_embeddings([queries, positives], None)
    cosine = torch.cosine_similarity(queries[:, None], positives[None], dim=-1)
    torch.testing.assert_close(
        unlabelled, torch.nn.functional.cross_entropy(SCALE * cosine, torch.arange(4))
    )


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_a_run_with_the_mask(tmp_path, mini_batch_size):
    guide = tmp_path / "mine.py"
    guide.write_text("def encode(texts):\n    return [[1.0, float(t[1] in '01')] for t in texts]\n")
    args = InfoNCEConfig(
        output_dir=str(tmp_path / "run"),
        false_negatives={"guide": f"{guide}:encode", "sigma": 0.95},
        mini_batch_size=mini_batch_size,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    policy = load_policy(str(scenes.COLD_START), dtype="float32")
    trainer = InfoNCETrainer(policy, args, ROWS, ROWS, run_folder=Path(tmp_path))
    trainer.train()
    assert (tmp_path / "guide/vectors.npy").exists()
    assert trainer.state.log_history[-1]["train_loss"] > 0
