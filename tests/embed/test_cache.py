"""The cache: what is remembered is not written again, and nothing is remembered wrongly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from grace_rl.embed.cache import ENCODER_FILES, RationaleCache, model_fingerprint
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import EncoderSettings
from grace_rl.errors import UserError
from grace_rl.rollout.generator import Continuation, Sampling, Tokens


class Counting:
    """Counts the prompts that are really written."""

    def __init__(self, encoder: RationaleEncoder) -> None:
        self.inner, self.count = encoder.writer.generator, 0
        self.name, self.end_ids = self.inner.name, self.inner.end_ids
        encoder.writer.generator = self

    def generate(self, prompts: Sequence[Tokens], how: Sampling) -> list[list[Continuation]]:
        self.count += len(prompts)
        return self.inner.generate(prompts, how)


@pytest.fixture
def cached(model_folder: Path, tmp_path: Path) -> tuple[RationaleEncoder, Counting]:
    encoder = RationaleEncoder.from_pretrained(model_folder, cache=tmp_path / "cache.sqlite")
    return encoder, Counting(encoder)


def test_a_second_encoding_writes_nothing(
    cached: tuple[RationaleEncoder, Counting], model_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    encoder, counting = cached
    plain = RationaleEncoder.from_pretrained(model_folder).encode([*texts, " "])
    for _ in range(2):
        encoded = encoder.encode([*texts, " "])
        assert (encoded.rationales, encoded.lengths) == (plain.rationales, plain.lengths)
        torch.testing.assert_close(encoded.vectors, plain.vectors, atol=1e-5, rtol=0)
        assert counting.count == len(texts)
    more = encoder.encode([*texts, "A cook sells a lamp."])  # one is new, the others are known
    assert counting.count == len(texts) + 1
    torch.testing.assert_close(more.vectors[:-1], plain.vectors[:-1], atol=1e-5, rtol=0)
    other = RationaleEncoder.from_pretrained(model_folder, cache=tmp_path / "cache.sqlite")
    again = Counting(other)
    assert torch.equal(other.encode(texts).vectors, encoder.encode(texts).vectors)
    assert again.count == 0


def test_written_rationales_serve_another_reader(
    cached: tuple[RationaleEncoder, Counting], model_folder: Path, texts: list[str]
) -> None:
    encoder, counting = cached
    encoder.encode(texts)
    own = EncoderSettings.load(model_folder)
    context = own.changed(reader=ReaderConfig(span="context"))
    other = RationaleEncoder.from_pretrained(model_folder, settings=context)
    other.use_cache(encoder.writer.cache.path)  # type: ignore[union-attr]
    again = Counting(other)
    assert not torch.allclose(other.encode(texts).vectors, encoder.encode(texts).vectors, atol=0.1)
    assert (counting.count, again.count) == (len(texts), 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_rationale_tokens": 4},
        {"instruction": "Say who it is."},
        {"rationale": "sample"},
        {"rationale": "sample", "seed": 5},
        {"rationale": "sample", "temperature": 0.5},
    ],
)
def test_every_setting_that_matters_is_in_the_key(
    cached: tuple[RationaleEncoder, Counting], texts: list[str], changed: dict[str, object]
) -> None:
    encoder, counting = cached
    encoder.encode(texts[:4])
    if changed.get("rationale") == "sample" and len(changed) > 1:
        encoder.encode(texts[:4], "sample")
    before = counting.count
    encoder.encode(texts[:4], **changed)  # type: ignore[arg-type]
    assert counting.count == before + 4


def test_the_centre_is_not_remembered(
    cached: tuple[RationaleEncoder, Counting], texts: list[str]
) -> None:
    encoder, _ = cached
    before = encoder.encode(texts).vectors
    encoder.reader.centre = torch.zeros(before.size(1))
    assert not torch.allclose(encoder.encode(texts).vectors, before, atol=1e-3)


def test_the_fingerprint_is_of_weights_not_of_places(model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    assert model_fingerprint(copy) == model_fingerprint(model_folder)
    vectors = model_fingerprint(copy, ENCODER_FILES)
    (copy / "reader" / "centre.safetensors").unlink()
    assert model_fingerprint(copy) == model_fingerprint(model_folder)
    assert model_fingerprint(copy, ENCODER_FILES) != vectors
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(copy) != model_fingerprint(model_folder)


WRITER = """
import sys
from grace_rl.embed.cache import KeyMaker, RationaleCache
cache, own = RationaleCache(sys.argv[1]), sys.argv[2]
key = KeyMaker("model", {})
for start in range(0, 2000, 20):
    names = [f"shared {i}" for i in range(start, start + 10)]
    names += [f"{own} {i}" for i in range(start, start + 10)]
    cache.add_rationales({key(name): (name, [len(name)]) for name in names})
    found = cache.rationales([key(name) for name in names])
    assert {text for text, _ in found.values()} == set(names)
"""


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    pair = [subprocess.Popen([*command, name]) for name in ("one", "two")]
    assert [process.wait(timeout=900) for process in pair] == [0, 0]
    assert len(RationaleCache(path)) == 1000 + 2 * 1000


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, only some text that is long enough " * 30)
    with pytest.raises(UserError, match=r"notes\.txt: cannot be used as a cache"):
        RationaleCache(path)
