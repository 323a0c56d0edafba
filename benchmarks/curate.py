"""Sentences per second from text to rated triplet: large vLLM batches against one by one.

    OMP_NUM_THREADS=1 python benchmarks/curate.py

The same model, sentences, prompts and longest candidate for all. Both sides of a sentence are
written, and each candidate is rated against it:

    one by one    transformers, one prompt at a time, as a plain loop over `generate`
    batches of 16 transformers, and pairs rated two at a time: how MultiCSR's released code does it
    grace-rl      the curate steps on vLLM: all prompts of a chunk at once, one greedy candidate
    grace-rl, 5   the same with 1 + 4 candidates a side, as the recipes have it

The first two rate by writing up to three tokens ("3.5"), in one order; the others by one pass over
the digits' log-probabilities, in both orders. Engines are warmed up and loading is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grace_rl.curate.candidates import rate_candidates, write_candidates
from grace_rl.curate.judges import DigitJudge
from grace_rl.curate.models import LanguageModel, TransformersModel, VLLMModel
from grace_rl.curate.prompts import SIDES, RatingPrompts, SidePrompts
from grace_rl.data.rows import read_rows
from grace_rl.recipe.curation import GenerateStep
from grace_rl.recipe.rows import DataConfig
from grace_rl.run.files import write_text

TEXT_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--model", default=str(shared / "models/tiny-en"))
    parser.add_argument("--texts", default=str(shared / "data/text/wiki-sentences.jsonl.gz"))
    parser.add_argument("--sentences", type=int, default=512, help="for vLLM")
    parser.add_argument("--few", type=int, default=32, help="for transformers, which is slow")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--results", type=Path, help="a JSON file")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = read_rows(DataConfig(dataset_name=options.texts, rows=options.sentences))
    rows = [row | {"id": i} for i, row in enumerate(rows)]

    speeds = {}
    plain = TransformersModel(options.model, "float32", 16)
    few = rows[: options.few]
    for name, size in (("one by one", 1), ("batches of 16", 16)):
        released(plain, few[:size], options.tokens, size)
        speeds[name] = speed(lambda s=size: released(plain, few, options.tokens, s), len(few))
        print(f"{name:14} {speeds[name]:8.2f} sentences/s", flush=True)
    fast = VLLMModel(options.model)
    for name, candidates in (("grace-rl", 0), ("grace-rl, 5", 4)):
        step = GenerateStep(
            model_name_or_path=options.model,
            prompts="completion",
            candidates=candidates,
            max_tokens=options.tokens,
            max_text_tokens=TEXT_TOKENS,
            length_ratio=[0.0, 100.0],
        )
        ours(fast, rows[:16], step)
        speeds[name] = speed(lambda s=step: ours(fast, rows, s), len(rows))
        print(f"{name:14} {speeds[name]:8.2f} sentences/s", flush=True)
    for name in ("one by one", "batches of 16"):
        print(f"grace-rl is {speeds['grace-rl'] / speeds[name]:.1f} times as fast as {name}")
    if options.results:
        kept = {"sentences_per_second": speeds, "tokens": options.tokens}
        write_text(options.results, json.dumps(kept, indent=1) + "\n")


def speed(work: Callable[[], Any], sentences: int) -> float:
    start = time.perf_counter()
    work()
    return sentences / (time.perf_counter() - start)


def ours(model: LanguageModel, rows: list[dict[str, Any]], step: GenerateStep) -> None:
    prompts = SidePrompts(model.tokenizer, step.prompts, step.max_text_tokens, {})
    judge = DigitJudge(model, RatingPrompts(model.tokenizer, "completion", TEXT_TOKENS, {}))
    rate_candidates(write_candidates(rows, model, prompts, step), judge, "digits")


def released(model: TransformersModel, rows: list[dict[str, Any]], tokens: int, batch: int) -> None:
    """Greedy candidates of both sides in batches, then each pair's rating as written text."""
    prompts = SidePrompts(model.tokenizer, "completion", TEXT_TOKENS, {})
    rating = RatingPrompts(model.tokenizer, "completion", TEXT_TOKENS, {})
    how = GenerateStep(
        model_name_or_path=model.model.name_or_path,
        engine="transformers",
        prompts="completion",
        candidates=0,
        max_tokens=tokens,
    )
    written = {}
    for side in SIDES:
        asked = [prompts.tokens(row["text"], side, 0) for row in rows]
        written[side] = [
            candidates[0].text
            for start in range(0, len(asked), batch)
            for candidates in model.write(asked[start : start + batch], how)
        ]
    how = how.changed(max_tokens=3)
    for row, positive, negative in zip(rows, written["positive"], written["negative"], strict=True):
        pairs = [rating.tokens(row["text"], candidate) for candidate in (positive, negative)]
        for start in range(0, 2, min(batch, 2)):
            model.write(pairs[start : start + min(batch, 2)], how)


if __name__ == "__main__":
    main()
