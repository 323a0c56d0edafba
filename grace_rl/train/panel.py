"""A panel: the same texts, written for greedily before training and at every logged step.

Stored rollouts are of other rows at each step; a panel shows what became of the same ones. Nothing
is learned from it, no random number is drawn for it, and `time/panel` says what it costs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from grace_rl.data.bundles import Bundles, RoleText
from grace_rl.run.directory import RunDirectory
from grace_rl.run.files import whole_file
from grace_rl.run.zero import whole_policy

PANEL = "panel"


class PanelWriter(TrainerCallback):
    """Writes `panel/step-<n>.parquet`: `step text role example side rationale truncated embedding`.

    Args:
        trainer: With an `encoder`.
        run: The run directory.
        texts: What is written for.
    """

    def __init__(self, trainer: Any, run: RunDirectory, texts: list[RoleText]) -> None:
        self.trainer = trainer
        self.run = run
        self.texts = texts
        self._last = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._write(0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        if logs is None or "train_runtime" in logs or step in (0, self._last):
            return
        began = time.perf_counter()
        self._write(step)
        logs["time/panel"] = time.perf_counter() - began

    def _write(self, step: int) -> None:
        self._last = step
        with whole_policy(self.trainer):
            self.run.on_main(lambda: self._write_here(step))

    def _write_here(self, step: int) -> None:
        encoder = self.trainer.encoder()
        with torch.no_grad():
            written = encoder.write([text.text for text in self.texts], "greedy")
            raw = encoder.reader.read(written)
            # Before the first batch there is no centre: it is that of the panel itself then.
            centre = encoder.reader.centre
            centre = encoder.reader.mean(raw) if centre is None else centre
            vectors = encoder.reader.finish(raw, centre).float().cpu()
        limit = encoder.max_rationale_tokens
        columns = {
            "step": [step] * len(written),
            **{n: [getattr(t, n) for t in self.texts] for n in ("text", "role", "example", "side")},
            "rationale": [item.rationale for item in written],
            "truncated": [len(item.token_ids) >= limit for item in written],
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        }
        path = Path(self.run.path) / PANEL / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as unfinished:
            pq.write_table(pa.table(columns), unfinished, compression="zstd")


def panel_of(trainer: Any, run: RunDirectory) -> PanelWriter | None:
    """The panel of a trainer that rolls out, if its recipe asks for one."""
    bundles = getattr(trainer, "bundles", {}).get("train")
    most = min(
        getattr(trainer.args, "panel_texts", 0),
        getattr(trainer.args, "generation_batch_size", None) or 0,
    )
    texts = [] if bundles is None else panel_texts(bundles, most)
    return PanelWriter(trainer, run, texts) if texts else None


def panel_texts(bundles: Bundles, most: int) -> list[RoleText]:
    """All texts of the first rows, as many whole rows as `most` texts are."""
    chosen: list[RoleText] = []
    for example in range(len(bundles.rows)):
        row = [*bundles.prompts_of(example), *(text for text, _ in bundles.anchors[example])]
        if len(chosen) + len(row) > most:
            break
        chosen += row
    return chosen
