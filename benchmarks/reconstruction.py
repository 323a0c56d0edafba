"""Does the reconstruction stage help? The published comparison, on a 10M-parameter English model.

    python benchmarks/reconstruction.py --seeds 0 1 2    # trains and scores every arm, the table
    python benchmarks/reconstruction.py --table          # the table from what is there
    python benchmarks/reconstruction.py --cost           # the reward's share of a GRPO step

Arms, all from the same model and rows: nothing; the stage; InfoNCE for as many rows as stage +
InfoNCE, and for about as many seconds; the stage, then InfoNCE; a cold start and RL, and the same
after the stage. Scores: STS-B test (Spearman) and Cranfield (nDCG@10, linear gains, documents cut
at 128 tokens) with mean-pooled last-layer vectors of the texts, centred on the texts that are
scored; after a cold start also STS-B (400 pairs) of the rationales. What the stage does to
writing: perplexity of held-out text, and whether a rationale ends.

A run that is finished is not repeated: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader, Written
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.rebuild import right_padded
from grace_rl.embed.similarity import rank_correlation
from grace_rl.recipe import load_recipe
from grace_rl.rollout.generator import end_token_ids
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.run.records import read_metrics, read_status
from grace_rl.train.run import train

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "reconstruction.json"
STEPS = 200  # of the stage, and of InfoNCE after it
ROWS = 32  # a step
COMMON = {"max_text_tokens": 32, "logging_steps": 10, "save_strategy": "no", "report_to": "none"}
READER = {"span": "bottleneck", "layers": [-1], "centre": True}
STAGE = {
    "per_device_train_batch_size": ROWS, "max_steps": STEPS, "bf16": True, "reader": READER,
    "dataset_rows": 16000,
} | COMMON  # fmt: skip
INFONCE = {
    "per_device_train_batch_size": ROWS, "bf16": True, "validation": None,
    "early_stopping_patience": 0,
} | COMMON  # fmt: skip
SFT = {
    "max_steps": 100, "bf16": True, "use_cpu": True, "reader": READER, "warmup_steps": 10,
} | COMMON  # fmt: skip
GRPO = {
    "max_steps": 25, "num_generations": 4, "max_completion_length": 24, "reader": READER,
    "learning_rate": 1e-4, "dataset_rows": 4000, "per_device_train_batch_size": 48, "bf16": True,
    "roles": {"query": {}, "positive": {}, "negative": {"train": False}},
} | COMMON  # fmt: skip
RATIONALE_PAIRS = 400  # of STS-B test, for which rationales are written
HELD_OUT = slice(90_000, 90_400)  # of text/general; the stage writes from the first 20,000
ARMS = {  # name: (recipe, what it starts from, settings)
    "stage": ("reconstruction", None, STAGE),
    "stage, nothing written": ("reconstruction", None, STAGE | {"writing_share": 0.0}),
    "InfoNCE, half the rows": ("infonce", None, INFONCE | {"max_steps": STEPS}),
    "InfoNCE, equal rows": ("infonce", None, INFONCE | {"max_steps": 2 * STEPS}),
    "InfoNCE, equal seconds": ("infonce", None, INFONCE | {"max_steps": 540}),
    "stage + InfoNCE": ("infonce", "stage", INFONCE | {"max_steps": STEPS}),
    "cold start": ("sft", None, SFT),
    "stage + cold start": ("sft", "stage", SFT),
    "cold start + RL": ("grpo", "cold start", GRPO),
    "stage + cold start + RL": ("grpo", "stage + cold start", GRPO),
}
FIRST_SEED_ONLY = ("stage, nothing written",)
WRITES = ("cold start", "stage + cold start", "cold start + RL", "stage + cold start + RL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-reconstruction"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        print_cost(options)
        return
    if not options.table:
        base = options.folder / "scores" / "before.json"
        keep(base, lambda: scores_of(options.shared / "models/tiny-en", options.shared, False))
        for seed in options.seeds:
            for arm in options.arms:
                if seed == 0 or arm not in FIRST_SEED_ONLY:
                    run_arm(arm, seed, options)
    collect(options.folder)
    print_table()


# --- training and scoring -----------------------------------------------------------------------


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> None:
    recipe, start, settings = ARMS[arm]
    folder = run_folder(options.folder, arm, seed)
    model = options.shared / "models/tiny-en"
    if start is not None:
        model = run_folder(options.folder, start, seed) / "model"
    data = options.shared / "data/train/nli-triplets.train.jsonl.gz"
    given = settings | {
        "seed": seed, "output_dir": str(folder), "model_name_or_path": str(model),
        "dataset_name": str(data),
    }  # fmt: skip
    if recipe == "reconstruction":
        given["writing_dataset_name"] = str(options.shared / "data/text/general.jsonl.gz")
    if (read_status(folder) or {}).get("status") != "finished":
        words = [w for key, value in given.items() for w in (f"--{key}", json.dumps(value))]
        words = [word.strip('"') for word in words]
        train(load_recipe(ROOT / "recipes/tiny-en" / f"{recipe}.yaml", words))

    def score() -> dict[str, Any]:
        found = scores_of(folder / "model", options.shared, arm in WRITES)
        metrics = read_metrics(folder)
        gains = [line["information_gain"] for line in metrics if "information_gain" in line]
        rewards = [line["reward"] for line in metrics if "reward" in line]
        status = read_status(folder) or {}
        found["seconds"] = status.get("summary", {}).get("train_runtime")
        logged = {"gains": gains, "rewards": rewards}
        return found | {name: values for name, values in logged.items() if values}

    keep(options.folder / "scores" / f"{folder.name}.json", score)


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm.replace(' ', '-').replace(',', '').replace('+', 'and')}-{seed}"


def keep(path: Path, make: Any) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1))
        print(path.name, path.read_text()[:400], flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@torch.no_grad()
def scores_of(model: Path, shared: Path, writes: bool) -> dict[str, Any]:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    end_ids = end_token_ids(policy.generation_config, tokenizer)
    reader = Reader(ReaderConfig(**READER), tokenizer, end_ids, policy, batch_size=64)

    def texts_alone(texts: list[str], longest: int) -> torch.Tensor:
        template = PromptTemplate(tokenizer, None, longest)
        prompts = [template.render(text) for text in texts]
        written = [Written(p, p.token_ids[slice(*p.span)], p.text) for p in prompts]
        return read_sorted(reader, written)

    found = similarity_scores(texts_alone, shared)
    found["perplexity"] = perplexity(policy, tokenizer, shared)
    if writes:
        seen: list[Written] = []

        def rationales(texts: list[str], longest: int) -> torch.Tensor:
            template = PromptTemplate(tokenizer, None, min(longest, 64))
            encoder = RationaleEncoder(policy, tokenizer, template, reader, end_ids, 24)
            written = encoder.write(texts, "greedy")
            seen.extend(written)
            return read_sorted(reader, written)

        found["STS-B, rationales"] = sts_score(rationales, shared, RATIONALE_PAIRS)
        ended = [item.token_ids[-1] in end_ids for item in seen]
        found["rationales that end"] = statistics.mean(ended)
        found["rationale tokens"] = statistics.mean(len(item.token_ids) for item in seen)
    return found


def read_sorted(reader: Reader, written: list[Written]) -> torch.Tensor:
    """By length, for less padding; in bfloat16, which moves these scores by less than .002."""
    order = sorted(range(len(written)), key=lambda i: len(written[i].token_ids))
    with torch.autocast("cpu", torch.bfloat16):
        vectors = reader.read([written[i] for i in order])
    return vectors[torch.tensor(order).argsort()].float()


def sts_score(embed: Any, shared: Path, count: int | None = None) -> float:
    pairs = read_lines(shared / "data/eval/stsb-test.jsonl.gz")[:count]
    texts = [row[side] for side in ("sentence1", "sentence2") for row in pairs]
    raw = embed(texts, 64)
    first, second = normalize(raw - raw.mean(0), dim=1).chunk(2)
    gold = [row["score"] for row in pairs]
    return rank_correlation((first * second).sum(1).tolist(), gold)


def similarity_scores(embed: Any, shared: Path) -> dict[str, float]:
    corpus = read_lines(shared / "data/eval/cranfield.corpus.jsonl.gz")
    queries = read_lines(shared / "data/eval/cranfield.queries.jsonl.gz")
    documents = [row["text"].strip() or row["title"].strip() or "nothing" for row in corpus]
    raw = embed(documents, 128)
    centre = raw.mean(0)
    asked = normalize(embed([row["text"] for row in queries], 128) - centre, dim=1)
    similarity = asked @ normalize(raw - centre, dim=1).T
    relevant: dict[str, dict[str, float]] = {}
    for row in read_lines(shared / "data/eval/cranfield.qrels.jsonl.gz"):
        relevant.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = row["score"]
    ids = [str(row["_id"]) for row in corpus]
    values = []
    for row, line in zip(queries, similarity, strict=True):
        judged = relevant.get(str(row["_id"]), {})
        top = [judged.get(ids[i], 0.0) for i in line.topk(10).indices.tolist()]
        best = sorted(judged.values(), reverse=True)[:10]
        values.append(dcg(top) / dcg(best) if best else 0.0)
    return {"STS-B": sts_score(embed, shared), "Cranfield": statistics.mean(values)}


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def perplexity(policy: Any, tokenizer: Any, shared: Path) -> float:
    """Of held-out text, per token, the first 64 tokens of each."""
    rows = read_lines(shared / "data/text/general.jsonl.gz")[HELD_OUT]
    total, count = 0.0, 0
    ids = [tokenizer(row["text"], add_special_tokens=False)["input_ids"][:64] for row in rows]
    ids = sorted((row for row in ids if len(row) > 1), key=len)
    for start in range(0, len(ids), 32):
        block, mask = right_padded(ids[start : start + 32], tokenizer.pad_token_id)
        logps = policy(block, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        picked = logps.gather(2, block[:, 1:, None]).squeeze(-1) * mask[:, 1:]
        total, count = total + float(picked.sum()), count + int(mask[:, 1:].sum())
    return math.exp(-total / count)


# --- the table -----------------------------------------------------------------------------------


def collect(folder: Path) -> None:
    """All scores in one file."""
    if not (folder / "scores").is_dir():
        return
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "scores").glob("*.json")):
        found[path.stem] = json.loads(path.read_text())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def print_table() -> None:
    found = json.loads(RESULTS.read_text())
    names = ("STS-B", "Cranfield", "perplexity", "STS-B, rationales", "rationales that end",
             "rationale tokens", "seconds")  # fmt: skip
    print(f"| arm | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for arm in ("before", *ARMS):
        stem = run_folder(Path(), arm, 0).name.removesuffix("-0")
        runs = [
            scores for name, scores in found.items()
            if name == arm or name.removeprefix(stem)[1:].isdigit() and name.startswith(stem)
        ]  # fmt: skip
        if runs:
            cells = [spread([run[n] for run in runs if run.get(n) is not None]) for n in names]
            print(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    for name, scores in found.items():
        if "gains" in scores:
            print(f"{name}: information gain {' '.join(f'{g:.2f}' for g in scores['gains'])}")


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 2 else 3
    mean, low, high = statistics.mean(values), min(values), max(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_cost(options: argparse.Namespace) -> None:
    """Seconds of a GRPO step by phase, with and without the reward, in turn."""
    model = run_folder(options.folder, "stage", 0) / "model"
    shared = options.shared
    rewards = {
        "contrastive alone": [{"name": "contrastive"}],
        "with reconstruction": [{"name": "contrastive"}, {"name": "reconstruction"}],
        "with its contrastive form": [
            {"name": "contrastive"}, {"name": "reconstruction", "score": "contrastive"}
        ],
    }  # fmt: skip
    phases: dict[str, dict[str, float]] = {}
    for name, entries in rewards.items():
        folder = options.folder / f"cost-{time.time_ns()}"
        given = GRPO | {
            "max_steps": 5, "logging_steps": 1, "output_dir": str(folder), "rewards": entries,
            "model_name_or_path": str(model), "multi_objective_aggregation": "normalize_then_sum",
            "dataset_name": str(shared / "data/train/nli-triplets.train.jsonl.gz"),
        }  # fmt: skip
        words = [w for key, value in given.items() for w in (f"--{key}", json.dumps(value))]
        words = [word.strip('"') for word in words]
        train(load_recipe(ROOT / "recipes/tiny-en/grpo.yaml", words))
        steps = read_metrics(folder)[1:]  # the first one loads the decoder
        phases[name] = {
            phase: statistics.median(line[f"time/{phase}"] for line in steps)
            for phase in ("rollout", "embed", "reward", "train")
        }
        deviations = [line.get("rewards/reconstruction/within_group_std") for line in steps]
        phases[name]["within-group deviation"] = statistics.median(d or 0.0 for d in deviations)
    for name, seconds in phases.items():
        step = sum(seconds[phase] for phase in ("rollout", "embed", "reward", "train"))
        print(f"{name}: step {step:.2f} s, reward {seconds['reward']:.2f} s = "
              f"{seconds['reward'] / step:.1%} of the step; within-group deviation "
              f"{seconds['within-group deviation']:.3f}")  # fmt: skip
    path = RESULTS.with_name("reconstruction_cost.json")
    path.write_text(json.dumps(phases, indent=1) + "\n")


if __name__ == "__main__":
    main()
