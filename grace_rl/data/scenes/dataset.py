"""Rows of the `scenes` world, made from a seed."""

from __future__ import annotations

import random
from typing import Any, Literal

from grace_rl.data.scenes.rationales import reference_rationale
from grace_rl.data.scenes.texts import paraphrase, render, with_facts
from grace_rl.data.scenes.world import (
    SPLIT_SHARES,
    TRANSFER_WORDS,
    VALUES,
    Scene,
    change_facts,
    gold_similarity,
    random_scene,
)
from grace_rl.errors import UserError

Split = Literal["train", "validation", "test", "transfer"]
Form = Literal["triplet", "quad", "pair", "unsupervised", "sft"]
FORMS = ("triplet", "quad", "pair", "unsupervised", "sft")


def rows(
    split: Split = "train",
    form: Form = "triplet",
    count: int = 1000,
    seed: int = 0,
    clean_rows: int = 0,
    facts: tuple[int, int] = (3, 6),
    copied: float = 0.3,
    ordered: float = 0.5,
    filler: float = 0.1,
) -> list[dict[str, Any]]:
    """Rows of one split, the same for the same arguments. A longer list begins with the same rows.

    No scene occurs in two splits, neither as a row's own nor as a negative's. The texts of train,
    validation and test never hold a word of `TRANSFER_WORDS`; a transfer row has them on one side
    only: in the query, or in the positive.

    Args:
        split: `train`, `validation`, `test` or `transfer`.
        form: What a row holds.

            - `triplet`: `query`, `positive` (same facts, other words and sentence) and `negative`,
              a list with one text: the query's own sentence with one fact, sometimes two, changed.
              Whoever compares words prefers it.
            - `quad`: also `negative_positive`, the negative paraphrased. The rest is the triplet's,
              word for word.
            - `pair`: `sentence1`, `sentence2` and `score`, their gold similarity. From none to all
              of the facts differ, every number equally often. For evaluation only.
            - `unsupervised`: `text`.
            - `sft`: `text` in all words, the reserved ones too, and a noisy reference `rationale`:
              what the cold start learns from. The arguments below belong to this form.

            For evaluation, all rows but `sft` also have `scene` (attribute -> value) and the
            canonical `rationale` of it; triplets and quads have `negative_scene`,
            `positive_rationale` and `negative_rationale` as well.
        count: Number of rows.
        seed: Another seed, other rows.
        clean_rows: The first so many references are canonical: dense and regular, soon learnt.
        facts, copied, ordered, filler: The noise of the later references, see
            `reference_rationale`.

    Raises:
        UserError: An unknown split or form, or a number out of range.
    """
    shares = {"copied": copied, "ordered": ordered, "filler": filler}
    _check(split, form, count, clean_rows, facts, shares)
    noise = {"facts": facts, **shares}
    made = []
    for index in range(count):
        # A generator of its own for each row (seeding with a string does not depend on Python's
        # hash) keeps rows where they are when the count or the form changes.
        rng = random.Random(f"scenes {split} {seed} {index}")
        made.append(_row(split, form, rng, {} if index < clean_rows else noise))
    return made


def _row(split: Split, form: Form, rng: random.Random, noise: dict[str, Any]) -> dict[str, Any]:
    if form == "sft":
        return _cold_start_row(split, rng, noise)
    if form == "pair":
        return _graded_pair(split, rng)
    if form != "unsupervised":
        return _supervised_row(split, form, rng)
    scene = random_scene(split, rng)
    text = render(scene, rng, transfer=split == "transfer").text
    return {"text": text, "scene": scene, "rationale": reference_rationale(scene)}


def _cold_start_row(split: Split, rng: random.Random, noise: dict[str, Any]) -> dict[str, Any]:
    """A text and its reference; canonical without noise."""
    scene = random_scene(split, rng)
    text = render(scene, rng, transfer=None).text
    if noise:
        rationale = reference_rationale(scene, form="noisy", rng=rng, text=text, **noise)
    else:
        rationale = reference_rationale(scene)
    return {"text": text, "rationale": rationale}


def _graded_pair(split: Split, rng: random.Random) -> dict[str, Any]:
    scene, other = None, None
    while other is None:
        scene = random_scene(split, rng)
        other = change_facts(scene, rng.randint(0, len(VALUES)), rng)
    if scene is None:
        raise RuntimeError("scene must be there")
    marked = rng.choice((1, 2)) if split == "transfer" else None
    first = render(scene, rng, transfer=marked == 1)
    second = with_facts(
        paraphrase(first, rng, transfer=marked == 2), other, rng, transfer=marked == 2
    )
    return {
        "sentence1": first.text,
        "sentence2": second.text,
        "score": gold_similarity(scene, other),
        "scene": scene,
        "other_scene": other,
    }


def _supervised_row(split: Split, form: Form, rng: random.Random) -> dict[str, Any]:
    scene, changed = _scene_and_changed(split, rng)
    # The side whose texts use reserved words; none outside the transfer split.
    marked = rng.choice(("query", "positive")) if split == "transfer" else None
    query = render(scene, rng, transfer=marked == "query")
    positive = paraphrase(query, rng, transfer=marked == "positive")
    negative = with_facts(query, changed, rng, transfer=marked == "query")
    row: dict[str, Any] = {
        "query": query.text,
        "positive": positive.text,
        "negative": [negative.text],
    }
    if form == "quad":
        row["negative_positive"] = paraphrase(negative, rng, transfer=False).text
    own = reference_rationale(scene)
    hidden = {
        "scene": scene,
        "negative_scene": changed,
        "rationale": own,
        "positive_rationale": own,
        "negative_rationale": reference_rationale(changed),
    }
    return row | hidden


def _scene_and_changed(split: Split, rng: random.Random) -> tuple[Scene, Scene]:
    while True:
        scene = random_scene(split, rng)
        changed = change_facts(scene, 2 if rng.random() < 0.2 else 1, rng)
        if changed is None or (split == "transfer" and not _reserved_words(scene)):
            continue
        return scene, changed


def _reserved_words(scene: Scene) -> set[str]:
    return {
        word for attribute, value in scene.items() for word in VALUES[attribute][value]
    } & TRANSFER_WORDS


def _check(
    split: str,
    form: str,
    count: int,
    clean_rows: int,
    facts: tuple[int, int],
    shares: dict[str, float],
) -> None:
    problems = []
    if split not in SPLIT_SHARES:
        problems.append(f"scenes has no split {split!r}; it has {', '.join(SPLIT_SHARES)}")
    if form not in FORMS:
        problems.append(f"scenes has no form {form!r}; it has {', '.join(FORMS)}")
    if count < 1:
        problems.append(f"scenes: count must be at least 1, not {count}")
    if clean_rows < 0:
        problems.append(f"scenes: clean_rows must be at least 0, not {clean_rows}")
    if len(facts) != 2 or not 1 <= facts[0] <= facts[1] <= len(VALUES):
        problems.append(
            "scenes: facts must be two numbers, fewest and most, "
            f"from 1 to {len(VALUES)}, not {facts}"
        )
    problems += [
        f"scenes: {key} must be in [0, 1], not {share}"
        for key, share in shares.items()
        if not 0 <= share <= 1
    ]
    if problems:
        raise UserError(problems)
