"""The false-negative mask: which texts of other rows must not count as negatives, by a guide.

A batch holds texts that mean the same although they belong to different rows. A frozen sentence
encoder, the guide, says which (MultiCSR, arXiv 2310.10962, stage 3). The mask is a function of the
texts alone: it is the same for all rollouts of a text, whatever the policy, the temperature and
the number of processes, and a policy cannot move a negative out of the way.

What differs from the released code of MultiCSR: a masked candidate leaves the softmax (there its
logit became 0, which still counts), cosines are compared before any temperature, and the guide's
dropout is off.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from grace_rl.data.guide import Guide, build_guide, is_guide, named_digest
from grace_rl.errors import UserError
from grace_rl.recipe.schema import Section

Mode = Literal["absolute", "margin", "ratio", "soft"]
WATCHED_BATCHES = 10  # the share of masked candidates is judged once it has seen so many
MOST_MASKED = 0.1  # healthy is 0.1% to 3%


class FalseNegativeConfig(Section):
    """The recipe's `false_negatives`.

    With c the guide's cosine of a text and a candidate of another meaning, and p its cosine of the
    text and its own counterpart:

    Args:
        guide: A sentence encoder (see `grace_rl.data.guide.load_encoder`), which embeds the rows
            when training begins; or the folder of a guide that `grace-rl curate` wrote.
        mode: When a candidate is masked. `absolute`: c > sigma. `margin`: c > p - margin
            (GISTEmbed, arXiv 2402.16829, with margin 0; a negative margin is laxer: Qwen3-Embedding
            has -0.1). `ratio`: c > p * (1 - margin). `soft`: nothing is masked, but a candidate
            counts exp(-(c - sigma)^2 / (2 width^2)) where c > sigma (after GCSE, arXiv 2409.12887).
        sigma: Cosine in (-1, 1], for `absolute` and `soft`; None takes what the guide was
            calibrated to. It is the encoder's own: 0.95 in MultiCSR, 0.85 to 0.9 in DCLR.
        margin: For `margin` and `ratio`.
        width: For `soft`, above 0.
        own_negatives: Whether a row's own hard negatives can be masked too (MultiCSR's can). False
            trusts the labels, which suits negatives that share nearly every word.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "false_negatives"

    guide: str = Field(min_length=1)
    mode: Mode = "absolute"
    sigma: float | None = Field(None, gt=-1, le=1)
    margin: float | None = None
    width: float | None = Field(None, gt=0)
    own_negatives: bool = True

    @model_validator(mode="after")
    def _rules(self) -> Self:
        uses = {"sigma": ("absolute", "soft"), "margin": ("margin", "ratio"), "width": ("soft",)}
        problems = [
            f"{key}: belongs to mode {' and '.join(modes)}, not {self.mode}"
            for key, modes in uses.items()
            if getattr(self, key) is not None and self.mode not in modes
        ]
        if problems:
            raise UserError(problems)
        return self


