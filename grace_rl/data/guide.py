"""A guide: what a frozen sentence encoder thinks of texts, embedded once and kept on the disk.

    guide/vectors.npy   (N, D) float16 unit vectors, memory-mapped when read
    guide/keys.npy      (N,) uint64, a hash of each text, in the same order
    guide/guide.json    the encoder, N, D, and the calibrated sigma

Texts are embedded in blocks, each a whole file until all are there: a run that was killed goes on
with the first missing block.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_rl.errors import UserError, first_line
from grace_rl.plugins import find
from grace_rl.run.files import whole_file, write_json
from grace_rl.run.identity import ABSENT, path_digest

VECTORS, KEYS, INFO, BLOCKS = "vectors.npy", "keys.npy", "guide.json", "blocks"
BLOCK_TEXTS = 4096
CALIBRATION_PAIRS, CROSS_PAIRS = 20_000, 100_000
Encode = Callable[[Sequence[str]], Any]
"""Texts -> (N, D) vectors; need not be normalised."""


class Guide:
    """Unit vectors of known texts.

    Args:
        folder: What `build_guide` wrote.

    Attributes:
        encoder: Name of the sentence encoder.
        encoder_content: What `named_digest` gave for it.
        sigma: The calibrated threshold, or None where there were no pairs to calibrate with.
        scratch: A temporary folder to hold on to while the guide is used, or None.

    Raises:
        UserError: The folder holds no guide, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.scratch: Any = None
        if not is_guide(self.folder):
            raise UserError(f"{folder}: there is no guide (no {INFO}); grace-rl curate writes one")
        try:
            info = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
            self.encoder: str = info["encoder"]
            self.encoder_content: str | None = info["encoder_content"]
            self.sigma: float | None = info["sigma"]
            self._vectors = np.load(self.folder / VECTORS, mmap_mode="r", allow_pickle=False)
            keys = np.load(self.folder / KEYS, allow_pickle=False)
            if len(keys) != len(self._vectors):
                raise ValueError(f"{len(keys)} keys for {len(self._vectors)} vectors")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{folder}: the guide is damaged ({reason}); remove the folder, and grace-rl "
                "curate or the training writes it again"
            ) from error
        self._rows = {int(key): row for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._rows

    def check_knows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Raises UserError if a row has a text that was never embedded."""
        self._places([text for row in rows for text in row_texts(row)])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 unit vectors of texts.

        Raises:
            UserError: A text was never embedded.
        """
        vectors = np.asarray(self._vectors[self._places(texts)], dtype=np.float32)
        return torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)

    def _places(self, texts: Sequence[str]) -> list[int]:
        places = [self._rows.get(text_key(text)) for text in texts]
        unknown = [text for text, place in zip(texts, places, strict=True) if place is None]
        if unknown:
            raise UserError(
                f"{self.folder}: the guide has not seen {len(unknown)} of the texts, such as "
                f"{unknown[0][:60]!r}; name the encoder instead of the folder, or embed these rows"
            )
        return [place for place in places if place is not None]


def is_guide(folder: Path) -> bool:
    """Whether a folder holds a finished guide."""
    return (folder / INFO).is_file()


def text_key(text: str) -> int:
    """64 bits that stand for a text; among a million texts two meet with a chance of 3e-8.

    >>> text_key("a fox") == text_key("a fox"), text_key("a fox") == text_key("A fox")
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def row_texts(row: dict[str, Any]) -> list[str]:
    """The texts of a row that can meet another row's: all that get a rationale or a vector."""
    names = ("text", "query", "positive", "negative_positive")
    texts = [row[name] for name in names if row.get(name)]
    negatives = row.get("negative") or []
    return texts + ([negatives] if isinstance(negatives, str) else list(negatives))


def build_guide(
    folder: Path,
    rows: Callable[[], Iterable[dict[str, Any]]],
    encoder: str,
    encode: Encode | None = None,
    progress: Callable[[int], None] | None = None,
) -> Guide:
    """Embed every text of the rows that is not embedded yet, and calibrate sigma.

    Args:
        folder: Where the guide goes; what an earlier attempt left there is used.
        rows: Gives the rows anew each time it is called; they are streamed.
        encoder: See `load_encoder`.
        encode: The loaded encoder, where the caller has it.
        progress: Called with the number of texts after each block.

    Raises:
        UserError: The folder holds vectors of another encoder, or the encoder cannot be loaded.
    """
    blocks = folder / BLOCKS
    blocks.mkdir(parents=True, exist_ok=True)
    _check_encoder(folder, encoder)
    known = Guide(folder) if is_guide(folder) else None
    keys: list[int] = []
    files: list[Path] = []
    for texts in _blocks(_unique_texts(rows())):
        digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
        files.append(blocks / f"{digest}.npy")
        if not files[-1].exists():
            new = [text for text in texts if known is None or text not in known]
            vectors: dict[str, Tensor] = {}
            if new:
                encode = encode or load_encoder(encoder)
                vectors |= zip(new, unit_vectors(encode, new), strict=True)
            if known is not None:
                old = [text for text in texts if text not in vectors]
                vectors |= zip(old, known.vectors(old), strict=True)
            with whole_file(files[-1]) as unfinished, unfinished.open("wb") as out:
                np.save(out, torch.stack([vectors[text] for text in texts]).numpy().astype("f2"))
        keys += [text_key(text) for text in texts]
        if progress is not None:
            progress(len(texts))
    if not keys:
        raise UserError(f"{folder}: there is no text to embed")
    _join_blocks(folder, keys, files)
    info: dict[str, Any] = _encoder_note(encoder) | {"texts": len(keys), "sigma": None}
    write_json(folder / INFO, info)
    info["sigma"], info["calibration"] = calibrate(Guide(folder), rows())
    write_json(folder / INFO, info)
    shutil.rmtree(blocks)
    return Guide(folder)


