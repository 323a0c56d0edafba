"""The models that a run left, to be asked: what they write of a text, and how they see it."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect.run import Run
from grace_rl.run.checkpoints import is_complete, list_checkpoints

START, MODEL = "start", "model"
KEPT = 3  # models in memory
POOL = 200  # texts among which neighbours are looked for
AT_ONCE = 32  # texts between two reports of progress


@dataclass(frozen=True)
class Seen:
    """Texts as a checkpoint sees them: N rationales (empty ones where it writes none) and (N, H)
    unit vectors."""

    rationales: list[str]
    vectors: np.ndarray


def checkpoints(run: Run) -> dict[str, Path]:
    """Names and folders of a run's models, in the order of training: what it started from, complete
    checkpoints, the finished model."""
    found: dict[str, Path] = {}
    if (start := _start(run)) is not None:
        found[START] = start
    for path in list_checkpoints(run.path / "checkpoints"):
        if is_complete(path) and _is_model(path):
            found[path.name] = path
    if _is_model(run.path / "model"):
        found[MODEL] = run.path / "model"
    return found


class Checkpoint:
    """One of a run's models.

    Args:
        run: The run.
        name: One of `checkpoints(run)`.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """

    def __init__(self, run: Run, name: str) -> None:
        there = checkpoints(run)
        if name not in there:
            raise UserError(f"{run.path}: no checkpoint {name!r}; there are: {', '.join(there)}")
        self.run, self.name, self.folder = run, name, there[name]
        self._seen: dict[str, tuple[str, np.ndarray]] = {}
        self._lock = threading.Lock()
        self.encoder = self._load()

    @property
    def writes(self) -> bool:
        """Whether it writes rationales; soft tokens and plain encoders do not."""
        return bool(getattr(self.encoder, "writes_rationales", False))

    @property
    def reads_rationales_alone(self) -> bool:
        """Whether a vector follows the rationale and nothing else."""
        return self.writes and self.encoder.reader.config.span == "bottleneck"

    def see(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Seen:
        """Greedy rationales and vectors; those seen before are remembered."""
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._seen]
            for start in range(0, len(new), AT_ONCE):
                if progress:
                    progress(start, len(new))
                part = new[start : start + AT_ONCE]
                encoded = self.encoder.encode(part)
                rationales = encoded.rationales if self.writes else [""] * len(part)
                rows = zip(part, rationales, np.asarray(encoded.vectors), strict=True)
                self._seen |= {text: (rationale, vector) for text, rationale, vector in rows}
            found = [self._seen[text] for text in texts]
        return Seen([item[0] for item in found], np.stack([item[1] for item in found]))

    def see_plain(self, texts: Sequence[str]) -> np.ndarray:
        """(N, H) unit vectors of texts without a rationale, each read in the place of one.

        Raises:
            UserError: This model writes no rationales, so there is no difference.
        """
        if not self.writes:
            raise UserError(f"{self.folder}: this model writes no rationales")
        with self._lock:
            return np.asarray(self.encoder.encode(list(texts), "none").vectors)

    def read(self, rationale: str, text: str) -> np.ndarray:
        """(H,) the vector of a rationale that somebody wrote.

        Raises:
            UserError: This model reads no rationales.
        """
        if not self.writes:
            raise UserError(f"{self.folder}: this model reads no rationales")
        with self._lock:
            return np.asarray(self.encoder.encode_rationales([rationale], [text]))[0]

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Texts to find neighbours among: those that the last stored steps read."""
        return text_pool(self.run)

    def _load(self) -> Any:
        from grace_rl.embed.encoder import RationaleEncoder
        from grace_rl.embed.settings import EncoderSettings

        if self.name != START and (self.folder / "modules.json").is_file():
            from grace_rl.embed.loading import load_encoder

            return load_encoder(self.folder)
        settings = None
        if self.name == START:
            saved = [p for n, p in checkpoints(self.run).items() if n != START]
            known = [path for path in saved if (path / "grace.json").is_file()]
            if not known:
                raise UserError(
                    f"{self.run.path}: how the run reads rationales is known from its first "
                    "checkpoint on"
                )
            settings = EncoderSettings.load(known[-1])
        encoder = RationaleEncoder.from_pretrained(self.folder, settings=settings)
        reader = encoder.reader
        if encoder.writes_rationales and reader.config.centre and reader.centre is None:
            encoder.fit_centre(list(text_pool(self.run)["text"]))
        return encoder


class Loaded:
    """The checkpoints in memory, the last `KEPT` that were asked for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str, int], Checkpoint] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, run: Run, name: str) -> Checkpoint:
        """A checkpoint, loaded anew only if its files have changed.

        Raises:
            UserError: There is no such model, or it cannot be loaded.
        """
        with self._lock:
            folder = checkpoints(run).get(name)
            stamp = 0 if folder is None else folder.stat().st_mtime_ns
            key = (str(run.path), name, stamp)
            if key not in self._kept:
                self._kept[key] = Checkpoint(run, name)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]


def text_pool(run: Run, size: int = POOL) -> pd.DataFrame:
    """At most `size` distinct texts with `role` and `example`: of the last stored steps, or of the
    run's data set where no rollouts are kept.

    Raises:
        UserError: There are neither.
    """
    parts: list[pd.DataFrame] = []
    for step in reversed(run.steps()):
        parts.append(run.rollouts(step=step, columns=["text", "role", "example"]))
        if len(pool := pd.concat(parts).drop_duplicates("text")) >= size:
            break
    if not parts:
        from grace_rl.reward.stored import run_rows

        rows = run_rows(run.path) or []
        pool = pd.DataFrame(
            [
                {"text": row[role], "role": role, "example": number}
                for number, row in enumerate(rows[:size])
                for role in ("query", "positive", "text")
                if isinstance(row.get(role), str)
            ]
        )
        if pool.empty:
            raise UserError(f"{run.path}: neither rollouts nor the data set's rows are there")
        pool = pool.drop_duplicates("text")
    return pool.head(size).reset_index(drop=True)


def token_pieces(run: Run, token_ids: Sequence[int]) -> list[str] | None:
    """What each token wrote, by the tokenizer of any of the run's models; None without one."""
    files = [path / "tokenizer.json" for path in reversed(checkpoints(run).values())]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return None
    tokenizer = _tokenizer(file, file.stat().st_mtime_ns)
    pieces, before = [], ""
    for end in range(1, len(token_ids) + 1):
        start = max(0, end - 8)  # neighbours settle spaces and letters of several bytes
        before = tokenizer.decode(list(token_ids[start : end - 1]), skip_special_tokens=False)
        whole = tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=False)
        pieces.append(whole[len(before) :] if whole.startswith(before) else whole)
    return pieces


@lru_cache(maxsize=4)
def _tokenizer(file: Path, changed: int) -> Any:
    """Kept, because a large one takes most of a second to read and each rollout asks for it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _start(run: Run) -> Path | None:
    """The folder of the model that the run started from, if it is on this machine."""
    name = run.recipe().get("model_name_or_path")
    if not isinstance(name, str):
        return None
    if name == "scenes":
        # Not imported: the world brings torch, and a list of checkpoints must be quick.
        return Path(__file__).parents[1] / "data" / "scenes" / "cold_start"
    folder = run.path / "untrained" if name == "scenes/untrained" else Path(name)
    return folder if _is_model(folder) else None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def soft_words(run: Run) -> list[dict[str, Any]]:
    """The lines of a refinement run's soft_tokens.jsonl; none for other runs."""
    path = run.path / "soft_tokens.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
