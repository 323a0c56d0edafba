"""Tokens per second of both rollout engines, in one run on this machine.

    OMP_NUM_THREADS=1 python benchmarks/rollout_engines.py

A Qwen3 of about 10M random parameters writes --samples rationales of exactly --tokens tokens for
--prompts texts, through the trainer's own generation, `transformers` and vLLM in turn, --repeats
times after one warm-up each. Prints the median of each and their ratio. Both use torch's threads,
so OMP_NUM_THREADS holds for both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer

from grace_rl.data import scenes
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    with tempfile.TemporaryDirectory() as folder:
        size = save_model(Path(folder))
        trainers = {
            name: build_trainer(folder, options, name == "vllm")
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
                speed = sum(map(len, written)) / (time.perf_counter() - start)
                if repeat > 0:
                    speeds[name].append(speed)
    print(f"{size / 1e6:.1f}M parameters, {len(prompts)} rollouts of {options.tokens} tokens, "
          f"{torch.get_num_threads()} threads, median of {options.repeats}")  # fmt: skip
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(
            f"{name:>12}: {medians[name]:8.0f} tokens/s  "
            f"(from {min(values):.0f} to {max(values):.0f})"
        )
    print(f"       ratio: vLLM is {medians['vllm'] / medians['transformers']:.1f} times as fast")


def save_model(folder: Path) -> int:
    """A random model that never ends a rationale by itself, and the scenes policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(scenes.COLD_START)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192,
            hidden_size=320,
            intermediate_size=896,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def build_trainer(folder: str, options: argparse.Namespace, use_vllm: bool) -> GraceGRPOTrainer:
    exact = {"min_tokens" if use_vllm else "min_new_tokens": options.tokens}
    args = GraceGRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        use_vllm=use_vllm,
        vllm_max_model_length=512,
        num_generations=options.samples,
        per_device_train_batch_size=options.prompts * options.samples,
        max_completion_length=options.tokens,
        generation_kwargs=exact,
        instruction=None,
        roles={"text": {}},
        report_to="none",
    )
    rows = scenes.rows(form="unsupervised", count=options.prompts)
    return GraceGRPOTrainer(folder, args, rows, ["contrastive"])


if __name__ == "__main__":
    main()
