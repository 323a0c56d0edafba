"""A policy in use: texts in, rationales and vectors out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from grace_rl.embed.encoder_module import (
    Encoded,
    EncoderModule,
    check_list,
    write_modules,
)
from grace_rl.embed.reader import FROZEN_FOLDER, Reader, Written
from grace_rl.embed.settings import (
    SETTINGS_FILE,
    Changes,
    EncoderRole,
    EncoderSettings,
    RationaleMode,
    Writing,
    pinned_prompts,
)
from grace_rl.embed.writer import RationaleWriter
from grace_rl.errors import UserError, reading
from grace_rl.rollout.generator import Engine, end_token_ids
from grace_rl.rollout.policy import load_outlined
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.run.screen import Screen, bar

CHUNK = 1024  # texts that are in memory as prompts at once
VLLM_CHUNK = 8192  # more, so that its batches seldom run dry


class RationaleEncoder(EncoderModule):
    """Writes a rationale for each text and reads it into a vector.

    The attributes `rationale`, `max_rationale_tokens`, `temperature` and `seed` hold for all calls
    and can be set at any time; every call can be given others, also through
    `SentenceTransformer.encode`. Greedy rationales and seeded samples do not depend on the batch,
    apart from ties within rounding.

    Attributes:
        writes_rationales: True; encoders of other methods embed a text as it is.
        rationale: `greedy`, `sample`, or `none`, which has the text read in the rationale's place.
        temperature, seed: Of `sample`.
        roles: What is different for queries and documents (`EncoderRole`).
        writer: Writes the rationales, with `writer.generator`.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        template: Renders texts to prompts.
        reader: Turns what was written into vectors.
        end_ids: Token ids that end a rationale.
        max_rationale_tokens: Longest rationale.
        roles: What is different for queries and documents.
        batch_size: Texts per generation batch.
        folder: Where the model was loaded from; vLLM and the cache need it.
    """

    writes_rationales = True
    forward_kwargs = {"rationale", "max_rationale_tokens", "temperature", "seed", "task"}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        reader: Reader,
        end_ids: Sequence[int],
        max_rationale_tokens: int,
        batch_size: int = 256,
        folder: Path | None = None,
        roles: Mapping[Any, EncoderRole] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, folder)
        self.reader = reader
        self.roles = dict(roles or {})
        # Registered, so that `to(device)` moves them too.
        beside = [reader.frozen_policy, reader.sentence_encoder]
        self.readers = nn.ModuleList([module for module in beside if module is not None])
        self.end_ids = list(end_ids)
        self.max_rationale_tokens = max_rationale_tokens
        self.rationale: RationaleMode = "greedy"
        self.temperature = 1.0
        self.seed = 0
        self.writer = RationaleWriter(model, tokenizer, template, end_ids, batch_size, folder)
        self.writer.pinned = pinned_prompts(self.roles)

    # -- loading and saving ---------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        *,
        settings: EncoderSettings | None = None,
        engine: Engine = "transformers",
        cache: str | Path | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> RationaleEncoder:
        """Load what training left in `runs/<name>/model`.

        Args:
            folder: The model's folder.
            device: For the policy, and the reader.
            settings: In place of those in `grace.json`; needed for a model without one, for example
                `EncoderSettings()`. With another reader the model's centre is left out: it belongs
                to the reader that it was fitted with.
            engine: `transformers`, `vllm` (starts at the first text to write), or `auto`: vLLM
                where it is installed and there is a GPU.
            cache: A sqlite file, see `use_cache`.
            model_kwargs, tokenizer_kwargs: For transformers, such as `{"dtype": torch.bfloat16}`.

        Raises:
            UserError: The folder is no such model, or the engine is not there.
        """
        folder = Path(folder)
        own = EncoderSettings.load(folder) if settings is None else settings
        model, tokenizer = load_outlined(folder, model_kwargs or {}, tokenizer_kwargs or {})
        frozen = folder / FROZEN_FOLDER
        readers = model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the types
        if own.reader.weights == "frozen" and frozen.is_dir():
            with reading(frozen, "the model"):
                readers = AutoModelForCausalLM.from_pretrained(frozen)
        end_ids = end_token_ids(model.generation_config, tokenizer)
        many = 64 if device == "cpu" else 256  # a CPU's caches like it smaller
        reader = Reader(own.reader, tokenizer, end_ids, readers, device, many)
        if settings is None or (
            (folder / SETTINGS_FILE).exists()
            and EncoderSettings.load(folder).reader == settings.reader
        ):
            reader.load(folder)
        encoder = cls(
            model,
            tokenizer,
            own.template(tokenizer),
            reader,
            end_ids,
            own.max_rationale_tokens,
            folder=folder,
            roles=own.roles,
        )
        encoder.rationale = own.rationale
        encoder.writer.use_engine(engine, encoder.max_rationale_tokens)
        if cache is not None:
            encoder.use_cache(cache)
        return encoder.eval()

    def save_beside(self, folder: Path) -> None:
        """Write what `from_pretrained` and sentence-transformers need besides the model's files."""
        settings = EncoderSettings(
            reader=self.reader.config,
            instruction=self.template.instruction,
            max_text_tokens=self.template.max_text_tokens,
            max_rationale_tokens=self.max_rationale_tokens,
            chat_template_kwargs=self.template.chat_template_kwargs,
            rationale=self.rationale,
            roles=self.roles,
            prompt=self.template.surroundings,
        )
        settings.save(folder)
        self.reader.save(folder)
        write_modules(folder, RationaleEncoder)

    @property
    def template(self) -> PromptTemplate:
        return self.writer.template

    def use_cache(self, path: str | Path) -> None:
        """Remember rationales and raw vectors in a sqlite file, and take them from there.

        Several processes and threads may share it. The model must stay as it was loaded.

        Raises:
            UserError: The model was not loaded from a folder, or the file cannot be used.
        """
        self.writer.use_cache(path, self.reader.config)

    @property
    def max_seq_length(self) -> int:
        """Texts are cut to this many tokens; can be set."""
        return self.template.max_text_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.writer.template = self.template.with_limit(value)

    def settings_told(self) -> dict[str, Any]:
        """What decides its vectors besides the files it was loaded from."""
        centre = self.reader.centre
        return self.writer.deciding(self._how(None, {})) | {
            "reader": self.reader.config.deciding_raw(),
            "centre": None if centre is None else centre.tolist(),
            "weight": self.reader.weight,
            "roles": {name: role.given() for name, role in self.roles.items()},
        }

    def get_embedding_dimension(self) -> int:
        reader = self.reader.sentence_encoder
        if reader is None:
            return super().get_embedding_dimension()
        return int(reader.get_embedding_dimension())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        self.reader.device = torch.device(self.model.device)
        return moved

    # -- writing ---------------------------------

    @torch.no_grad()
    def write(
        self,
        texts: Sequence[str],
        rationale: RationaleMode | None = None,
        **changes: Unpack[Changes],
    ) -> list[Written]:
        """Rationales for texts. With `none` the text stands in the rationale's place.

        A blank text gets no prompt and an empty rationale.

        Args:
            texts: N texts.
            rationale, changes: In place of the encoder's own settings, for this call.
                `instruction` replaces the system message that the policy was trained with.

        Raises:
            UserError: A setting is wrong.
        """
        check_list(texts)
        with self.lock:
            return self.writer.write(texts, self._how(rationale, changes), self.reader.plain)

    def rationales(self, texts: Sequence[str], **settings: Any) -> list[str]:
        """What is written for texts; takes what `write` takes."""
        return [item.rationale for item in self.write(texts, **settings)]

    def written(
        self, rationales: Sequence[str], texts: Sequence[str] | None = None
    ) -> list[Written]:
        """Given rationales as if the policy had written them, an end token included.

        Args:
            rationales: N rationales.
            texts: What they are about; only the bottleneck can do without.

        Raises:
            UserError: The reader needs the texts and they are not given.
        """
        config = self.reader.config
        if texts is None and config.span != "bottleneck":
            raise UserError(
                f"reader.span {config.span} reads a rationale with its text: give the texts"
            )
        with self.lock:
            return self.writer.given(rationales, texts)

    # -- vectors ---------------------------------

    def encode(
        self,
        texts: Sequence[str],
        rationale: RationaleMode | None = None,
        *,
        role: str | None = None,
        progress: bool = False,
        **changes: Unpack[Changes],
    ) -> Encoded:
        """Write rationales and read them; the reader's centre is set, or fitted by `fit_centre`.

        Equal texts are written and read once. Memory beside the result is bounded: texts are worked
        on in chunks, ordered by length.

        Args:
            texts: N texts; a blank one gets a vector of zeros.
            rationale, changes: As in `write`.
            role: `query` or `document`, where `roles` says what is different for them; one that is
                not written for never is.
            progress: Show a bar on stderr.

        Raises:
            UserError: A setting is wrong.
        """
        check_list(texts)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct = sorted(place, key=len)
        rationales = [""] * len(place)
        lengths = [0] * len(place)
        vectors: Tensor | None = None
        if role in self.roles:
            rationale = rationale if self.roles[role].write else "none"
            if changes.get("instruction") is None:
                changes["instruction"] = self.roles[role].instruction
        for chunk in self._chunks(distinct, progress):
            found, counts, raw = self.raw(chunk, rationale, **changes)
            unit = self.reader.finish(raw).float().cpu()
            if vectors is None:
                vectors = torch.empty(len(place), unit.size(1))
            rows = [place[text] for text in chunk]
            vectors[rows] = unit
            for row, string, count in zip(rows, found, counts, strict=True):
                rationales[row], lengths[row] = string, count
        if vectors is None:
            return Encoded([], torch.empty(0, 0))
        back = [place[text] for text in texts]
        return Encoded([rationales[i] for i in back], vectors[back], [lengths[i] for i in back])

    def encode_rationales(
        self, rationales: Sequence[str], texts: Sequence[str] | None = None
    ) -> Tensor:
        """Vectors of given rationales, edited or from elsewhere; nothing is written.

        With the bottleneck reader a vector follows the words of its rationale and nothing else.

        Args:
            rationales: N rationales; an empty one without a text gets a vector of zeros.
            texts: What they are about; only the bottleneck can do without.

        Returns:
            (N, H) float32 unit vectors on the CPU.

        Raises:
            UserError: The reader needs the texts and they are not given.
        """
        check_list(rationales)
        if texts is not None and len(texts) != len(rationales):
            raise UserError(f"{len(rationales)} rationales, but {len(texts)} texts")
        vectors = []
        for start in range(0, len(rationales), VLLM_CHUNK):
            part = slice(start, start + VLLM_CHUNK)
            written = self.written(rationales[part], None if texts is None else texts[part])
            with self.lock:
                raw = self.reader.read(written)
            vectors.append(self.reader.finish(raw).float().cpu())
        return torch.cat(vectors) if vectors else torch.empty(0, 0)

    def fit_centre(self, texts: Iterable[str], *, progress: bool = False) -> int:
        """Set the reader's centre to the mean raw vector of a corpus, in constant memory.

        Blank texts do not count. `reader.save(folder)` keeps it.

        Returns:
            How many texts it is the mean of.

        Raises:
            UserError: The model was trained without a centre, or there is no text.
        """
        if not self.reader.config.centre:
            raise UserError("reader.centre is false: this model's vectors are not centred")
        total, count = torch.zeros(()), 0
        texts = (text for text in texts if text.strip())
        for chunk in self._chunks(texts, progress):
            _, _, raw = self.raw(chunk)
            total = total + raw.double().sum(0).cpu()
            count += len(chunk)
        if not count:
            raise UserError("a centre needs at least one text")
        self.reader.centre = (total / count).float().to(self.reader.device)
        return count

    @torch.no_grad()
    def raw(
        self, texts: list[str], rationale: RationaleMode | None = None, **changes: Unpack[Changes]
    ) -> tuple[list[str], list[int], Tensor]:
        """Rationales, their numbers of tokens and raw vectors (N, R), from the cache if it can.

        Args:
            texts, rationale, changes: As in `write`, all at once in memory.
        """
        with self.lock:
            return self.writer.read(texts, self._how(rationale, changes), self.reader)

    def _chunks(self, texts: Iterable[str], progress: bool) -> Iterator[list[str]]:
        size = VLLM_CHUNK if self.writer.generator.name == "vllm" else CHUNK
        known, rest = len(texts) if isinstance(texts, list) else None, iter(texts)
        hidden, screen = not progress, Screen(stderr=True)
        with bar(screen, "encoding", known, unit="texts", hidden=hidden) as advance:
            while chunk := list(islice(rest, size)):
                yield chunk
                advance(len(chunk))

    def _how(self, rationale: RationaleMode | None, changes: Changes) -> Writing:
        given = {name: value for name, value in changes.items() if value is not None}
        names = ("rationale", "max_rationale_tokens", "temperature", "seed")
        own = {name: getattr(self, name) for name in names}
        if rationale is not None:
            own["rationale"] = rationale
        return Writing(**own | given)
