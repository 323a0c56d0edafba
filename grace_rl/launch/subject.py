"""What the looks before a run are about: recipe, rows, policy without weights, machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from grace_rl.data import scenes
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.reading_config import ReadingConfig
from grace_rl.errors import UserError
from grace_rl.launch.lines import Launch
from grace_rl.rollout.policy import (
    SCENES_UNTRAINED,
    Outline,
    is_language_model,
    outline_policy,
    read_config,
    resolve_model,
)
from grace_rl.rollout.prompts import PromptTemplate

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

LOADING = (
    "attn_implementation", "device_map", "dtype", "max_memory", "offload_buffers",
    "offload_folder", "quantization_config", "revision", "trust_remote_code",
)  # fmt: skip
"""Keywords of loading that say nothing of the model itself, or are looked at elsewhere."""

TOKENIZED = 2000  # texts, the longest first, among which the one with most tokens is looked for


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Attributes:
        gpus: Names.
        memory: Bytes for each process: of the smallest GPU, or its share of the free RAM.
        cores: CPU cores.
        ram: Free bytes of the machine.
    """

    gpus: tuple[str, ...]
    memory: int
    cores: int
    ram: int


def this_machine(processes: int, use_cpu: bool) -> Machine:
    """Look at the machine.

    Args:
        processes: That share its RAM.
        use_cpu: Leave GPUs out.
    """
    ram = min(psutil.virtual_memory().available, _container_limit())
    count = 0 if use_cpu else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    memory = min((int(gpu.total_memory) for gpu in gpus), default=ram // max(1, processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(tuple(gpu.name for gpu in gpus), memory, cores or 1, ram)


def _container_limit() -> int:
    """What is left of a container's memory, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):
            continue
    return 2**62


@dataclass
class Subject:
    """What is looked at. What needs the model's folder is read when it is first asked for.

    Attributes:
        recipe: Loaded for so many processes.
        args: The trainer's config.
        rows: Of its data.
        launch: How the run is to be started; None: without accelerate's file.
        processes: At least 1.
        machine: What there is to run on.
    """

    recipe: Recipe
    args: Any
    rows: list[dict[str, Any]]
    launch: Launch | None
    processes: int
    machine: Machine

    @property
    def place(self) -> str:
        """Folder or hub id of the model; untrained scenes are as large as trained ones."""
        name = str(self.recipe.model["model_name_or_path"])
        return str(scenes.COLD_START) if name == SCENES_UNTRAINED else resolve_model(name, Path())

    @cached_property
    def config(self) -> Any:
        """transformers' config of the model. Raises UserError."""
        return read_config(self.place, **self._revision)

    @property
    def policy(self) -> Outline | None:
        """The policy without its weights; None where InfoNCE trains a sentence encoder.

        Raises:
            UserError: The folder is damaged, or the method needs a language model.
        """
        if isinstance(self._policy, UserError):
            raise self._policy
        return self._policy

    @cached_property
    def _policy(self) -> Outline | UserError | None:
        given = getattr(self.args, "model_init_kwargs", None) or {}
        more = {key: value for key, value in given.items() if key not in LOADING}
        try:
            if self.args.takes_encoders and not is_language_model(self.config):
                return None
            plain = outline_policy(self.place, **self._revision)
        except UserError as error:
            return error
        try:
            return outline_policy(self.place, more, **self._revision) if more else plain
        except UserError as error:
            return UserError([f"model_init_kwargs: {problem}" for problem in error.problems])

    @property
    def _revision(self) -> dict[str, Any]:
        given = self.recipe.model.get("model_revision")
        return {} if given is None else {"revision": given}

    @cached_property
    def prompts(self) -> dict[str, PromptTemplate]:
        """The policy's prompts by role, `""` for every other; none for methods without.

        Raises:
            UserError: See `PromptTemplate`.
        """
        if self.policy is None or not isinstance(self.args, ReadingConfig):
            return {}
        return ReadingConfig.prompt_templates(self.args, self.policy.tokenizer)

    @property
    def reader(self) -> ReaderConfig | None:
        """How the policy's rationales are read."""
        return getattr(self.args, "reader", None)

    @cached_property
    def text_tokens(self) -> int:
        """Tokens of the longest text of the rows, as far as it is read."""
        args = self.args
        most = getattr(args, "max_text_tokens", None) or getattr(args, "max_length", None) or 512
        if self.policy is None:
            return int(most)
        tokenizer = self.policy.tokenizer
        longest = 0
        for text in sorted(set(_texts(self.rows)), key=len, reverse=True)[:TOKENIZED]:
            if longest >= min(most, len(text.encode())):  # a token is at least a byte
                break
            longest = max(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return min(most, longest)


def _texts(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for value in row.values():
            yield from (
                text
                for text in (value if isinstance(value, list) else [value])
                if isinstance(text, str)
            )
