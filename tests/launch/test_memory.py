"""The formulas, against ZeRO's own table and against what PyTorch really keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from grace_rl.embed.hidden_states import decoder_stack
from grace_rl.launch.memory import (
    GIB,
    MemoryPlan,
    activation_bytes,
    checkpoint_bytes,
    estimate,
    model_shape,
    model_states,
    per_token,
    remedies,
)

WIDTHS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
with torch.device("meta"):
    SHAPE = model_shape(Qwen3ForCausalLM(Qwen3Config(**WIDTHS)))
BIG = dataclasses.replace(SHAPE, parameters=7 * 10**9, trained=7 * 10**9, stack=6 * 10**9)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "model"), [(Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)]
)
def test_parameters_are_counted_without_allocating_any(config, model, tied):
    settings = config(**WIDTHS, tie_word_embeddings=tied)
    real = model(settings)
    with torch.device("meta"):
        shape = model_shape(model(settings))
    assert shape.parameters == shape.trained == sum(p.numel() for p in real.parameters())
    assert shape.stack == sum(p.numel() for p in decoder_stack(real).parameters())
    assert (shape.query, shape.key_value) == (64, 32)


def test_lora_trains_what_peft_adds():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    real = get_peft_model(Qwen3ForCausalLM(Qwen3Config(**WIDTHS)), lora)
    with torch.device("meta"):
        shape = model_shape(Qwen3ForCausalLM(Qwen3Config(**WIDTHS)), lora)
    assert shape.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert shape.parameters == sum(p.numel() for p in real.parameters())


def test_model_states_are_those_of_the_zero_paper():
    """Table 1 of arXiv 1910.02054: 7.5B parameters on 64 GPUs, in 10^9 bytes."""
    sizes = [
        sum(model_states(75 * 10**8, 75 * 10**8, 2, 2, 12, stage, 64).values()) / 1e9
        for stage in range(4)
    ]
    assert sizes == pytest.approx([120, 31.4, 16.6, 1.88], abs=0.05)


def test_activations_are_what_autograd_keeps():
    """Bytes of saved tensors, counted once, of a Qwen3's layers in bfloat16."""
    rows, tokens, kept = 2, 24, {}
    for layers in (2, 4):
        config = Qwen3Config(**WIDTHS | {"num_hidden_layers": layers})
        stack = decoder_stack(Qwen3ForCausalLM(config).to(torch.bfloat16))
        weights = {p.untyped_storage().data_ptr() for p in stack.parameters()}
        alive, sizes = [], {}

        def keep(tensor, alive=alive, sizes=sizes, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            stack(torch.ones(rows, tokens, dtype=torch.long))
        kept[layers] = sum(sizes.values())
    measured = (kept[4] - kept[2]) / 2 / (rows * tokens)  # bytes of one layer for one token
    assert 2 * per_token(SHAPE) == pytest.approx(measured, rel=0.1)
    plan = MemoryPlan(weight_bytes=2, rows=rows, tokens=tokens)
    assert activation_bytes(SHAPE, plan) == rows * tokens * 3 * 2 * per_token(SHAPE)


@pytest.mark.parametrize(
    "less",
    [
        {"checkpointing": True},
        {"rows": 4},
        {"zero_stage": 1, "deepspeed": True},
        {"zero_stage": 3, "deepspeed": True},
        {"weight_bytes": 2},
        {"reference": False},
        {"critic": False},
        {"engine": 0},
        {"engine_sleeps": True},
        {"optimizer_states": 0},
    ],
)
def test_every_measure_takes_less(less):
    plan = MemoryPlan(
        processes=8, rows=8, tokens=4096, reference=True, critic=True, engine=20 * GIB
    )
    total = sum(estimate(BIG, plan).values())
    assert sum(estimate(BIG, dataclasses.replace(plan, **less)).values()) < total


def test_offloading_leaves_neither_weights_nor_optimizer_on_the_gpu():
    plan = MemoryPlan(processes=8, zero_stage=3, deepspeed=True, offload=True, bf16=True)
    assert not {"weights", "optimizer"} & set(estimate(BIG, plan))


def test_remedies_are_ranked_and_say_what_is_enough():
    plan = MemoryPlan(processes=8, rows=8, tokens=1024, reference=True)
    room = 80 * GIB
    assert sum(estimate(BIG, plan).values()) > room
    said = remedies(BIG, plan, room)
    assert 1 <= len(said) <= 3
    saved = [float(line.split(": ")[-1].split(" GiB")[0]) for line in said]
    assert saved == sorted(saved, reverse=True)
    assert any(line.endswith("enough") for line in said)
    assert all(line.endswith("less") for line in remedies(BIG, plan, 1))


def test_a_checkpoint_is_as_large_as_what_it_holds(tmp_path):
    model = Qwen3ForCausalLM(Qwen3Config(**WIDTHS))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert checkpoint_bytes(SHAPE, MemoryPlan()) == pytest.approx(size, rel=0.1)
