"""A GRPO step beside TRL's own: the same tokens, one process, in turn.

    OMP_NUM_THREADS=1 python benchmarks/step.py
    OMP_NUM_THREADS=1 python benchmarks/step.py --off-policy
    OMP_NUM_THREADS=1 python benchmarks/step.py --variants trl trl@eager trl%.05 --lora --rows 1

Rows of scenes (quads, every role trained, 8 samples: 32 rollouts a row) are written for by a Qwen3
of about 10M random parameters (or --model) with exactly --tokens tokens each, and one optimizer
step follows; with --off-policy two steps of half the batch, with --vllm each variant has an engine
of its own. The variants take turns, one generation batch at a time, --repeats times after a
warm-up:

- `trl`: TRL's GRPOTrainer with a constant reward.
- `encodes`: the same with the reward that one would write by hand: it encodes the rationales with
  the policy itself (last layer, mean), and contrasts them.
- `context`, `rationale`, `bottleneck`, `joint`: ours with four rewards; `context+loss` and the
  like: with `reader_loss` besides.

`trl@eager` is a variant with that attn_implementation, `trl%.05` one with that dropout of LoRA; the
first variant is what the others are compared with.

Prints for each the median of seconds by the clock and of processor time, the ratio to the first
(the median over rounds of the ratio inside a round, with its quartiles), and how many tokens went
through the decoder stack for each trained token; below it seconds of processor time by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from random_policy import save_random_policy
from transformers import TrainerCallback
from trl import GRPOConfig

from grace_rl.data import scenes
from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.embed.hidden_states import decoder_stack
from grace_rl.recipe.roles import RoleConfig
from grace_rl.rollout.engines import GRPOTrainer, repair_weight_push, vllm_start
from grace_rl.rollout.policy import load_policy
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train import phases
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

RESULTS = Path(__file__).parent / "results"
ROLES = ("query", "positive", "negative", "negative_positive")
SAMPLES = 8
REWARDS = ["contrastive", "consistency", "hard_negative", "length"]
VARIANTS = ("trl", "encodes", "context", "rationale", "bottleneck", "joint")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--micro-batch", type=int, help="rows of one backward; all by default")
    parser.add_argument("--off-policy", action="store_true")
    parser.add_argument("--model", help="a language model's folder")
    parser.add_argument("--lora", action="store_true", help="train an adapter (rank 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--vllm", action="store_true", help="vLLM writes, in this process")
    parser.add_argument("--autocast", action="store_true", help="bf16: true")
    parser.add_argument("--output", help="name of the file in benchmarks/results")
    return parser


def main() -> None:
    options = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    show(found, options)
    if options.output:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{options.output}.json"
        path.write_text(json.dumps(found | {"options": vars(options)}, indent=1) + "\n")


# -- the variants ---------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = Path(options.model or folder / "model")
    if not options.model:
        save_random_policy(model)
    time_phases_by_processor()
    steps = {name: Stepper(build(name, options, model, folder / name)) for name in options.variants}
    runs: dict[str, dict[str, list[float]]] = {n: {"clock": [], "cpu": []} for n in steps}
    for repeat in range(options.repeats + 1):
        for name, stepper in steps.items():
            wall, cpu = stepper.batch()
            if repeat:
                runs[name]["clock"].append(wall)
                runs[name]["cpu"].append(cpu)
    for name, stepper in steps.items():
        runs[name]["tokens"] = [stepper.tokens / stepper.trained]
        runs[name]["phases"] = stepper.phases  # type: ignore[assignment]
    parameters = sum(p.numel() for p in steps[options.variants[0]].trainer.model.parameters())
    return {"parameters": parameters, "threads": torch.get_num_threads(), "runs": runs}


def build(name: str, options: argparse.Namespace, model: Path, folder: Path) -> Any:
    """A trainer of the variant, for the same rows, batch and tokens."""
    name, _, dropout = name.partition("%")
    name, _, attention = name.partition("@")
    span, _, loss = name.partition("+")
    rollouts = options.rows * len(ROLES) * SAMPLES
    parts = 2 if options.off_policy else 1
    micro = options.micro_batch or rollouts // parts
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": parts,
        "num_generations": SAMPLES,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rollouts // parts // micro,
        "steps_per_generation": rollouts // micro,
        "max_completion_length": options.tokens,
        "generation_kwargs": {"min_tokens" if options.vllm else "min_new_tokens": options.tokens},
        "learning_rate": 1e-6,
        "use_cpu": True,
        "bf16": options.autocast,
        "use_vllm": options.vllm,
        "vllm_max_model_length": 512,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    policy, tokenizer = load_policy(
        str(model), dtype=options.dtype, attn_implementation=attention or None
    )
    lora = LoraConfig(
        r=16,
        target_modules="all-linear",
        lora_dropout=float(dropout or 0),
        task_type="CAUSAL_LM",
    )
    shared = {"processing_class": tokenizer, "peft_config": lora if options.lora else None}
    rows = scenes.rows("train", "quad", max(16, options.rows))
    if span not in ("trl", "encodes"):
        ours = {"reader": {"span": span}, "reader_loss": {} if loss else None}
        ours |= {"instruction": None, "print_rollouts_steps": 0, "roles": {r: {} for r in ROLES}}
        args = GraceGRPOConfig(**arguments, **ours)
        return GraceGRPOTrainer(policy, args, rows, REWARDS, run_folder=folder, **shared)
    template = PromptTemplate(tokenizer, None, GraceGRPOConfig.max_text_tokens, {})
    bundles = Bundles(rows, parse_roles({role: RoleConfig() for role in ROLES}, SAMPLES))
    prompts = [template.render(text.text) for text in bundles.prompts]
    data = Dataset.from_dict({"prompt": [prompt.string for prompt in prompts]})
    ids = {prompt.string: prompt.token_ids for prompt in prompts}
    with vllm_start(options.vllm):
        trainer = PlainTRL(
            model=policy,
            reward_funcs=[constant if span == "trl" else ByHand()],
            args=GRPOConfig(**arguments, shuffle_dataset=False),
            train_dataset=data,
            **shared,
        )
    if options.vllm:
        repair_weight_push(trainer.vllm_generation)
    trainer.prompt_ids = ids
    for function in trainer.reward_funcs:
        if isinstance(function, ByHand):
            function.trainer = trainer
    return trainer


def time_phases_by_processor() -> None:
    """The trainer's clock of phases counts processor time from now on."""
    phases.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]