def calibrate(
    guide: Guide, rows: Iterable[dict[str, Any]], quantile: float = 0.995
) -> tuple[float | None, dict[str, float]]:
    """Sigma, from which on two texts of different rows are taken to mean the same.

    The 99.5th percentile of the cosines of random texts of different rows, but never above the
    median cosine of a query and its own positive: what is closer than most positives means the
    same.

    Returns:
        Sigma, None without positives or with a single row; and what it was made of.
    """
    first_rows = islice(rows, CALIBRATION_PAIRS)
    pairs = [(row["query"], row["positive"]) for row in first_rows if "query" in row]
    if len(pairs) < 2:
        return None, {}
    queries, positives = (guide.vectors(list(side)) for side in zip(*pairs, strict=True))
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(len(pairs), (CROSS_PAIRS,), generator=generator)
    step = torch.randint(1, len(pairs), (CROSS_PAIRS,), generator=generator)
    cross = torch.cat(
        [
            (queries[some] * positives[(some + by) % len(pairs)]).sum(1)
            for some, by in zip(first.split(8192), step.split(8192), strict=True)
        ]
    )
    high = float(np.quantile(cross.numpy(), quantile))
    median = float((queries * positives).sum(1).median())
    found = {"cross_quantile": high, "median_positive": median, "cross_mean": float(cross.mean())}
    return min(high, median), found


def load_encoder(name: str, batch_size: int = 128) -> Encode:
    """A frozen sentence encoder by name.

    Args:
        name: Path or hub id of a sentence-transformers model; or `package.module:name` or
            `path/to/file.py:name` (from the working directory) of a function from a list of texts
            to (N, D) vectors.
        batch_size: Texts per forward.

    Raises:
        UserError: There is no such encoder.
    """
    if ":" in name:
        found: Encode = find(name, Path.cwd())
        return found
    from sentence_transformers import SentenceTransformer

    from grace_rl.run.zero import outside_zero3

    try:
        with outside_zero3():
            model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"the sentence encoder {name!r} cannot be loaded: {reason}") from error
    return lambda texts: model.encode(
        list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
    )


def named_digest(name: str) -> str | None:
    """The content of what a name stands for: a folder, or the file of `path/to/file.py:name`.

    None where nothing lies on this disk: a hub id, or a name that is imported.
    """
    for path in (name, name.rpartition(":")[0]):
        if path and (found := path_digest(path)) != ABSENT:
            return found
    return None


def unit_vectors(encode: Encode, texts: Sequence[str]) -> Tensor:
    """(N, D) float32 unit vectors on the CPU."""
    with torch.no_grad():
        vectors = torch.as_tensor(encode(texts), dtype=torch.float32).cpu()
    return torch.nn.functional.normalize(vectors, dim=1)


def _unique_texts(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    seen: set[int] = set()
    for row in rows:
        for text in row_texts(row):
            key = text_key(text)
            if key not in seen:
                seen.add(key)
                yield text


def _blocks(texts: Iterator[str]) -> Iterator[list[str]]:
    while block := list(islice(texts, BLOCK_TEXTS)):
        yield block


def _encoder_note(encoder: str) -> dict[str, Any]:
    return {"encoder": encoder, "encoder_content": named_digest(encoder)}


def _check_encoder(folder: Path, encoder: str) -> None:
    """Vectors of two encoders, or of one before and after a change, must not meet in one folder."""
    note, now = folder / BLOCKS / "encoder.json", _encoder_note(encoder)
    before = now
    if is_guide(folder):
        guide = Guide(folder)
        before = {"encoder": guide.encoder, "encoder_content": guide.encoder_content}
    elif next((folder / BLOCKS).glob("*.npy"), None) is not None:
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(note.read_text(encoding="utf-8"))
    if before != now:
        other = before["encoder"] if before["encoder"] != encoder else "another encoder of the name"
        raise UserError(
            f"{folder}: holds vectors of {other}, not of {encoder}; remove the folder first"
        )
    write_json(note, now)


def _join_blocks(folder: Path, keys: list[int], files: list[Path]) -> None:
    """All blocks as one file; they are copied one by one, never all held."""
    width = np.load(files[0], mmap_mode="r").shape[1]
    with whole_file(folder / VECTORS) as unfinished:
        joined = np.lib.format.open_memmap(
            unfinished, mode="w+", dtype=np.float16, shape=(len(keys), width)
        )
        for number, file in enumerate(files):
            block = np.load(file, mmap_mode="r")
            joined[number * BLOCK_TEXTS :][: len(block)] = block
        joined.flush()
        del joined
    with whole_file(folder / KEYS) as unfinished, unfinished.open("wb") as out:
        np.save(out, np.array(keys, dtype=np.uint64))
