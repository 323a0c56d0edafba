"""A panel: the same texts, written for greedily before training and at every logged step.

Stored rollouts are of other rows at each step; a panel shows what became of the same ones. Nothing
is learned from it, no random number is drawn for it, and `time/panel` says what it costs.
"""

from __future__ import annotations

import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from grace_rl.data.bundles import Bundles, RoleText
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Written
from grace_rl.rollout.generator import Sampling
from grace_rl.run.directory import RunDirectory
from grace_rl.run.files import whole_file
from grace_rl.run.records import step_file
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
            written = self._written(encoder)
            raw = encoder.reader.read(written)
            # Before the first batch there is no centre: it is that of the panel itself then.
            centre = encoder.reader.centre
            centre = encoder.reader.mean(raw) if centre is None else centre
            vectors = encoder.reader.finish(raw, centre).float().cpu()
        limit = encoder.max_rationale_tokens
        unwritten = self.trainer.rollout_reader.unwritten
        columns = {
            "step": [step] * len(written),
            **{n: [getattr(t, n) for t in self.texts] for n in ("text", "role", "example", "side")},
            "rationale": [
                "" if text.role in unwritten else item.rationale
                for text, item in zip(self.texts, written, strict=True)
            ],
            "truncated": [
                text.role not in unwritten and len(item.token_ids) >= limit
                for text, item in zip(self.texts, written, strict=True)
            ],
            "embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        }
        path = step_file(self.run.path, step, PANEL)
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as unfinished:
            pq.write_table(pa.table(columns), unfinished, compression="zstd")

    def _written(self, encoder: RationaleEncoder) -> list[Written]:
        """What is written greedily, by each role's own prompt; texts of roles that nothing is
        written for are read as in training."""
        how = self.trainer.rollout_reader
        prompts = [how.render(text.text, text.role) for text in self.texts]
        items = [encoder.reader.plain(prompt) for prompt in prompts]
        places = [i for i, text in enumerate(self.texts) if text.role not in how.unwritten]
        greedy = Sampling(encoder.max_rationale_tokens, 0.0)
        found = encoder.writer.generator.generate([prompts[i].token_ids for i in places], greedy)
        ids = [row[0].token_ids for row in found]
        strings = encoder.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for i, row, string in zip(places, ids, strings, strict=True):
            items[i] = Written(prompts[i], row, string)
        return items


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
