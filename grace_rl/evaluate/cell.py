"""One cell of a comparison, in a process of its own: train as its recipe says, score, write down.

`grace-rl compare --cell FOLDER` runs it (FOLDER/spec.json -> FOLDER/cell.json) and hands in what
trains: evaluation knows no trainer.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_rl.data import scenes
from grace_rl.data.rows import read_rows
from grace_rl.embed.encoder_module import Encoder
from grace_rl.embed.loading import load_encoder
from grace_rl.evaluate.comparison import Score, overriding
from grace_rl.evaluate.scenes import score_policy
from grace_rl.evaluate.tasks import load_tasks
from grace_rl.evaluate.untrained import untrained_encoder
from grace_rl.recipe import load_recipe
from grace_rl.recipe.rows import DataConfig
from grace_rl.rollout.policy import is_language_model, load_policy, read_config, resolve_model
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.run.files import write_json
from grace_rl.run.records import read_metrics, read_status

Train = Callable[[Any, Mapping[str, float]], int]
"""(recipe, budget) -> exit code: a whole training in the recipe's output directory."""


def run_cell(folder: Path, train: Train) -> int:
    """Do what `spec.json` says; `cell.json` appears when all of it is done.

    Args:
        folder: Of the cell.
        train: Trains a recipe, and goes on with what an earlier attempt left.

    Returns:
        Exit code: 0 done, 130 interrupted with a checkpoint saved.
    """
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"spec": spec}
    recipe, model = None, spec["model"]
    if spec["recipe"]:
        recipe = load_recipe(spec["recipe"], overriding(spec["changes"]))
        training = recipe.training | {"output_dir": str(folder / "run")}
        recipe = dataclasses.replace(recipe, training=training, evaluation=None)
        result["method"] = recipe.method
        result["data_rows"] = len(read_rows(recipe.data))
    if recipe is not None and spec["train"]:
        run = folder / "run"
        status = read_status(run)
        if status is None or status["status"] != "finished":
            code = train(recipe, spec["budget"])
            if code:
                return code
        summary = (read_status(run) or {}).get("summary", {})
        result["training"] = _training(read_metrics(run), summary)
        model = str(run / "model")
    if recipe is not None and not spec["train"]:
        encoder: Encoder = untrained_encoder(recipe, folder)
    else:
        encoder = load_encoder(model)
    writes = encoder.writes_rationales and spec["rationale"] != "none"
    started = time.perf_counter()
    result |= _scores(encoder, spec, model)
    result["scoring_seconds"] = time.perf_counter() - started
    result["writes_rationales"] = writes
    if recipe is not None:
        result["perplexity"] = _perplexity(recipe, model, spec["held_out"], folder)
    write_json(folder / "cell.json", result)
    return 0


def _training(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds, steps, tokens, and the metrics of validation rows."""
    scored = [line for line in metrics if any(key.startswith("eval_") for key in line)]
    return {
        "seconds": max([summary.get("train_runtime", 0.0), *(m["seconds"] for m in metrics)]),
        "steps": max((line["step"] for line in metrics), default=0),
        "tokens": max(line.get("num_tokens", 0) for line in [summary, *metrics]),
        "validation": [
            {key: value for key, value in line.items() if key.startswith("eval_") or key == "step"}
            for line in scored
        ],
    }


def _scores(encoder: Any, spec: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    score = Score(**spec["score"])
    if score.tasks is None:
        rows, splits = score.rows, score.dataset_splits
        started = time.perf_counter()
        scores = score_policy(encoder, splits, rows, spec["rationale"])
        seconds = time.perf_counter() - started
        texts = 5 * rows * len(splits)
        return {"scores": scores, "seconds_per_1000_texts": 1000 * seconds / texts}
    from grace_rl.evaluate.evaluation import evaluate_tasks
    from grace_rl.evaluate.mteb_encoder import MtebEncoder

    results = evaluate_tasks(
        MtebEncoder(encoder, rationale=spec["rationale"]), load_tasks(score.tasks)
    )
    seconds = sum(task["encode_seconds"] for task in results)
    texts = sum(task["texts"] for task in results)
    return {
        "scores": {f"{task['name']}/{task['main_metric']}": task["score"] for task in results},
        "seconds_per_1000_texts": 1000 * seconds / max(1, texts),
    }


HELD_OUT_ROWS = 200


def _perplexity(
    recipe: Any, model: str | None, held_out: str | None, scratch: Path
) -> float | None:
    """Of held-out text under the model as a language model; None where it is none.

    Scenes: the canonical rationales of test rows, each after its text's prompt. Elsewhere the texts
    of the file `held_out`.
    """
    path = model or resolve_model(
        recipe.model["model_name_or_path"], scratch, recipe.training.get("seed", 0)
    )
    of_scenes = recipe.data.dataset_name == "scenes"
    if not is_language_model(read_config(path)) or (held_out is None and not of_scenes):
        return None
    policy, tokenizer = load_policy(path, dtype="float32")
    if of_scenes or held_out is None:
        template = PromptTemplate(tokenizer, None)
        rows = scenes.rows("test", "triplet", HELD_OUT_ROWS, 1)
        pairs = [(template.render(row["query"]).token_ids, row["rationale"]) for row in rows]
    else:
        texts = read_rows(DataConfig(dataset_name=held_out, rows=HELD_OUT_ROWS))
        pairs = [([], row.get("text") or row["query"]) for row in texts]
    return perplexity(policy, tokenizer, pairs)


def perplexity(policy: Any, tokenizer: Any, pairs: Sequence[tuple[list[int], str]]) -> float:
    """exp of the mean negative log-likelihood of a token, 1 or more.

    Args:
        policy: A causal language model.
        tokenizer: Its tokenizer.
        pairs: Token ids of a prompt (may be empty) and the text that follows, of at least two
            tokens if the prompt is empty.
    """
    import torch

    policy.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, text in pairs:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][:512]
            logits = policy(torch.tensor([prompt + ids], device=policy.device)).logits[0].float()
            first = max(1, len(prompt))
            target = torch.tensor((prompt + ids)[first:], device=policy.device)
            total += float(
                torch.nn.functional.cross_entropy(logits[first - 1 : -1], target, reduction="sum")
            )
            count += len(target)
    return math.exp(total / max(1, count))
