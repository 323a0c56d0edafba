"""Soft tokens: kept keys and values, padding, checkpointing and the prefix property."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from grace_rl.embed.soft_tokens import SoftTokens, soft_tokens

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4)),
}


def a_model(name: str = "qwen3") -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():  # as sharp as a trained one, so that soft tokens differ from their mean
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else None
    return model.train()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four texts of 9, 6, 1 and 9 tokens, padded on the left."""
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :8] = 0
    return ids, mask


def loss_and_gradients(model, **how) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    vectors = soft_tokens(model, *texts(), 5, **how).vectors()
    weights = torch.linspace(-1, 1, vectors.numel()).view_as(vectors)
    loss = (vectors * weights).sum().tanh() + vectors.pow(2).mean()
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(one, other) -> None:
    assert torch.allclose(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = gradient.abs().max()
        assert (gradient - other[1][name]).abs().max() <= 3e-5 * scale.clamp(min=1e-3), name


@pytest.mark.parametrize("name", MODELS)
def test_kept_keys_and_values_change_neither_loss_nor_gradients(name):
    model = a_model(name)
    again = loss_and_gradients(model, cache=False)
    assert_same(again, loss_and_gradients(model))
    model.gradient_checkpointing_enable()
    assert_same(again, loss_and_gradients(model))
    assert model.is_gradient_checkpointing  # as it was


def test_gradient_checkpointing_keeps_fewer_activations():
    model = a_model()
    kept = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            soft_tokens(model, *texts(), 5)
        kept[checkpointing] = count
    assert kept[True] < 0.6 * kept[False]


def test_every_soft_token_is_trained_through_by_hand():
    """One step written out: the gradient of g_1 passes through the softmax and the embeddings."""
    model = a_model().eval()
    ids, mask = texts()[0][:1], texts()[1][:1]
    out = model(input_ids=ids, output_hidden_states=True)
    shares = out.logits[:, -1].softmax(-1)
    mixed = shares @ model.get_input_embeddings().weight
    inputs = torch.cat([model.get_input_embeddings()(ids), mixed.unsqueeze(1)], 1)
    second = model(inputs_embeds=inputs, output_hidden_states=True)
    expected = second.hidden_states[-1][:, -1]
    found = soft_tokens(model, ids, mask, 1, words=2)
    assert torch.allclose(found.states[:, 0], expected, atol=1e-6)
    assert torch.allclose(found.prompt, out.hidden_states[-1][:, -1], atol=1e-6)
    top = shares.topk(2)
    assert torch.equal(found.word_ids[:, 0], top.indices)
    assert torch.allclose(found.word_shares[:, 0], top.values)
    assert torch.allclose(found.entropy[:, 0], -(shares * shares.log()).sum(-1), atol=1e-5)
    probe = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(x.sum(), probe)[0] for x in (found.states, expected)]
    assert torch.allclose(*gradients, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side_changes_nothing(name):
    model = a_model(name).eval()
    ids, mask = texts()
    left = soft_tokens(model, ids, mask, 4)
    right_ids, right_mask = torch.full_like(ids, 2), torch.zeros_like(mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        right_ids[row, :length] = ids[row, -length:]
        right_mask[row, :length] = 1
    right = soft_tokens(model, right_ids, right_mask, 4)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = soft_tokens(model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], 4)
        for found in (left, right):
            assert torch.allclose(found.states[row], alone.states[0], rtol=1e-4, atol=1e-5)
            assert torch.allclose(found.prompt[row], alone.prompt[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_longer_run_holds_the_shorter_one():
    model = a_model().eval()
    long, short = (soft_tokens(model, *texts(), k, words=3) for k in (5, 3))
    assert torch.equal(long.states[:, :3], short.states)
    assert torch.equal(long.vectors()[:, :3], short.vectors())
    assert torch.equal(long.word_ids[:, :3], short.word_ids)
    stopped = soft_tokens(model, *texts(), 5, words=3, until=lambda states: states.size(1) == 3)
    assert torch.equal(stopped.states, short.states)
    assert torch.equal(stopped.entropy, short.entropy)


@torch.no_grad()
def test_no_steps_give_the_state_of_the_last_token():
    model = a_model().eval()
    found = soft_tokens(model, *texts(), 0, words=2)
    assert isinstance(found, SoftTokens)
    assert found.states.shape == (4, 0, 24)
    assert found.word_ids.shape == (4, 0, 2)
    whole = model(input_ids=texts()[0][:1], output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found.vectors()[0, 0], whole[0, -1], atol=1e-6)


def test_an_adapter_leaves_embeddings_and_head_alone():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(a_model(), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    again = loss_and_gradients(model, cache=False)
    assert_same(again, loss_and_gradients(model))
    assert all("lora" in name for name in again[1])
    model.gradient_checkpointing_enable()
    assert_same(again, loss_and_gradients(model))


@torch.no_grad()
def test_the_temperature_sharpens():
    model = a_model().eval()
    cold, hot = (soft_tokens(model, *texts(), 1, temperature=t) for t in (0.5, 2.0))
    assert (cold.entropy < hot.entropy).all()


@torch.no_grad()
def test_mixed_precision_keeps_the_soft_tokens_stream_in_full():
    model = a_model().eval()
    full = soft_tokens(model, *texts(), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = soft_tokens(model, *texts(), 3)
    assert mixed.prompt.dtype == mixed.states.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(mixed.states, full.states, dim=-1).min() > 0.98
