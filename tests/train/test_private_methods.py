"""Every private name of other packages that we override or use: that it is there, and why.

A new version may change what is private. Then this test names the file and the reason, before a run
finds out. What is used and not listed here fails too.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer
from transformers.integrations import deepspeed
from trl import SFTTrainer
from trl.generation import vllm_generation

from grace_rl.rollout.engines import GRPOTrainer

ROOM = Path(__file__).parents[2] / "grace_rl"
STTrainer = sentence_transformers.SentenceTransformerTrainer.__mro__[1]

OVERRIDDEN: dict[tuple[type, str], tuple[str, list[str], str]] = {
    (GRPOTrainer, "_get_train_sampler"): ("train/hooks", ["dataset"], "whole bundles in a batch"),
    (GRPOTrainer, "_get_eval_sampler"): ("train/hooks", ["eval_dataset"], "whole bundles too"),
    (GRPOTrainer, "_generate_and_score_completions"): (
        "train/hooks", ["inputs"], "a batch begins and ends here"
    ),
    (GRPOTrainer, "_tokenize_prompts"): ("train/hooks", ["prompts"], "prompts are ours"),
    (GRPOTrainer, "_generate_single_turn"): (
        "train/hooks",
        ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        "anchors are written along",
    ),
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): (
        "train/hooks",
        ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "..."],
        "its forward is read along, and gives the critic's values",
    ),
    (GRPOTrainer, "_calculate_rewards"): (
        "train/hooks",
        ["inputs", "prompts", "completions", "completion_ids_list"],
        "rewards see embeddings",
    ),
    (GRPOTrainer, "_compute_loss"): ("train/ppo", ["model", "inputs"], "PPO adds its value loss"),
    (GRPOTrainer, "_save_checkpoint"): ("train/checkpointed", ["model", "trial"], "whole or none"),
    (SFTTrainer, "_save_checkpoint"): ("train/checkpointed", ["model", "trial"], "whole or absent"),
    (Trainer, "_save_checkpoint"): ("train/checkpointed", ["model", "trial"], "whole or absent"),
    (Trainer, "_run_epoch"): ("train/checkpointed", ["..."], "a finished run trains no more"),
    (Trainer, "_load_rng_state"): ("train/checkpointed", ["checkpoint"], "without pickles"),
    (Trainer, "_issue_warnings_after_load"): (
        "train/checkpointed", ["load_result"], "tied weights are not missing"
    ),
    (Trainer, "_load_from_checkpoint"): (
        "train/ppo", ["resume_from_checkpoint", "model"], "without the critic"
    ),
    (STTrainer, "_load_from_checkpoint"): ("train/infonce", ["checkpoint_path"], "our module"),
    (Trainer, "_load_optimizer_and_scheduler"): (
        "train/checkpointed", ["checkpoint"], "what else a checkpoint keeps"
    ),
    (GRPOTrainer, "_load_optimizer_and_scheduler"): (
        "train/checkpointed", ["checkpoint"], "what else a checkpoint keeps"
    ),
    (Trainer, "_save"): (
        "train/policy_trainer", ["output_dir", "state_dict"], "reader beside weights"
    ),
    (STTrainer, "_save"): ("train/infonce", ["output_dir", "state_dict"], "reader beside weights"),
    (Trainer, "_track_num_input_tokens"): ("train/policy_trainer", ["inputs"], "ours counts"),
    (torch.nn.Module, "_apply"): ("embed/encoder", ["fn", "recurse"], "device and dtype follow"),
}  # fmt: skip
"""(owner, name) -> file, parameters ("...": whatever follows), why."""

USED: dict[str, tuple[str, Any, str]] = {
    "_log_metric": ("train/grpo", GRPOTrainer, "for plain reward functions"),
    "_log_completion_extra": ("train/grpo", GRPOTrainer, "for plain reward functions"),
    "_step": ("train/hooks", GRPOTrainer, "when an optimizer step ends"),
    "_metrics": ("train/hooks", GRPOTrainer, "our metrics beside TRL's"),
    "_tokenizer": ("train/grpo", GRPOTrainer, "decodes what was written"),
    "_iter_named_params": ("rollout/engines", vllm_generation.VLLMGeneration, "weights to vLLM"),
    "_forward_hooks": ("embed/hidden_states", torch.nn.Module(), "each hook once"),
    "_forward_pre_hooks": ("embed/hidden_states", torch.nn.Module(), "each hook once"),
    "_modules": ("credit/value_model", torch.nn.Module(), "the critic leaves for a while"),
    "_hf_deepspeed_config_weak_ref": ("run/zero", deepspeed, "models outside of ZeRO-3"),
    "_reset_state": ("run/processes", AcceleratorState, "a second run in one process"),
    "_setup_devices": ("train/checkpointed", Trainer, "transformers' name for the device"),
    "_actions": ("cli", argparse.ArgumentParser(), "the nearest option"),
}
"""Name -> file, owner, why."""
NO_PRIVATE_NAMES = {"_asdict", "_id", "_abc_impl", "_exit"}  # documented by Python; a column


@pytest.mark.parametrize(
    ("owner", "name"), OVERRIDDEN, ids=[f"{o.__name__}{n}" for o, n in OVERRIDDEN]
)
def test_what_is_overridden_has_its_parameters(owner: type, name: str) -> None:
    file, parameters, why = OVERRIDDEN[owner, name]
    found = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
    if "..." in parameters:
        parameters = parameters[: parameters.index("...")]
        found = found[: len(parameters)]
    assert found == parameters, f"grace_rl/{file}.py: {owner.__name__}.{name} ({why})"


@pytest.mark.parametrize("name", USED)
def test_what_is_used_is_there(name: str) -> None:
    file, owner, why = USED[name]
    there = hasattr(owner, name) or name in inspect.getsource(
        importlib.import_module(owner.__module__)
    )
    assert there, f"grace_rl/{file}.py: {owner}.{name} ({why})"
    assert name in (ROOM / f"{file}.py").read_text(encoding="utf-8")


def test_vllm_is_started_where_trl_starts_it() -> None:
    """rollout/engines.py replaces the name `LLM` in this module while TRL builds its engine."""
    assert "= LLM(" in inspect.getsource(vllm_generation)


def test_every_override_is_listed() -> None:
    missing = {
        f"{foreign.__module__}.{foreign.__name__}.{name} in {own.__module__}"
        for own, foreign, name in overrides()
        if (foreign, name) not in OVERRIDDEN
    }
    assert not missing


def overrides() -> Iterator[tuple[type, type, str]]:
    """Private methods of ours that hide one of another package: our class, theirs, the name."""
    rooms = ("train", "run", "rollout", "embed", "credit")
    for file in (file for room in rooms for file in (ROOM / room).rglob("[!_]*.py")):
        module = importlib.import_module(
            ".".join(file.relative_to(ROOM.parent).with_suffix("").parts)
        )
        for owner in vars(module).values():
            if not inspect.isclass(owner) or owner.__module__ != module.__name__:
                continue
            ours = [c for c in owner.__mro__ if c.__module__.startswith("grace_rl")]
            theirs = [c for c in owner.__mro__ if c not in ours]
            for own in ours:
                for name in filter(private, vars(own)):
                    hidden = (c for c in theirs if callable(vars(c).get(name)))
                    if (foreign := next(hidden, None)) is not None:
                        yield own, foreign, name


def test_every_use_is_listed() -> None:
    """Private attributes that nothing in grace_rl defines belong to somebody else."""
    defined, used = set(NO_PRIVATE_NAMES), dict[str, str]()
    for file in ROOM.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
                    defined.add(node.attr)
                elif private(node.attr):
                    used[node.attr] = f"{file.relative_to(ROOM)}:{node.lineno}"
    listed = {name for _, name in OVERRIDDEN} | set(USED)
    assert {name: place for name, place in used.items() if name not in defined | listed} == {}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NO_PRIVATE_NAMES