def lengths(trainer: GraceGRPOTrainer, rows: int) -> tuple[float, float]:
    """Mean tokens of a prompt and of the text in it, over the first rows."""
    prompts = [
        trainer.render(text.text) for text in trainer.bundles["train"].prompts[: rows * len(ROLES)]
    ]
    texts = [prompt.span[1] - prompt.span[0] for prompt in prompts]
    return statistics.mean(len(p.token_ids) for p in prompts), statistics.mean(texts)


class PlainTRL(GRPOTrainer):
    """TRL's trainer with the prompts of ours."""

    prompt_ids: dict[str, list[int]]

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}


def constant(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class ByHand:
    """The reward of ten lines: encode prompt and rationale with the policy, and contrast."""

    __name__ = "by_hand"
    trainer: Any

    def __call__(
        self, prompts: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        known = [self.trainer.prompt_ids[prompt] for prompt in prompts]
        rows = [p + c for p, c in zip(known, completion_ids, strict=True)]
        width = max(map(len, rows))
        pad = self.trainer.processing_class.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            states = policy(
                ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1
            ).hidden_states[-1]
        vectors = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=-1)
        likeness = unit @ unit.T / 0.1
        counterpart = torch.arange(len(rows)).view(-1, 2, SAMPLES).flip(1).flatten()
        return [float(v) for v in likeness.log_softmax(-1).gather(1, counterpart[:, None])[:, 0]]


class Stepper(TrainerCallback):
    """Runs a trainer one generation batch at a time, and counts what the decoder stack sees."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.tokens = self.trained = 0
        self.phases: dict[str, list[float]] = {}
        self._wall = self._cpu = 0.0
        trainer.add_callback(self)
        stack = decoder_stack(trainer.accelerator.unwrap_model(trainer.model))
        stack.register_forward_pre_hook(self._count, with_kwargs=True)

    def batch(self) -> tuple[float, float]:
        """Seconds of one generation batch and its steps, by the clock and of the processor."""
        self._wall = self._cpu = 0.0
        self.trainer.train()
        options = self.trainer.args
        steps = options.steps_per_generation
        self.trained += options.per_device_train_batch_size * steps * options.max_completion_length
        return self._wall, self._cpu

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._wall -= time.perf_counter()
        self._cpu -= time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._wall += time.perf_counter()
        self._cpu += time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
        for name, value in (logs or {}).items():
            if name.startswith("time/"):
                self.phases.setdefault(name[5:], []).append(round(float(value), 3))

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        self.tokens += (kwargs["inputs_embeds"] if given is None else given).shape[:2].numel()


# -- what was found ---------------------------------


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    runs, base = found["runs"], found["runs"][options.variants[0]]
    print(f"{found['parameters'] / 1e6:.1f}M parameters, {found['threads']} threads")
    print(f"{'':>14} {'seconds':>8} {'cpu':>8} {'ratio':>22} {'ratio, cpu':>22} {'tokens':>7}")
    for name, run in runs.items():
        line = [statistics.median(run["clock"]), statistics.median(run["cpu"])]
        shares = [spread(run[kind], base[kind]) for kind in ("clock", "cpu")]
        run["ratio"], run["ratio_cpu"] = shares
        cells = [f"{m:.3f} ({low:.3f} to {high:.3f})" for low, m, high in shares]
        print(f"{name:>14}", *(f"{v:8.2f}" for v in line), *(f"{c:>22}" for c in cells), end=" ")
        print(f"{run['tokens'][0]:7.2f}")
        if run["phases"]:
            parts = ", ".join(f"{n} {statistics.median(v):.2f}" for n, v in run["phases"].items())
            print(f"{'':>14} {parts}")


def spread(values: list[float], base: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios inside rounds."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [quartiles[0], statistics.median(ratios), quartiles[2]]


if __name__ == "__main__":
    main()
