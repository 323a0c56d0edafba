"""Layers are found by structure, so that every family of language models can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.hidden_states import decoder_stack, layer_numbers, mix_layers, tap_layers
from grace_rl.embed.loading import encoder_kind, look_before
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.errors import UserError

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
KINDS: dict[str, dict[str, object]] = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50},
    "gpt_neox": SIZES | {"intermediate_size": 32},
    "gpt_neo": {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "vocab_size": 50,
                "attention_types": [[["global"], 3]]},
    "opt": SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "mpt": {"d_model": 16, "n_layers": 3, "n_heads": 2, "vocab_size": 50},
    "falcon": SIZES,
    "gemma2": SIZES | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8},
    "llama": SIZES | {"intermediate_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_output_hidden_states(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **KINDS[kind], bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    found: list[torch.Tensor] = []
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        for layers in ([0], [1], [-1], [0, 2, -1]):
            with tap_layers(decoder_stack(model), layers, found.append):
                model(input_ids=ids)
            expected = mix_layers([hidden[layer] for layer in layers])
            torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [4, 5, -5, 1000])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    config = AutoConfig.for_model("llama", **KINDS["llama"])
    model = AutoModelForCausalLM.from_config(config)
    for call in (
        lambda: layer_numbers([0, layer], 3),
        lambda: Reader(ReaderConfig(layers=[0, layer]), None, [2], model),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=r"reader\.layers: no layer"):
            call()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reader", {"layers": [9]}),
        ("reader", {"layers": []}),
        ("reader", {"span": "all"}),
        ("max_text_tokens", 0),
        ("max_rationale_tokens", -1),
        ("rationale", "beam"),
        ("colour", "red"),
        ("prompt", ["only one"]),
    ],
)
def test_an_edited_grace_json_is_refused(
    model_folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "grace.json").read_text())
    (folder / "grace.json").write_text(json.dumps(settings | {key: value}))
    with pytest.raises(UserError) as error:
        RationaleEncoder.from_pretrained(folder)
    with pytest.raises(UserError) as before:  # the weights are not loaded for it
        look_before(folder, encoder_kind(folder))
    assert key in error.value.problems[0] and key in before.value.problems[0]
