"""The encoder: the same text, the same vector, whatever else is encoded with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grace_rl.data import scenes
from grace_rl.embed.cache import model_fingerprint
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.loading import load_encoder
from grace_rl.embed.reader import FROZEN_FOLDER
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderSettings
from grace_rl.errors import UserError
from grace_rl.rollout.policy import read_config


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> RationaleEncoder:
    return RationaleEncoder.from_pretrained(model_folder)


@pytest.mark.parametrize("rationale", ["none", "greedy", "sample"])
def test_a_text_alone_and_in_a_batch(
    encoder: RationaleEncoder, texts: list[str], rationale: str
) -> None:
    together = encoder.encode(texts, rationale)  # type: ignore[arg-type]
    for i in (0, 7, 23):
        alone = encoder.encode([texts[i]], rationale)  # type: ignore[arg-type]
        assert alone.rationales[0] == together.rationales[i]
        torch.testing.assert_close(alone.vectors[0], together.vectors[i], atol=1e-5, rtol=0)


def test_order_and_repeats_do_not_matter(encoder: RationaleEncoder, texts: list[str]) -> None:
    forward = encoder.encode(texts)
    backward = encoder.encode([*texts[::-1], texts[0]])
    assert backward.rationales == [*forward.rationales[::-1], forward.rationales[0]]
    assert backward.lengths[-1] == forward.lengths[0] > 1
    assert torch.equal(backward.vectors[-2], backward.vectors[-1])
    torch.testing.assert_close(backward.vectors[:-1], forward.vectors.flip(0), atol=1e-5, rtol=0)


def test_vectors_are_those_of_write_and_read(encoder: RationaleEncoder, texts: list[str]) -> None:
    written = encoder.write(texts)
    expected = encoder.reader.finish(encoder.reader.read(written))
    torch.testing.assert_close(encoder.encode(texts).vectors, expected, atol=1e-5, rtol=0)


def test_samples_follow_seed_and_temperature(encoder: RationaleEncoder, texts: list[str]) -> None:
    def sample(**settings: object) -> list[str]:
        return encoder.encode(texts, "sample", **settings).rationales  # type: ignore[arg-type]

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample(temperature=1e-4) == encoder.encode(texts).rationales


def test_samples_have_the_policys_frequencies(encoder: RationaleEncoder, texts: list[str]) -> None:
    prompt = encoder.template.render(texts[0]).token_ids
    opening = encoder.write(texts[:1])[0].token_ids[:1]
    with torch.no_grad():
        logits = encoder.model(torch.tensor([prompt + opening])).logits[0, -1] / 1.5
    draws = 600
    how = {"max_rationale_tokens": 2, "temperature": 1.5}
    second = torch.tensor(
        [
            encoder.write([texts[0]], "sample", seed=seed, **how)[0].token_ids[1]  # type: ignore[arg-type]
            for seed in range(draws)
        ]
    )
    expected = logits.softmax(-1)
    best = int(expected.argmax())
    share = float((second == best).float().mean())
    deviation = float((expected[best] * (1 - expected[best]) / draws).sqrt())
    assert abs(share - float(expected[best])) < 4 * deviation + 0.02


def test_attributes_hold_until_a_call_says_otherwise(model_folder: Path, texts: list[str]) -> None:
    encoder = RationaleEncoder.from_pretrained(model_folder)
    encoder.max_rationale_tokens = 3
    assert max(encoder.encode(texts).lengths) == 3
    assert max(encoder.encode(texts, max_rationale_tokens=5).lengths) == 5
    encoder.rationale = "none"
    assert encoder.encode(texts).rationales == texts
    assert encoder.encode(texts[:1], "greedy").rationales != texts[:1]


def test_an_instruction_replaces_the_trained_one(
    encoder: RationaleEncoder, texts: list[str]
) -> None:
    told = encoder.write(texts[:1], instruction="Say who it is.")[0].prompt.string
    assert "Say who it is." in told and told != encoder.write(texts[:1])[0].prompt.string


def test_wrong_settings_are_listed_together(encoder: RationaleEncoder) -> None:
    with pytest.raises(UserError) as error:
        encoder.encode(["a"], "beam", max_rationale_tokens=0, temperature=0.0)  # type: ignore[arg-type]
    assert len(error.value.problems) == 3


def test_blank_texts_are_zero_and_nothing_is_nothing(encoder: RationaleEncoder) -> None:
    encoded = encoder.encode(["  ", "A cook sells a lamp.", ""])
    assert encoded.rationales[0] == "" and encoded.lengths[2] == 0
    assert encoded.vectors.norm(dim=-1).round().tolist() == [0, 1, 0]
    assert encoder.encode([]).vectors.numel() == 0


# -- rationales given ---------------------------------


def test_given_rationales_are_read_as_if_written(
    model_folder: Path, context_folder: Path, texts: list[str]
) -> None:
    for folder, given in ((model_folder, None), (context_folder, texts)):
        encoder = RationaleEncoder.from_pretrained(folder)
        encoded = encoder.encode(texts)
        again = encoder.encode_rationales(encoded.rationales, given)
        torch.testing.assert_close(again, encoded.vectors, atol=1e-5, rtol=0)


def test_an_edited_rationale_moves_the_vector(encoder: RationaleEncoder) -> None:
    old, new, same = encoder.encode_rationales(
        ["Facts: thief lamp hill", "Facts: thief boat hill", "Facts: thief lamp hill"]
    )
    assert torch.allclose(old, same) and old @ new < 0.99


def test_one_text_is_not_taken_for_its_characters(encoder: RationaleEncoder) -> None:
    for call in (encoder.encode, encoder.write, encoder.encode_rationales):
        with pytest.raises(UserError, match="give a list of texts"):
            call("a thief")  # type: ignore[operator]
    with pytest.raises(UserError, match="1 rationales, but 2 texts"):
        encoder.encode_rationales(["a thief"], ["one", "two"])


def test_context_needs_the_texts(context_folder: Path) -> None:
    with pytest.raises(UserError, match="give the texts"):
        RationaleEncoder.from_pretrained(context_folder).encode_rationales(["thief"])


# -- centre and files ---------------------------------


def test_centre_is_the_mean_of_the_corpus_and_is_kept(model_folder: Path, texts: list[str]) -> None:
    encoder = RationaleEncoder.from_pretrained(model_folder)
    assert encoder.fit_centre(iter([*texts, " "])) == len(texts)
    raw = encoder.reader.read(encoder.write(texts))
    torch.testing.assert_close(encoder.reader.centre, raw.mean(0), atol=1e-5, rtol=0)
    again = RationaleEncoder.from_pretrained(model_folder)  # saved with the centre of these texts
    torch.testing.assert_close(again.encode(texts).vectors, encoder.encode(texts).vectors)


def test_no_centre_is_fitted_where_none_was_trained(tmp_path: Path) -> None:
    settings = EncoderSettings(reader=ReaderConfig(centre=False), instruction=None)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    with pytest.raises(UserError, match=r"reader\.centre is false"):
        encoder.fit_centre(["a"])


def test_another_reader_leaves_the_centre_out(model_folder: Path) -> None:
    other = EncoderSettings(reader=ReaderConfig(span="context"), instruction=None)
    assert RationaleEncoder.from_pretrained(model_folder).reader.centre is not None
    assert RationaleEncoder.from_pretrained(model_folder, settings=other).reader.centre is None


def test_frozen_weights_are_saved_with_the_model(tmp_path: Path, texts: list[str]) -> None:
    settings = EncoderSettings(
        reader=ReaderConfig(weights="frozen"), instruction=None, max_rationale_tokens=16
    )
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    encoder.fit_centre(texts)
    with torch.no_grad():  # training moves the policy, not the frozen reader
        encoder.model.model.norm.weight.mul_(torch.linspace(0.5, 2, 128))
    encoder.save(tmp_path)
    assert (tmp_path / FROZEN_FOLDER / "config.json").exists()
    again = RationaleEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.encode(texts).vectors, encoder.encode(texts).vectors, atol=1e-5, rtol=0
    )


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grace.json"):
        RationaleEncoder.from_pretrained(tmp_path)
    (tmp_path / "grace.json").write_text('{"reader": {}, "colour": "red"}')
    with pytest.raises(UserError, match="colour"):
        RationaleEncoder.from_pretrained(tmp_path)


def test_a_checkpoint_that_is_an_adapter_is_merged_into_its_base(
    model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    base = RationaleEncoder.from_pretrained(model_folder)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(base.model, config)  # type: ignore[arg-type]
    policy.peft_config["default"].base_model_name_or_path = str(model_folder)
    policy.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "grace.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    shutil.copytree(model_folder / "reader", tmp_path / "reader")
    (tmp_path / "modules.json").write_bytes((model_folder / "modules.json").read_bytes())
    merged = load_encoder(tmp_path)
    assert isinstance(merged, RationaleEncoder)
    expected = RationaleEncoder.from_pretrained(model_folder)
    assert expected.encode(texts).rationales != merged.encode(texts).rationales
    base.model = policy.merge_and_unload()
    assert base.encode(texts).rationales == merged.encode(texts).rationales
    with pytest.raises(UserError, match="is an adapter"):
        load_encoder(tmp_path, engine="vllm")


def test_an_adapters_identity_and_mistakes_are_its_bases_too(tmp_path: Path) -> None:
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "{name}"}}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    found = []
    for name in ("base", "other", "absent"):
        config = {"base_model_name_or_path": str(tmp_path / name)}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        found.append(model_fingerprint(adapter))
    (tmp_path / "other" / "config.json").write_text('{"model_type": "another"}')
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "other")})
    )
    assert len({*found, model_fingerprint(adapter)}) == 4
    with pytest.raises(UserError, match=f"of its base model {tmp_path / 'other'}"):
        read_config(adapter)
