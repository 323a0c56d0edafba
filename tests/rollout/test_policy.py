"""Damaged model folders: one line, exit 2, the same from every command, before weights load."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from safetensors.torch import load_file, save_file

from grace_rl.cli import main
from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.rollout.policy import load_policy, outline_policy, read_tokenizer

WEIGHTS = "model.safetensors"
RECIPE = """
method: grpo
dataset_name: scenes
dataset_rows: 8
instruction: null
rewards: [{name: contrastive}]
roles: {query: {}, positive: {}}
num_generations: 2
per_device_train_batch_size: 4
use_cpu: true
bf16: false
report_to: none
"""


class Evil:
    """A pickle that would leave a file where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model":')


def truncated(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def empty_weights(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def a_tensor_is_missing(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.0.input_layernorm.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def other_shapes(folder):
    change_config(folder, vocab_size=config_of(folder)["vocab_size"] + 64)


def too_small_a_vocabulary(folder):
    weights = load_file(folder / WEIGHTS)
    fewer = {
        name: tensor[:-50].clone() if "embed" in name else tensor
        for name, tensor in weights.items()
    }
    save_file(fewer, folder / WEIGHTS, metadata={"format": "pt"})
    change_config(folder, vocab_size=len(fewer["model.embed_tokens.weight"]))


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def config_of_another_kind(folder):
    (folder / "config.json").write_text("[]")


def unknown_family(folder):
    change_config(folder, model_type="nobody_s")


def broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }")


DAMAGE = [
    no_tokenizer, broken_tokenizer, truncated, empty_weights, no_weights, pickled,
    a_tensor_is_missing, other_shapes, too_small_a_vocabulary, broken_config,
    config_of_another_kind, unknown_family, broken_template,
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(scenes.COLD_START, tmp_path / "model")


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_from_every_command(folder, tmp_path, capsys, damage):
    damage(folder)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n')
    (tmp_path / "tasks.yaml").write_text("- {name: a, kind: sts, path: sts.csv}\n")
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,0\n")
    model = ["recipe.yaml", "--model_name_or_path", "./model"]
    said = {}
    for words in (
        ["check", *model],
        ["train", *model],
        ["train", *model, "--dry-run"],
        ["embed", "model", "--input", "texts.jsonl", "--output", "vectors.parquet"],
        ["evaluate", "model", "--tasks", "tasks.yaml"],
        ["serve", "model"],
    ):
        if words[0] == "serve" and damage is broken_template:
            continue  # vLLM is asked for tokens, not for chats
        assert main(words) == 2, words
        lines = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in lines if not line.startswith("Loading weights")]
        assert len(lines) == 1 and "model" in lines[0], (words, lines)
        said["--dry-run" in words, words[0]] = lines[0]
    assert said[False, "check"] == said[False, "train"] == said[True, "train"]
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "runs").exists()


def test_an_end_token_that_only_generation_declares_ends_and_pads(folder):
    end = read_tokenizer(folder).eos_token_id
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("eos_token", "pad_token"):
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == end
    (folder / "generation_config.json").write_text("{}")
    assert read_tokenizer(folder).eos_token_id is None


def test_an_outline_has_shapes_and_no_numbers(folder):
    model, _ = load_policy(str(folder))
    outline = outline_policy(folder)
    assert all(p.device.type == "meta" for p in outline.model.parameters())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in outline.model.named_parameters()} == shapes


def test_everything_that_is_wrong_is_said_together(folder):
    broken_tokenizer(folder)
    truncated(folder)
    with pytest.raises(UserError) as error:
        outline_policy(folder)
    assert len(error.value.problems) == 2