class FalseNegatives:
    """How much each candidate counts as a negative of each text, by a guide.

    Args:
        config: See `FalseNegativeConfig`.
        guide: Vectors of every text that will be asked for.

    Raises:
        UserError: Sigma is neither given nor calibrated.
    """

    def __init__(self, config: FalseNegativeConfig, guide: Guide) -> None:
        self.config, self.guide = config, guide
        sigma = guide.sigma if config.sigma is None else config.sigma
        if config.mode in ("absolute", "soft") and sigma is None:
            raise UserError(
                "false_negatives.sigma: is missing: the rows have no positives to calibrate it with"
            )
        self.sigma = 1.0 if sigma is None else sigma
        self.margin = config.margin or 0.0
        self.width = 0.05 if config.width is None else config.width
        self._shares: list[float] = []

    def weights(
        self,
        texts: Sequence[str],
        candidates: Sequence[str],
        counterparts: Sequence[str | None] | None = None,
    ) -> Tensor:
        """(N, M) in [0, 1]: 1 counts fully as a negative, 0 not at all.

        Args:
            texts: N texts.
            candidates: M texts. A text's own positive among them is the caller's to keep.
            counterparts: For each text one that means the same, for the modes `margin` and `ratio`;
                None is the text itself.
        """
        known = list(dict.fromkeys([*texts, *candidates, *(c for c in counterparts or () if c)]))
        place = {text: row for row, text in enumerate(known)}
        vectors = self.guide.vectors(known)
        mine = vectors[[place[text] for text in texts]]
        others = vectors[[place[text] for text in candidates]]
        counterparts = counterparts or [None] * len(texts)
        own = vectors[[place[c or t] for t, c in zip(texts, counterparts, strict=True)]]
        return self.of_cosines(mine @ others.T, (mine * own).sum(1, keepdim=True))

    def of_cosines(self, cosine: Tensor, own: Tensor) -> Tensor:
        """(N, M) weights of the guide's cosines (N, M), and those with the counterparts (N, 1)."""
        if self.config.mode == "soft":
            above = (cosine - self.sigma).clamp(min=0)
            return torch.exp(-(above**2) / (2 * self.width**2))
        if self.config.mode == "absolute":
            return (cosine <= self.sigma).float()
        highest = own - self.margin if self.config.mode == "margin" else own * (1 - self.margin)
        return (cosine <= highest).float()

    def trust_labels(self, weights: Tensor, same_meaning: Tensor, same_row: Tensor) -> Tensor:
        """The guide's weights, but 1 where the labels decide.

        Args:
            weights: (N, M) of texts and candidates.
            same_meaning: (N, M) bool, the candidate is the text itself or means the same by its
                label: a guide has no say in positives.
            same_row: (N, M) bool, both are of one row, whose labels `own_negatives: false` trusts.
        """
        labelled = same_meaning if self.config.own_negatives else same_meaning | same_row
        return weights.masked_fill(labelled, 1.0)

    def watch(self, share: float) -> str | None:
        """Take note of a batch's share of masked candidates; after ten, say what is wrong."""
        self._shares.append(share)
        if len(self._shares) != WATCHED_BATCHES or self.config.mode == "soft":
            return None
        mean = sum(self._shares) / WATCHED_BATCHES
        where = f"false_negatives ({self.config.mode}, guide {self.guide.encoder})"
        if mean == 0:
            return (
                f"{where} masked nothing in {WATCHED_BATCHES} batches; is its threshold too high?"
            )
        if mean > MOST_MASKED:
            return f"{where} masks {mean:.0%} of all negatives; is its threshold too low?"
        return None


def load_false_negatives(
    config: FalseNegativeConfig | None,
    rows: Sequence[dict[str, Any]],
    run_folder: Path | None,
) -> FalseNegatives | None:
    """The mask for these rows; their texts are embedded once, by the first process.

    Args:
        config: None masks nothing.
        rows: All rows that will be trained on or evaluated.
        run_folder: The guide goes to `run_folder/guide`; None keeps it until Python ends.

    Raises:
        UserError: The guide cannot be loaded, or its folder does not know the rows' texts.
    """
    if config is None:
        return None
    try:
        guide = _guide(config.guide, rows, run_folder)
    except UserError as error:
        raise UserError([f"false_negatives.guide: {one}" for one in error.problems]) from error
    return FalseNegatives(config, guide)


def _guide(name: str, rows: Sequence[dict[str, Any]], run_folder: Path | None) -> Guide:
    if is_guide(Path(name)):
        guide = Guide(name)
        guide.check_knows(rows)
        return guide
    if run_folder is None:
        scratch = tempfile.TemporaryDirectory(prefix="grace-rl-guide-")
        guide = build_guide(Path(scratch.name), lambda: rows, name)
        guide.scratch = scratch
        return guide
    from accelerate import PartialState

    with PartialState().main_process_first():
        return _built(run_folder / "guide", rows, name)


def _built(folder: Path, rows: Sequence[dict[str, Any]], encoder: str) -> Guide:
    """The guide that an earlier attempt or another process made, or a new one."""
    if is_guide(folder):
        guide = Guide(folder)
        with contextlib.suppress(UserError):
            guide.check_knows(rows)
            if (guide.encoder, guide.encoder_content) == (encoder, named_digest(encoder)):
                return guide
    return build_guide(folder, lambda: rows, encoder)
