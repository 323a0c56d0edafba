"""The models that a run left, to be asked: what they write of a text, and how they see it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grace_rl.data import scenes
from grace_rl.data.files import file_records
from grace_rl.errors import UserError, reading
from grace_rl.inspect.run import Run
from grace_rl.inspect.safety import check_model
from grace_rl.recipe.rows import ROW_SUFFIXES
from grace_rl.run.checkpoints import is_complete, list_checkpoints

START, MODEL = "start", "model"
KEPT = 3  # models in memory
POOL = 200  # texts among which neighbours are looked for
AT_ONCE = 32  # texts between two reports of progress


@dataclass(frozen=True)
class Seen:
    """A text as a checkpoint sees it.

    Attributes:
        rationale: What it writes greedily; empty where it writes nothing.
        ended: False where it came to the longest rationale that is allowed.
        vector: (H,) unit vector.
    """

    rationale: str
    ended: bool
    vector: np.ndarray


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


def checkpoint_after(run: Run, step: int) -> str:
    """The run's first checkpoint at or after a step, else its last.

    Raises:
        UserError: It has none yet.
    """
    names = [name for name in checkpoints(run) if name != START]
    if not names:
        raise UserError("The run has no checkpoint yet to read the text with.")
    later = [n for n in names if n.startswith("checkpoint-") and int(n.split("-")[1]) >= step]
    return later[0] if later else names[-1]


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
        self._seen: dict[str, Seen] = {}
        check_model(self.folder)
        self.encoder = self._load()

    @property
    def writes(self) -> bool:
        """Whether it writes rationales; soft tokens and plain encoders do not."""
        return bool(getattr(self.encoder, "writes_rationales", False))

    @property
    def reads_rationales_alone(self) -> bool:
        """Whether a vector follows the rationale and nothing else."""
        return self.writes and self.encoder.reader.config.span == "bottleneck"

    def see(self, texts: Sequence[str]) -> list[Seen]:
        """Greedy rationales and vectors; those seen before are remembered."""
        new = [text for text in dict.fromkeys(texts) if text not in self._seen]
        if new:
            encoded = self.encoder.encode(new)
            longest = getattr(self.encoder, "max_rationale_tokens", 0)
            for i, text in enumerate(new):
                rationale = encoded.rationales[i] if self.writes else ""
                ended = not (self.writes and encoded.lengths[i] >= longest)
                self._seen[text] = Seen(rationale, ended, np.asarray(encoded.vectors[i]))
        return [self._seen[text] for text in texts]

    def see_many(self, texts: Sequence[str]) -> Iterator[int]:
        """`see` in parts: how many have been seen, after each part."""
        for start in range(0, len(texts), AT_ONCE):
            yield start
            self.see(texts[start : start + AT_ONCE])

    def see_plain(self, texts: Sequence[str]) -> np.ndarray:
        """(N, H) unit vectors of texts without a rationale, each read in the place of one.

        Raises:
            UserError: This model writes no rationales, so there is no difference.
        """
        if not self.writes:
            raise UserError(f"{self.folder}: this model writes no rationales")
        return np.asarray(self.encoder.encode(list(texts), "none").vectors)

    def read(self, rationales: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """(N, H) the vectors of rationales that somebody wrote of these texts.

        Raises:
            UserError: This model reads no rationales.
        """
        if not self.writes:
            raise UserError(f"{self.folder}: this model reads no rationales")
        return np.asarray(self.encoder.encode_rationales(list(rationales), list(texts)))

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Texts to find neighbours among: those that the last stored steps read."""
        return text_pool(self.run)

    def _load(self) -> Any:
        from grace_rl.embed.encoder import RationaleEncoder
        from grace_rl.embed.loading import load_encoder
        from grace_rl.embed.settings import EncoderSettings

        check_model(self.folder)
        with reading(self.folder, "the model"):
            if self.name != START and (self.folder / "modules.json").is_file():
                return load_encoder(self.folder)
            settings = None
            if self.name == START:
                saved = [path for name, path in checkpoints(self.run).items() if name != START]
                saved = [path for path in saved if (path / "grace.json").is_file()]
                if not saved:
                    raise UserError(
                        f"{self.run.path}: how the run reads rationales is known from its first "
                        "checkpoint on"
                    )
                settings = EncoderSettings.load(saved[-1])
            encoder = RationaleEncoder.from_pretrained(
                self.folder,
                settings=settings,
                model_kwargs={"trust_remote_code": False, "use_safetensors": True},
                tokenizer_kwargs={"trust_remote_code": False},
            )
            reader = encoder.reader
            if reader.config.centre and reader.centre is None:
                encoder.fit_centre(list(text_pool(self.run)["text"]))
            return encoder


_LOADING = threading.Lock()


def loaded(run: Run, name: str) -> Checkpoint:
    """A checkpoint; the last `KEPT` stay in memory until their files change.

    Raises:
        UserError: There is no such model, or it cannot be loaded.
    """
    folder = checkpoints(run).get(name)
    with _LOADING:
        return _loaded(run, name, 0 if folder is None else folder.stat().st_mtime_ns)


@lru_cache(maxsize=KEPT)
def _loaded(run: Run, name: str, changed: int) -> Checkpoint:
    return Checkpoint(run, name)


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
        pool = pd.DataFrame(list(itertools.islice(_rows_of_data(run), size)))
        if pool.empty:
            raise UserError(f"{run.path}: neither rollouts nor the data set's rows are there")
        pool = pool.drop_duplicates("text")
    return pool.head(size).reset_index(drop=True)


def _rows_of_data(run: Run) -> Iterator[dict[str, Any]]:
    """Texts of the run's data set, where that is the built-in world or a file of rows."""
    recipe = run.recipe()
    name, renamed = recipe.get("dataset_name"), recipe.get("dataset_columns") or {}
    rows: Any = []
    if name == "scenes":
        rows = scenes.rows(count=POOL)
    elif isinstance(name, str) and name.endswith(ROW_SUFFIXES) and Path(name).is_file():
        rows = (record for _, record in file_records(Path(name)) if isinstance(record, dict))
    for example, row in enumerate(rows):
        for role in ("query", "positive", "text"):
            text = row.get(renamed.get(role, role) if isinstance(renamed, dict) else role)
            if isinstance(text, str):
                yield {"text": text, "role": role, "example": example}


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
        return Path(scenes.__file__).parent / "cold_start"
    folder = run.path / "untrained" if name == "scenes/untrained" else Path(name)
    return folder if _is_model(folder) else None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
