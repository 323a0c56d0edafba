"""Tokens per second of both rollout engines, in one run on this machine.

    OMP_NUM_THREADS=4 python benchmarks/rollout_engines.py

A Qwen3 of about 10M random parameters writes --samples rationales for --prompts texts through the
trainer's own generation, `transformers` and vLLM in turn, --repeats times after one warm-up each.
Once all rationales have exactly --tokens tokens; once they end by themselves, as rationales do: at
each token with the chance --ends, at the latest after --tokens. With --model FOLDER that language
model writes, exactly --tokens tokens only. Prints medians and ratios. Both use torch's threads, so
OMP_NUM_THREADS holds for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_policy import save_random_policy
from trl import GRPOTrainer

from grace_rl.data import scenes
from grace_rl.rollout.policy import load_policy
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ends", type=float, default=1 / 32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a language model's folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{options.prompts * options.samples} rollouts, {torch.get_num_threads()} threads")
    measure(options, f"exactly {options.tokens} tokens each", 0.0)
    if options.model:
        return
    measure(options, f"ending with a chance of {options.ends:.3f} a token", options.ends)


def measure(options: argparse.Namespace, title: str, ends: float) -> None:
    """Time both engines in turn on rationales that end so, and print the medians."""
    with tempfile.TemporaryDirectory() as folder:
        size = 0 if options.model else save_random_policy(Path(folder), ends)
        trainers = {
            name: build_trainer(
                options.model or folder, folder, options, name == "vllm", exact=not ends
            )
            for name in ("transformers", "vllm")
        }
        texts = [row["text"] for row in scenes.rows(form="unsupervised", count=options.prompts)]
        prompts = [trainers["vllm"].prompt_template.render(text).token_ids for text in texts]
        prompts = [prompt for prompt in prompts for _ in range(options.samples)]
        speeds: dict[str, list[float]] = {name: [] for name in trainers}
        for repeat in range(options.repeats + 1):
            for name, trainer in trainers.items():
                start = time.perf_counter()
                written, _ = GRPOTrainer._generate_single_turn(
                    trainer, prompts, None, {}, options.samples
                )
                tokens = sum(map(len, written))
                if repeat > 0:
                    speeds[name].append(tokens / (time.perf_counter() - start))
    of = options.model or f"{size / 1e6:.1f}M parameters"
    print(f"{title} (mean {tokens / len(prompts):.1f}), {of}, {options.dtype}")
    for name, values in speeds.items():
        low, high, median = min(values), max(values), statistics.median(values)
        print(f"{name:>14}: {median:8.0f} tokens/s  (from {low:.0f} to {high:.0f})")
    ratio = statistics.median(speeds["vllm"]) / statistics.median(speeds["transformers"])
    print(f"         ratio: vLLM is {ratio:.1f} times as fast")


def build_trainer(
    model: str, folder: str, options: argparse.Namespace, use_vllm: bool, exact: bool
) -> GraceGRPOTrainer:
    least = {"min_tokens" if use_vllm else "min_new_tokens": options.tokens}
    args = GraceGRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        use_vllm=use_vllm,
        vllm_max_model_length=512,
        num_generations=options.samples,
        per_device_train_batch_size=options.prompts * options.samples,
        max_completion_length=options.tokens,
        generation_kwargs=least if exact else None,
        instruction=None,
        roles={"text": {}},
        report_to="none",
    )
    rows = scenes.rows(form="unsupervised", count=options.prompts)
    policy, tokenizer = load_policy(model, dtype=options.dtype)
    policy.config._name_or_path = model  # what vLLM loads
    return GraceGRPOTrainer(policy, args, rows, ["contrastive"], processing_class=tokenizer)


if __name__ == "__main__":
    main()
