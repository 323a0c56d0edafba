"""What a trainer starts from: the policy that the recipe names, and where the run lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from grace_rl.rollout.policy import load_policy, resolve_model
from grace_rl.run.screen import Screen


@dataclass(frozen=True)
class Start:
    """The state of a run when its trainer is built.

    Attributes:
        model_config: The recipe's keys about the model.
        args: The trainer's config.
        run_folder: The run directory.
        console: Where the run prints.
    """

    model_config: ModelConfig
    args: Any
    run_folder: Path
    console: Screen

    @property
    def peft_config(self) -> Any:
        """PEFT's config of the adapter to train, or None."""
        return get_peft_config(self.model_config)

    def model_path(self) -> str:
        """Folder or hub id of the model."""
        name = str(self.model_config.model_name_or_path)
        with PartialState().main_process_first():  # it may write the model
            return resolve_model(name, self.run_folder, self.args.seed)

    def load_policy(self) -> Any:
        """Model and tokenizer, with what the recipe says about loading them.

        Raises:
            UserError: There is no such model.
        """
        keywords = {
            "revision": self.model_config.model_revision,
            "attn_implementation": self.model_config.attn_implementation,
            "dtype": self.model_config.dtype,
            "quantization_config": get_quantization_config(self.model_config),
        }
        if self.args.world_size > 1:
            keywords["device_map"] = None
        if given := getattr(self.args, "model_init_kwargs", None):
            keywords |= given
            self.args.model_init_kwargs = None  # used; TRL would warn that it ignores them
        return load_policy(self.model_path(), **keywords)

    def trainer(self, kind: Callable[..., Any], rows: Any, **more: Any) -> Any:
        """A method's trainer on the loaded policy."""
        model, tokenizer = self.load_policy()
        more |= {"processing_class": tokenizer, "peft_config": self.peft_config}
        return kind(model, self.args, rows, **more)


Build = Callable[[Start], Any]
"""Makes the trainer, when everything that can be wrong with the user's input has been looked at."""
