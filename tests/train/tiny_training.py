"""A real SFT run on a random model of a few thousand parameters, for the tests beside it.

They start it as a program:

python tiny_training.py RUN [--max_steps 8] [--save_steps 2] [--pause 0] [--interrupt_at STEP]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from grace_rl.errors import UserError
from grace_rl.rollout.store import write_rollouts
from grace_rl.run.directory import RunDirectory
from grace_rl.train.callbacks import follow
from grace_rl.train.checkpointed import CheckpointMixin


class TinyTrainer(CheckpointMixin, SFTTrainer):
    loaded: str | None = None

    def save_extra_state(self, folder: Path) -> None:
        (folder / "extra.txt").write_text(f"step {self.state.global_step}")

    def load_extra_state(self, folder: Path) -> None:
        self.loaded = (folder / "extra.txt").read_text()


class EachStep(TrainerCallback):
    """Rollouts for every step, and the signal or pause that a test asks for."""

    def __init__(
        self, run: RunDirectory, pause: float = 0.0, interrupt_at: int | None = None
    ) -> None:
        self.run, self.pause, self.interrupt_at = run, pause, interrupt_at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if state.is_world_process_zero:
            write_rollouts(self.run.path, step, some_rollouts(step))
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(self.pause)


def some_rollouts(seed: int, count: int = 4) -> dict[str, list[Any]]:
    embeddings = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return {
        "example": [0] * count,
        "group": [0] * count,
        "role": ["query"] * count,
        "text": ["a red fox"] * count,
        "rationale": [f"rationale {i}" for i in range(count)],
        "token_ids": [[1, 2, i] for i in range(count)],
        "truncated": [False] * count,
        "advantage": [0.5] * (count - 1) + [None],
        "step_scores": [[0.1, 0.2]] * (count - 1) + [None],
        "embedding": torch.nn.functional.normalize(embeddings).tolist(),
        "reward/contrastive": [float(i) for i in range(count)],
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_trainer(
    run: RunDirectory,
    max_steps: int = 8,
    save_steps: int = 2,
    model: dict[str, Any] | None = None,
    **arguments: Any,
) -> TinyTrainer:
    """`model` goes to the policy's config, `arguments` to the trainer's."""
    torch.manual_seed(0)
    policy = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            attention_dropout=0.1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            **model or {},
        )
    )
    rows = torch.randint(3, 29, (10, 8), generator=torch.Generator().manual_seed(1)).tolist()
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "save_total_limit": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 16,
    }
    args = SFTConfig(
        output_dir=str(run.checkpoints),
        max_steps=max_steps,
        save_steps=save_steps,
        **defaults | arguments,
    )
    return TinyTrainer(
        model=policy,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tiny_tokenizer(),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--interrupt_at", type=int)
    options = parser.parse_args()
    processes = PartialState(cpu=True) if "WORLD_SIZE" in os.environ else None  # torchrun
    if processes is not None and processes.process_index != 1:
        options.interrupt_at = None  # one process is told, all must stop
    run = RunDirectory(options.run, processes)
    try:
        opened = run.open({"max_steps": options.max_steps, "learning_rate": 1e-2})
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    shared = {"accelerator_config": {"use_configured_state": True}} if processes else {}
    trainer = tiny_trainer(run, options.max_steps, options.save_steps, **shared)
    trainer.add_callback(EachStep(run, options.pause, options.interrupt_at))
    with follow(trainer, run, console=Console()) as stop:
        trainer.train(resume_from_checkpoint=opened.checkpoint)
    if stop.interrupted:
        return 130
    run.publish_model(lambda folder: trainer.save_model(str(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
