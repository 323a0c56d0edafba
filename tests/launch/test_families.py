"""Models of many families: two training steps, or a refusal by `check` and `train` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from grace_rl.cli import main
from grace_rl.data import scenes

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOST = WIDE | {"intermediate_size": 48, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4}
GEMMA = MOST | {"head_dim": 8}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", MOST),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GEMMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", MOST),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOST | {"num_local_experts": 2}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", MOST),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", MOST),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", MOST),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", OLD),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", WIDE | {"intermediate_size": 48}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM", WIDE),
    "opt": ("OPTConfig", "OPTForCausalLM", WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", WIDE | {"intermediate_size": 48}),
    "bert_head": ("BertConfig", "BertLMHeadModel", WIDE | {"intermediate_size": 48}),
    "backbone": ("LlamaConfig", "LlamaModel", MOST),
    "classifier": ("LlamaConfig", "LlamaForSequenceClassification", MOST),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}
"""Name -> config class, model class, sizes."""

RECIPE = """
method: grpo
dtype: float32
dataset_name: scenes
dataset_rows: 8
dataset_options: {form: triplet}
instruction: null
roles: {query: {}, positive: {}}
reader: {span: bottleneck, layers: [0, 1, -1]}
rewards: [{name: contrastive}]
num_generations: 2
per_device_train_batch_size: 8
max_completion_length: 6
max_steps: 2
use_cpu: true
bf16: false
gradient_checkpointing: false
save_strategy: "no"
print_rollouts_steps: 0
report_to: none
"""
REFUSED = {"bert", "bert_head", "backbone", "classifier", "t5"}
NO_DEFAULT = {"mixtral", "olmo2", "phi3", "mamba"}  # PEFT 0.21 does not know what to adapt


def save_family(name: str, folder: Path) -> Path:
    """Write a random model of a family, the same each time."""
    config, model, sizes = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(scenes.COLD_START)
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = getattr(transformers, config)(vocab_size=len(tokenizer), **ids, **sizes)
    torch.manual_seed(0)
    getattr(transformers, model)(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(name):
        if name not in made:
            made[name] = save_family(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return model


@pytest.fixture
def run(tmp_path, capsys, models):
    """A command on the recipe with a family's model; its exit code, and what it said on stderr."""

    def run(command, family, *options):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE)
        model = ("--model_name_or_path", str(models(family)))
        capsys.readouterr()
        code = main([*command, str(path), *model, "--output_dir", str(tmp_path / "run"), *options])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_or_is_refused(run, tmp_path, family):
    code, said = run(["train"], family)
    if family in REFUSED:
        assert code == 2 and "--model_name_or_path: " in said
        assert run(["check"], family) == (2, said)
        assert run(["train", "--dry-run"], family) == (2, said)
    else:
        assert code == 0
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REFUSED))
def test_an_adapter_without_targets_is_peft_s_own_or_asked_for(run, family):
    code, said = run(["check"], family, "--use_peft", "true")
    if family in NO_DEFAULT:
        assert code == 2 and "lora_target_modules: " in said
        assert run(["train"], family, "--use_peft", "true") == (2, said)
    else:
        assert code == 0
