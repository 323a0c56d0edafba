"""Each public name of `SentenceTransformer` works, or raises with a reason, as the table says."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import InputExample, SentenceTransformer
from torch import nn

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderRole, EncoderSettings
from grace_rl.errors import UserError
from grace_rl.recipe.prompt import PromptConfig

TEXTS = [row["query"] for row in scenes.rows("test", "triplet", 3)]


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> SentenceTransformer:
    model = load(model_folder)
    model[0].max_rationale_tokens = 4
    return model


@pytest.fixture(scope="module")
def table(root: Path) -> dict[str, str]:
    """Name -> what the table says of it."""
    lines = (root / "docs" / "embedding.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| `SentenceTransformer` | of this package |") + 2
    rows = {}
    for line in lines[first:]:
        if not line.startswith("| `"):
            break
        _, name, says, _ = line.split("|")
        rows[name.strip().strip("`")] = says.strip()
    return rows


def test_the_table_has_every_public_name_once(table: dict[str, str]) -> None:
    inherited = set(dir(nn.Sequential))
    public = {n for n in dir(SentenceTransformer) if not n.startswith("_")} - inherited
    assert set(table) == public
    assert all(says.startswith(("works", "raises")) for says in table.values())


def _adapted(model: SentenceTransformer, call: str, *arguments: Any) -> Any:
    """A call that needs an adapter, on a copy of the model."""
    copy = pickle.loads(pickle.dumps(model))
    copy.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    assert copy.encode(TEXTS).shape == (3, 128)
    return getattr(copy, call)(*arguments)


def _fit(model: SentenceTransformer) -> None:
    model.train()
    try:
        model({"texts": TEXTS, "instruction": None})
    finally:
        model.eval()


CALLS: dict[str, Callable[[SentenceTransformer], Any]] = {
    "encode": lambda m: m.encode(TEXTS),
    "encode_query": lambda m: m.encode_query(TEXTS),
    "encode_document": lambda m: m.encode_document(TEXTS),
    "max_seq_length": lambda m: m.max_seq_length,
    "get_max_seq_length": lambda m: m.get_max_seq_length(),
    "tokenizer": lambda m: m.tokenizer(TEXTS),
    "processor": lambda m: m.processor(TEXTS),
    "preprocess": lambda m: m.preprocess(TEXTS)["texts"],
    "tokenize": lambda m: m.tokenize(TEXTS)["texts"],
    "get_sentence_features": lambda m: m.get_sentence_features(TEXTS),
    "is_singular_input": lambda m: m.is_singular_input("a"),
    "supports": lambda m: m.supports("text") and not m.supports("image"),
    "modalities": lambda m: m.modalities,
    "similarity": lambda m: m.similarity(m.encode(TEXTS), m.encode(TEXTS)),
    "similarity_pairwise": lambda m: m.similarity_pairwise(m.encode(TEXTS), m.encode(TEXTS)),
    "similarity_fn_name": lambda m: m.similarity_fn_name,
    "get_embedding_dimension": lambda m: m.get_embedding_dimension(),
    "get_sentence_embedding_dimension": lambda m: m.get_sentence_embedding_dimension(),
    "device": lambda m: m.device,
    "dtype": lambda m: m.dtype,
    "config": lambda m: m.config,
    "transformers_model": lambda m: m.transformers_model,
    "get_backend": lambda m: m.get_backend(),
    "get_model_kwargs": lambda m: m.get_model_kwargs(),
    "fit": _fit,
    "old_fit": _fit,
    "smart_batching_collate": lambda m: m.smart_batching_collate(
        [InputExample(texts=["a", "b"], label=1)]
    ),
    "set_pooling_include_prompt": lambda m: m.set_pooling_include_prompt(False) or 1,
    "clear_placement_cache": lambda m: m.clear_placement_cache() or 1,
    "merge": lambda m: SentenceTransformer.merge([m, m]),
    "has_peft_compatible_model": lambda m: m.has_peft_compatible_model(),
    "add_adapter": lambda m: _adapted(m, "encode", TEXTS),
    "set_adapter": lambda m: _adapted(m, "set_adapter", "one") or 1,
    "enable_adapters": lambda m: _adapted(m, "enable_adapters") or 1,
    "disable_adapters": lambda m: _adapted(m, "disable_adapters") or 1,
    "active_adapters": lambda m: _adapted(m, "active_adapters"),
    "get_adapter_state_dict": lambda m: _adapted(m, "get_adapter_state_dict"),
    "delete_adapter": lambda m: _adapted(m, "delete_adapter", "one") or 1,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_it_does_what_the_table_says(
    model: SentenceTransformer, table: dict[str, str], name: str
) -> None:
    if table[name].startswith("raises"):
        with pytest.raises((UserError, ImportError)):
            CALLS[name](model)
    else:
        assert CALLS[name](model) is not None


def test_max_seq_length_cuts_texts(model_folder: Path) -> None:
    model = load(model_folder)
    before = model.encode(TEXTS, rationale="none")
    assert model.max_seq_length == 128
    model.max_seq_length = 3
    after = model.encode(TEXTS, rationale="none")
    assert model.max_seq_length == 3 and np.abs(before - after).max() > 1e-3
    for wrong in (0, None, -1, 2.5):
        with pytest.raises(UserError, match="max_text_tokens"):
            model.max_seq_length = wrong


def test_the_forms_of_encode(model: SentenceTransformer) -> None:
    plain = model.encode(TEXTS)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        assert len(model.encode(TEXTS, precision=precision)) == 3
    np.testing.assert_allclose(model.encode(TEXTS, truncate_dim=8), plain[:, :8], atol=1e-5)
    assert model.encode(TEXTS, convert_to_tensor=True).shape == plain.shape
    assert model.encode(TEXTS[0]).shape == plain.shape[1:] and len(model.encode([])) == 0
    assert {"texts", "sentence_embedding"} <= set(model.encode(TEXTS, output_value=None)[0])
    with pytest.raises(UserError, match="output_value"):
        model.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(UserError, match="tokenizer"):
        model.tokenizer = model.tokenizer
    with model.truncate_embeddings(4):
        assert model.encode(TEXTS).shape == (3, 4)


def test_an_adapter_is_not_saved_alone(model: SentenceTransformer, tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(model))
    copy.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    with pytest.raises(UserError, match="merge it"):
        copy.save_pretrained(str(tmp_path))


def test_a_pickled_model_is_the_model(model_folder: Path, tmp_path: Path) -> None:
    """What a pool of processes sends to each."""
    model = load(model_folder)
    model[0].use_cache(tmp_path / "cache.sqlite")
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(copy.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


@pytest.mark.slow
def test_a_pool_of_processes(model_folder: Path) -> None:
    model = load(model_folder)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        np.testing.assert_allclose(model.encode(TEXTS, pool=pool), model.encode(TEXTS), atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)


def test_mteb_sees_what_decides_the_vectors(model_folder: Path, tmp_path: Path) -> None:
    """Name and revision, under which mteb files a model's results."""
    wrapper = pytest.importorskip("mteb.models").SentenceTransformerEncoderWrapper

    def meta(model: SentenceTransformer) -> tuple[str, str]:
        found = wrapper(model).mteb_model_meta
        return found.name, found.revision

    model = load(model_folder)
    first = meta(model)
    assert first[0].startswith("local/") and first == meta(load(model_folder))
    seen = {first}

    def rationale() -> None:
        model[0].rationale = "none"

    def centre() -> None:
        model[0].reader.centre = torch.zeros(128)

    def length() -> None:
        model.max_seq_length = 9

    for change in (rationale, centre, length):
        change()
        assert meta(model) not in seen
        seen.add(meta(model))
    other = tmp_path / "model"
    settings = EncoderSettings(instruction="Say it.", max_rationale_tokens=32)
    RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings).save(other)
    assert meta(load(other)) not in seen
    model.save_pretrained(str(tmp_path / "saved"))  # with a card


