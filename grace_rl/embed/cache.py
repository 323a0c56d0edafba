"""What was written for a text and what was read from it, remembered in one sqlite file.

Keys are digests of everything that decides the value: the model's files, the way of writing and the
text; for vectors the reader too. A changed setting therefore misses; nothing ever goes stale.
Several processes may use one file at once.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_rl.errors import UserError
from grace_rl.rollout.policy import base_of
from grace_rl.run.identity import folder_digest

LOOKUP = 500  # keys a query; sqlite allows 999 parameters everywhere
WAIT = 120.0  # seconds for another process's write
MODEL_FILES = (
    "*.safetensors", "*.bin", "config.json", "adapter_config.json", "generation_config.json",
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*",
    "reader/frozen/*",
)  # fmt: skip
ENCODER_FILES = (
    *MODEL_FILES, "grace.json", "gircse.json", "reader/centre.safetensors",
    "modules.json", "*sentence*.json", "[0-9]*_*/*",
)  # fmt: skip

Remembered = tuple[str, list[int]]
"""A rationale and its token ids with the end token."""


class RationaleCache:
    """Rationales and raw vectors by key.

    Args:
        path: The sqlite file; made, with its folder, if missing.

    Raises:
        UserError: The file is none of ours or cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._local = threading.local()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._transaction() as cursor:
                cursor.execute(
                    "CREATE TABLE IF NOT EXISTS rationales"
                    "(key BLOB PRIMARY KEY, rationale TEXT, token_ids BLOB) WITHOUT ROWID"
                )
                cursor.execute(
                    "CREATE TABLE IF NOT EXISTS vectors"
                    "(key BLOB PRIMARY KEY, rationale TEXT, length INTEGER, vector BLOB)"
                )
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{self.path}: cannot be used as a cache: {error}") from error

    def __reduce__(self) -> tuple[type[RationaleCache], tuple[Path]]:
        return RationaleCache, (
            self.path,
        )  # a copy, in another process too, has connections of its own

    def rationales(self, keys: Sequence[bytes]) -> dict[bytes, Remembered]:
        """What is known about these keys."""
        found = self._look_up("SELECT key, rationale, token_ids FROM rationales", keys)
        return {key: (text, np.frombuffer(ids, np.int32).tolist()) for key, text, ids in found}

    def add_rationales(self, found: dict[bytes, Remembered]) -> None:
        rows = [(k, text, np.asarray(ids, np.int32).tobytes()) for k, (text, ids) in found.items()]
        with self._transaction() as cursor:
            cursor.executemany("INSERT OR REPLACE INTO rationales VALUES (?, ?, ?)", rows)

    def vectors(self, keys: Sequence[bytes]) -> dict[bytes, tuple[str, int, Tensor]]:
        """The rationale, its number of tokens and its raw vector (H,), for keys that are known."""
        found = self._look_up("SELECT key, rationale, length, vector FROM vectors", keys)
        return {
            key: (text, length, torch.frombuffer(bytearray(vector), dtype=torch.float32))
            for key, text, length, vector in found
        }

    def add_vectors(
        self,
        keys: Sequence[bytes],
        rationales: Sequence[str],
        lengths: Sequence[int],
        raw: Tensor,
    ) -> None:
        blobs = [vector.tobytes() for vector in raw.float().cpu().numpy()]
        with self._transaction() as cursor:
            cursor.executemany(
                "INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)",
                zip(keys, rationales, lengths, blobs, strict=True),
            )

    def __len__(self) -> int:
        """Number of remembered rationales."""
        return int(self._connection.execute("SELECT count(*) FROM rationales").fetchone()[0])

    def _look_up(self, select: str, keys: Sequence[bytes]) -> Iterator[Any]:
        for start in range(0, len(keys), LOOKUP):
            some = keys[start : start + LOOKUP]
            marks = ",".join("?" * len(some))
            yield from self._connection.execute(f"{select} WHERE key IN ({marks})", some)

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's own connection."""
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
        except BaseException:
            cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")


def model_fingerprint(folder: Path, files: Sequence[str] = MODEL_FILES) -> str:
    """A digest of the files that decide what a model writes and reads: weights, configs, tokenizer.

    The centre is not among them: it is subtracted from what is remembered. With `ENCODER_FILES` it
    is a digest of all that decides a vector, for any kind of encoder. An adapter's base counts too.
    """
    own, base = folder_digest(folder, files), base_of(folder)
    return own if base == folder else own + folder_digest(base, MODEL_FILES)


class KeyMaker:
    """Keys of texts under given settings.

    >>> key = KeyMaker("model", {"rationale": "greedy"})
    >>> key("a text") == KeyMaker("model", {"rationale": "greedy"})("a text")
    True
    >>> key("a text") == KeyMaker("model", {"rationale": "sample"})("a text")
    False
    """

    def __init__(self, fingerprint: str, settings: dict[str, Any]) -> None:
        told = json.dumps([fingerprint, settings], sort_keys=True, default=str)
        self._base = hashlib.blake2b(told.encode() + b"\0", digest_size=16)

    def __call__(self, text: str) -> bytes:
        digest = self._base.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()
