"""The policy that the speed benchmarks share: about 10M random parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from grace_rl.data import scenes


def save_random_policy(folder: Path, ends: float = 0.0, dtype: torch.dtype = torch.float32) -> int:
    """Write a random model with the tokenizer of scenes; returns its number of parameters.

    A share `ends` of its words ends a rationale, beside the tokenizer's own end token.
    """
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
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    ends_rationale = range(1000, 1000 + int(ends * model.config.vocab_size))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends_rationale]
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()
