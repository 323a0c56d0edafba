"""A policy in use: texts in, rationales and vectors out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import Unpack

from grace_rl.embed.cache import ENCODER_FILES, KeyMaker, RationaleCache, model_fingerprint
from grace_rl.embed.modules_json import write_modules
from grace_rl.embed.reader import FROZEN_FOLDER, Reader, Written
from grace_rl.embed.settings import EncoderSettings
from grace_rl.embed.writers import (
    Engine,
    RationaleMode,
    TransformersWriter,
    VLLMWriter,
    Writer,
    Writing,
    vllm_is_installed,
)
from grace_rl.errors import UserError, reading
from grace_rl.rollout.policy import load_outlined
from grace_rl.rollout.prompts import Prompt, PromptTemplate

MODULE = "grace_rl.embed.rationale_embedding.RationaleEmbedding"
CHUNK = 1024  # texts that are in memory as prompts at once
VLLM_CHUNK = 8192  # more, so that its batches seldom run dry


@dataclass(frozen=True)
class Encoded:
    """Texts as an encoder sees them, in their order.

    Attributes:
        rationales: N strings; the texts themselves where none are written, empty for encoders that
            never write.
        vectors: (N, H) float32 on the CPU, unit length; zero for a blank text.
        lengths: N numbers of tokens, end tokens included.
    """

    rationales: list[str]
    vectors: Tensor
    lengths: list[int] = dataclasses.field(default_factory=list)


class Changes(TypedDict, total=False):
    """What one call may do differently; see `RationaleEncoder`."""

    max_rationale_tokens: int | None
    temperature: float | None
    seed: int | None
    instruction: str | None


class RationaleEncoder:
    """Writes a rationale for each text and reads it into a vector.

    The attributes `rationale`, `max_rationale_tokens`, `temperature` and `seed` hold for all calls
    and can be set at any time; every call can be given others. Greedy rationales and seeded samples
    do not depend on the batch, apart from ties within rounding.

    Attributes:
        writes_rationales: True; encoders of other methods embed a text as it is.
        rationale: `greedy`, `sample`, or `none`, which has the text read in the rationale's place.
        temperature, seed: Of `sample`.
        cache: Remembers rationales and raw vectors; see `use_cache`.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        template: Renders texts to prompts.
        reader: Turns what was written into vectors.
        end_ids: Token ids that end a rationale.
        max_rationale_tokens: Longest rationale.
        batch_size: Texts per generation batch.
        folder: Where the model was loaded from; vLLM and the cache need it.
    """

    writes_rationales = True

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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.reader = reader
        self.end_ids = list(end_ids)
        self.max_rationale_tokens = max_rationale_tokens
        self.folder = folder
        self.rationale: RationaleMode = "greedy"
        self.temperature = 1.0
        self.seed = 0
        self.cache: RationaleCache | None = None
        self.writer: Writer = self._transformers_writer(batch_size)
        self._fingerprint = ""
        self._templates: dict[str, PromptTemplate] = {}

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
        readers = model
        if own.reader.weights == "frozen" and frozen.is_dir():
            with reading(frozen, "the model"):
                readers = AutoModelForCausalLM.from_pretrained(frozen)
        model.to(device).eval()  # type: ignore[arg-type]  # transformers' wrapper hides the types
        template = PromptTemplate(
            tokenizer, own.instruction, own.max_text_tokens, own.chat_template_kwargs
        )
        end_ids = end_token_ids(model, tokenizer)
        many = 64 if device == "cpu" else 256  # a CPU's caches like it smaller
        reader = Reader(own.reader, tokenizer, end_ids, readers, device, many)
        if settings is None or (
            (folder / "grace.json").exists()
            and EncoderSettings.load(folder).reader == settings.reader
        ):
            reader.load(folder)
        encoder = cls(
            model, tokenizer, template, reader, end_ids, own.max_rationale_tokens, folder=folder
        )
        encoder.rationale = own.rationale
        encoder.use_engine(engine)
        if cache is not None:
            encoder.use_cache(cache)
        return encoder

    def save(self, folder: Path) -> None:
        """Write what `from_pretrained` and sentence-transformers need beside the model."""
        settings = EncoderSettings(
            reader=self.reader.config,
            instruction=self.template.instruction,
            max_text_tokens=self.template.max_text_tokens,
            max_rationale_tokens=self.max_rationale_tokens,
            chat_template_kwargs=self.template.chat_template_kwargs,
            rationale=self.rationale if self.writes_rationales else "none",
        )
        settings.save(folder)
        self.reader.save(folder)
        write_modules(folder, MODULE)

    def use_engine(self, engine: Engine) -> None:
        """Write with another engine from now on.

        Raises:
            UserError: vLLM is not installed, or the model was not loaded from a folder.
        """
        if engine == "auto":
            engine = "vllm" if vllm_is_installed() and torch.cuda.is_available() else "transformers"
        if engine == "vllm":
            longest = len(self.template.render("a").token_ids) + self.template.max_text_tokens
            longest += self.max_rationale_tokens
            folder = self._own_folder("engine vllm")
            self.writer = VLLMWriter(folder, self.end_ids, longest, self.model.dtype)
        elif engine == "transformers":
            self.writer = self._transformers_writer(256)
        else:
            raise UserError(f"engine: must be auto, transformers or vllm, not {engine!r}")

    def use_cache(self, path: str | Path) -> None:
        """Remember rationales and raw vectors in a sqlite file, and take them from there.

        Several processes may share it. The model must not be changed after it was loaded.

        Raises:
            UserError: The model was not loaded from a folder, or the file cannot be used.
        """
        self._fingerprint = model_fingerprint(self._own_folder("a cache"))
        if self.reader.sentence_encoder is not None:
            self._fingerprint += model_fingerprint(Path(self.reader.config.weights), ENCODER_FILES)
        self.cache = RationaleCache(path)

    def _own_folder(self, what: str) -> Path:
        if self.folder is None:
            raise UserError(f"{what} needs a model that was loaded from its folder")
        return self.folder

    def _transformers_writer(self, batch_size: int) -> TransformersWriter:
        pad = self.tokenizer.pad_token_id
        pad = self.end_ids[0] if pad is None else pad
        return TransformersWriter(self.model, pad, self.end_ids, batch_size)

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
        how = self._how(rationale, changes)
        template = self._template(how.instruction)
        prompts = [template.render(text) if text.strip() else _NOTHING for text in texts]
        if how.rationale == "none":
            return [Written(p, p.token_ids[slice(*p.span)], p.text) for p in prompts]
        keys = self._keys(texts, how)
        known = self.cache.rationales(keys) if self.cache is not None else {}
        unknown = [i for i, p in enumerate(prompts) if keys[i] not in known and p.token_ids]
        if unknown:
            ids = self.writer.write([prompts[i].token_ids for i in unknown], how)
            strings = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            new = {keys[i]: (s, list(t)) for i, s, t in zip(unknown, strings, ids, strict=True)}
            known |= new
            if self.cache is not None:
                self.cache.add_rationales(new)
        return [
            Written(p, known[key][1], known[key][0]) if p.token_ids else Written(p, [], "")
            for p, key in zip(prompts, keys, strict=True)
        ]

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
                f"reader.span {config.span} reads a rationale in its text's context: give the texts"
            )
        prompts = [_NOTHING] * len(rationales)
        if texts is not None:
            prompts = [self.template.render(t) if t.strip() else _NOTHING for t in texts]
        ids = self.tokenizer(
            list(rationales), add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        return [
            Written(prompt, [*row, self.end_ids[0]] if row or prompt.token_ids else [], rationale)
            for prompt, row, rationale in zip(prompts, ids, rationales, strict=True)
        ]

    # -- vectors ---------------------------------

    def encode(
        self,
        texts: Sequence[str],
        rationale: RationaleMode | None = None,
        *,
        progress: bool = False,
        **changes: Unpack[Changes],
    ) -> Encoded:
        """Write rationales and read them; the reader's centre is set, or fitted by `fit_centre`.

        Equal texts are written and read once. Memory beside the result is bounded: texts are worked
        on in chunks, ordered by length.

        Args:
            texts: N texts; a blank one gets a vector of zeros.
            rationale, changes: As in `write`.
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
        for chunk in self._chunks(distinct, progress):
            found, counts, raw = self._raw(chunk, rationale, changes)
            unit = self.reader.finish(raw).float().cpu()
            if vectors is None:
                vectors = torch.empty(len(place), unit.size(1))
            rows = [place[text] for text in chunk]
            vectors[rows] = unit
            for row, string, count in zip(rows, found, counts, strict=True):
                rationales[row], lengths[row] = string, count
        if vectors is None:
            return Encoded([], torch.empty(0, 0))
        rows = [place[text] for text in texts]
        return Encoded([rationales[i] for i in rows], vectors[rows], [lengths[i] for i in rows])

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
            vectors.append(self.reader.finish(self.reader.read(written)).float().cpu())
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
            _, _, raw = self._raw(chunk, None, {})
            total = total + raw.double().sum(0).cpu()
            count += len(chunk)
        if not count:
            raise UserError("a centre needs at least one text")
        self.reader.centre = (total / count).float().to(self.reader.device)
        return count

    def _raw(
        self, texts: list[str], rationale: RationaleMode | None, changes: Changes
    ) -> tuple[list[str], list[int], Tensor]:
        """Rationales, their numbers of tokens and raw vectors (N, H), from the cache if it can."""
        keys: list[bytes] = []
        known: dict[bytes, tuple[str, int, Tensor]] = {}
        if self.cache is not None:
            keys = self._keys(texts, self._how(rationale, changes), reads=True)
            known = self.cache.vectors(keys)
        new = [i for i in range(len(texts)) if not known or keys[i] not in known]
        if new:
            written = self.write([texts[i] for i in new], rationale, **changes)
            strings, counts = [w.rationale for w in written], [len(w.token_ids) for w in written]
            raw = self.reader.read(written)
            if self.cache is None:
                return strings, counts, raw
            own = [keys[i] for i in new]
            self.cache.add_vectors(own, strings, counts, raw)
            values = zip(strings, counts, raw.float().cpu(), strict=True)
            known |= dict(zip(own, values, strict=True))
        found = [known[key] for key in keys]
        return [f[0] for f in found], [f[1] for f in found], torch.stack([f[2] for f in found])

    def _chunks(self, texts: Iterable[str], progress: bool) -> Iterator[list[str]]:
        size = VLLM_CHUNK if isinstance(self.writer, VLLMWriter) else CHUNK
        known = len(texts) if isinstance(texts, list) else None
        rest = iter(texts)
        with Progress(
            *Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("texts"),
            console=Console(stderr=True), disable=not progress,
        ) as bar:  # fmt: skip
            task = bar.add_task("encoding", total=known)
            while chunk := list(islice(rest, size)):
                yield chunk
                bar.advance(task, len(chunk))

    # -- settings of one call ---------------------------------

    def _how(self, rationale: RationaleMode | None, changes: Changes) -> Writing:
        given = {name: value for name, value in changes.items() if value is not None}
        own: dict[str, Any] = {
            "rationale": self.rationale if rationale is None else rationale,
            "max_rationale_tokens": self.max_rationale_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        return Writing(**own | given)

    def _template(self, instruction: str | None) -> PromptTemplate:
        if instruction is None or instruction == self.template.instruction:
            return self.template
        if instruction not in self._templates:
            own = self.template
            self._templates[instruction] = PromptTemplate(
                self.tokenizer, instruction, own.max_text_tokens, own.chat_template_kwargs
            )
        return self._templates[instruction]

    def _keys(self, texts: Sequence[str], how: Writing, reads: bool = False) -> list[bytes]:
        template = self._template(how.instruction)
        settings: dict[str, Any] = {
            "rationale": how.rationale,
            "dtype": str(self.model.dtype),
            "instruction": template.instruction,
            "max_text_tokens": template.max_text_tokens,
            "chat_template_kwargs": template.chat_template_kwargs,
        }
        if how.rationale != "none":
            settings["max_rationale_tokens"] = how.max_rationale_tokens
        if how.rationale == "sample":
            settings |= {"temperature": how.temperature, "seed": how.seed}
            settings["engine"] = self.writer.name  # they draw differently
        if reads:
            settings["reader"] = dataclasses.asdict(self.reader.config) | {"centre": None}
        return [*map(KeyMaker(self._fingerprint, settings), texts)]


_NOTHING = Prompt("", "", [], (0, 0))  # of a blank text


def check_list(texts: Sequence[str]) -> None:
    """Raises UserError for a single text where a list is asked for."""
    if isinstance(texts, str):  # its characters would be taken for texts
        raise UserError(f"give a list of texts, not one text: [{texts[:40]!r}]")


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's end token and those the model declares."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    return list(dict.fromkeys([tokenizer.eos_token_id, *declared]))
