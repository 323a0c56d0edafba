"""From texts to what is written for them: prompts, the generator, and the cache of rationales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grace_rl.embed.cache import ENCODER_FILES, KeyMaker, RationaleCache, model_fingerprint
from grace_rl.embed.reader import Reader, Written
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.settings import Writing
from grace_rl.errors import UserError
from grace_rl.recipe.prompt import PromptConfig
from grace_rl.rollout.generator import (
    Engine,
    Generator,
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
    vllm_is_installed,
)
from grace_rl.rollout.policy import base_of
from grace_rl.rollout.prompts import Prompt, PromptTemplate

VLLM_SPARE_TOKENS = 1024  # room in the engine for rationales longer than it was built for
VLLM_GPU_SHARE = 0.5  # the reader's copy of the policy is on the same GPU
NOTHING = Prompt("", "", [], (0, 0))  # of a blank text


class RationaleWriter:
    """Writes rationales, and remembers them if it has a cache.

    Attributes:
        generator: Continues prompts; see `use_engine`.
        cache: Where rationales are kept, or None; see `use_cache`.
        pinned: Instruction -> what stood before and after a text when it was trained with.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        template: Renders texts to prompts.
        end_ids: Token ids that end a rationale.
        batch_size: Texts per generation batch of transformers.
        folder: Where the model was loaded from; vLLM and the cache need it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        end_ids: Sequence[int],
        batch_size: int,
        folder: Path | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.end_ids = list(end_ids)
        self.dtype = str(model.dtype).removeprefix("torch.")  # another may write something else
        self.folder = folder
        pad = self.end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._own = TransformersGenerator(model, pad, self.end_ids, batch_size)
        self.generator: Generator = self._own
        self.cache: RationaleCache | None = None
        self.fingerprint = ""
        self.pinned: dict[str | PromptConfig, tuple[str, str]] = {}
        self._told: tuple[PromptTemplate, dict[Any, PromptTemplate]] = (template, {})

    def use_engine(self, engine: Engine, longest: int) -> None:
        """Write with another engine from now on.

        Args:
            engine: `transformers`, `vllm`, or `auto`: vLLM where it is installed, there is a
                GPU, and the model is no adapter.
            longest: Tokens of the longest rationale; somewhat longer ones fit too.

        Raises:
            UserError: vLLM is not installed, or the model was not loaded from a folder or is an
                adapter.
        """
        if engine not in get_args(Engine):
            raise UserError(f"engine: must be auto, transformers or vllm, not {engine!r}")
        adapter = self.folder is not None and base_of(self.folder) != self.folder
        if engine == "auto":
            fast = vllm_is_installed() and torch.cuda.is_available() and not adapter
            engine = "vllm" if fast else "transformers"
        if engine == "transformers":
            self.generator = self._own
            return
        if adapter:
            raise UserError(
                f"{self.folder}: is an adapter, and vLLM loads whole weights; take engine "
                "transformers, or the run's model/, which has it merged in"
            )
        prompt = len(self.template.render("a").token_ids) + self.template.max_text_tokens
        self.generator = VLLMGenerator(
            str(self._own_folder("engine vllm")),
            self.end_ids,
            prompt + longest + VLLM_SPARE_TOKENS,
            self.dtype,
            gpu_memory_utilization=VLLM_GPU_SHARE,
        )

    def use_cache(self, path: str | Path, reader: ReaderConfig) -> None:
        """Remember rationales, and raw vectors of the reader, in a sqlite file.

        Args:
            path: The file.
            reader: What reads; a sentence encoder's files decide its vectors too.

        Raises:
            UserError: The model was not loaded from a folder, or the file cannot be used.
        """
        self.fingerprint = model_fingerprint(self._own_folder("a cache"))
        if not reader.reads_with_language_model:
            self.fingerprint += model_fingerprint(Path(reader.weights), ENCODER_FILES)
        self.cache = RationaleCache(path)

    def _own_folder(self, what: str) -> Path:
        if self.folder is None:
            raise UserError(f"{what} needs a model that was loaded from its folder")
        return self.folder

    def write(
        self, texts: Sequence[str], how: Writing, plain: Callable[[Prompt], Written]
    ) -> list[Written]:
        """Rationales for texts, or with `none` what the reader has in place of one (`plain`).

        A blank text gets no prompt and an empty rationale.
        """
        prompts = self._prompts(texts, self.template_for(how.instruction))
        if how.rationale == "none":
            return [plain(prompt) for prompt in prompts]
        keys = self.keys(texts, how)
        known = self.cache.rationales(keys) if self.cache is not None else {}
        unknown = [i for i, p in enumerate(prompts) if keys[i] not in known and p.token_ids]
        if unknown:
            temperature = how.temperature if how.rationale == "sample" else 0.0
            sampling = Sampling(how.max_rationale_tokens, temperature, seed=how.seed)
            written = self.generator.generate([prompts[i].token_ids for i in unknown], sampling)
            ids = [row[0].token_ids for row in written]
            strings = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            new = {keys[i]: (s, t) for i, s, t in zip(unknown, strings, ids, strict=True)}
            known |= new
            if self.cache is not None:
                self.cache.add_rationales(new)
        return [
            Written(p, known[key][1], known[key][0]) if p.token_ids else Written(p, [], "")
            for p, key in zip(prompts, keys, strict=True)
        ]

    def read(
        self, texts: Sequence[str], how: Writing, reader: Reader
    ) -> tuple[list[str], list[int], Tensor]:
        """Rationales, their numbers of tokens and raw vectors (N, R), from the cache if it can."""
        keys: list[bytes] = []
        known: dict[bytes, tuple[str, int, Tensor]] = {}
        if self.cache is not None:
            keys = self.keys(texts, how, reader.config.deciding_raw())
            known = self.cache.vectors(keys)
        new = [i for i in range(len(texts)) if not known or keys[i] not in known]
        if new:
            written = self.write([texts[i] for i in new], how, reader.plain)
            strings, counts = [w.rationale for w in written], [len(w.token_ids) for w in written]
            raw = reader.read(written)
            if self.cache is None:
                return strings, counts, raw
            own = [keys[i] for i in new]
            self.cache.add_vectors(own, strings, counts, raw)
            values = zip(strings, counts, raw.float().cpu(), strict=True)
            known |= dict(zip(own, values, strict=True))
        found = [known[key] for key in keys]
        return [f[0] for f in found], [f[1] for f in found], torch.stack([f[2] for f in found])

    def given(self, rationales: Sequence[str], texts: Sequence[str] | None) -> list[Written]:
        """Given rationales as if the policy had written them, an end token included.

        Args:
            rationales: N rationales.
            texts: What they are about, or None.
        """
        prompts = [NOTHING] * len(rationales)
        if texts is not None:
            prompts = self._prompts(texts, self.template)
        ids = self.tokenizer(
            list(rationales), add_special_tokens=False, return_attention_mask=False
        )["input_ids"]
        end = self.end_ids[0]
        return [
            Written(prompt, [*row, end] if row or prompt.token_ids else [], rationale)
            for prompt, row, rationale in zip(prompts, ids, rationales, strict=True)
        ]

    def template_for(self, instruction: str | PromptConfig | None) -> PromptTemplate:
        """The template, with another instruction where one is given."""
        own, others = self._told
        if own is not self.template:
            own, others = self._told = (self.template, {})
        if instruction is None or instruction == own.instruction:
            return own
        if instruction not in others:
            pinned = self.pinned.get(instruction)
            others[instruction] = own.with_instruction(instruction, pinned)
        return others[instruction]

    def _prompts(self, texts: Sequence[str], template: PromptTemplate) -> list[Prompt]:
        return [template.render(text) if text.strip() else NOTHING for text in texts]

    # -- keys of the cache ---------------------------------

    def keys(
        self, texts: Sequence[str], how: Writing, reader: dict[str, Any] | None = None
    ) -> list[bytes]:
        """Keys of what is written for texts or, with the settings of a reader, of its vectors."""
        settings = self.deciding(how) | ({} if reader is None else {"reader": reader})
        return [*map(KeyMaker(self.fingerprint, settings), texts)]

    def deciding(self, how: Writing) -> dict[str, Any]:
        """All that decides what is written, besides the model's files and the text."""
        template = self.template_for(how.instruction)
        settings: dict[str, Any] = {
            "rationale": how.rationale,
            "dtype": self.dtype,
            "prompt": [template.prefix, template.suffix],
            "max_text_tokens": template.max_text_tokens,
        }
        if how.rationale != "none":
            settings["max_rationale_tokens"] = how.max_rationale_tokens
        if how.rationale == "sample":
            settings |= {"temperature": how.temperature, "seed": how.seed}
            settings["engine"] = self.generator.name  # they draw differently
        return settings