def test_the_prompt_of_training_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that prints the date: the vector of tomorrow is that of today."""
    import transformers.utils.chat_template_utils as templates

    day = ["26 Nov 2026"]

    class Clock(templates.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.strptime(day[0], "%d %b %Y")

    monkeypatch.setattr(templates, "datetime", Clock)
    settings = EncoderSettings(instruction="Say it.", max_rationale_tokens=8)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    encoder.tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }} "
        "{% for m in messages %}{{ m['content'] }} {% endfor %}Facts:"
    )
    encoder.save(tmp_path / "start")
    (tmp_path / "start" / "grace.json").unlink()
    trained = RationaleEncoder.from_pretrained(tmp_path / "start", settings=settings)
    trained.save(tmp_path / "model")
    cache = tmp_path / "cache.sqlite"
    today = RationaleEncoder.from_pretrained(tmp_path / "model", cache=cache)
    vectors = today.encode(TEXTS).vectors
    assert "26 Nov" in today.template.prefix and trained.template.changes_with() == ["date"]
    day[0] = "01 Dec 2026"
    tomorrow = RationaleEncoder.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(tomorrow.encode(TEXTS).vectors, vectors, atol=1e-6, rtol=0)
    told = tomorrow.write(TEXTS[:1], instruction="Who is it?")[0].prompt.string
    assert "26 Nov" in told and "Who is it?" in told
    untrained = RationaleEncoder.from_pretrained(tmp_path / "start", settings=settings, cache=cache)
    assert untrained.writer.keys(TEXTS, untrained._how(None, {})) != today.writer.keys(
        TEXTS, today._how(None, {})
    )


def test_queries_are_written_for_and_documents_are_not(tmp_path: Path, texts: list[str]) -> None:
    """The reader `joint` with roles: a round trip through sentence-transformers."""
    settings = EncoderSettings(
        reader=ReaderConfig(span="joint", weight=2.0),
        instruction=PromptConfig(user="Say: {text}!"),
        max_rationale_tokens=8,
        roles={"document": EncoderRole(write=False)},
    )
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    encoder.fit_centre(texts[:6])
    encoder.save(tmp_path)
    model = load(tmp_path)
    alone = encoder.encode(texts[:6], "none").vectors
    both = encoder.encode(texts[:6], role="query").vectors
    assert not torch.allclose(both, alone, atol=0.05)
    document, query = (
        torch.tensor(f(texts[:6])) for f in (model.encode_document, model.encode_query)
    )
    torch.testing.assert_close(document, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(query, both, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(model.encode(texts[:6])), both, atol=1e-5, rtol=0)


def test_a_role_keeps_the_prompt_it_was_trained_with(tmp_path: Path) -> None:
    told = PromptConfig(user="Say: {text}!")
    role = EncoderRole(instruction=told, prompt=("as in 1999: ", "?"))
    settings = EncoderSettings(roles={"query": role})
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    encoder.save(tmp_path)
    for one in (encoder, RationaleEncoder.from_pretrained(tmp_path)):
        assert one.roles == {"query": role}
        (written,) = one.write(["A dog."], "none", instruction=told)
        assert written.prompt.string == "as in 1999: A dog.?"
