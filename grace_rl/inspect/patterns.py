"""What policies do instead of writing about the text: each pattern as a column.

A pattern is judged by words alone, from a rollout, its siblings and the texts of its step; nothing
here knows what is true. `PATTERNS` are the names that a filter takes. `pattern_tables` finds them,
with words as numbers in NumPy (the same in SQL on texts took three times as long); the questions
below are asked about its tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

PATTERNS = {
    "empty": "nothing is written",
    "endless": "never ended",
    "repetition": "a word twice in a row, or every word twice",
    "copy": "half of its word sequences (of four) stand in the text",
    "same": "word for word what was written of a third of the step's texts",
    "unsupported": "a word of other texts that neither its own text nor most siblings have",
}

WORD = r"[\p{L}\p{N}]+"
_WORD = re.compile(r"[^\W_]+")  # the same in Python
GRAM = 4  # words of a sequence
LOW = (1 << 32) - 1  # a pair of numbers is one of 64 bits

_TEXTS = ["text", "rationale"]

ROLLOUTS = """
SELECT step, "group", row, example, role LIKE 'negative%' AS negative, advantage, tokens, truncated,
  text, rationale FROM rollouts WHERE step BETWEEN ? AND ? ORDER BY step, "group", row
"""
"""What `pattern_tables` is made of: the rollouts of some steps."""

PARTS = """
SELECT min(step), max(step) FROM (
  SELECT step, sum(count(*)) OVER (ORDER BY step) // ? AS part FROM rollouts GROUP BY step)
GROUP BY part ORDER BY part
"""
"""First and last steps that have about so many rollouts together."""


@dataclass(frozen=True)
class Lists:
    """Whole numbers in lists, one list after the other.

    Attributes:
        values: (N,) the numbers.
        counts: (L,) how many each list has.
    """

    values: np.ndarray
    counts: np.ndarray

    @property
    def of(self) -> np.ndarray:
        """(N,) the list of each number."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def take(self, lists: np.ndarray) -> Lists:
        """These lists in this order; one may come twice."""
        counts = self.counts[lists]
        starts = (self.counts.cumsum() - self.counts)[lists] - (counts.cumsum() - counts)
        return Lists(self.values[np.arange(counts.sum()) + np.repeat(starts, counts)], counts)

    def distinct(self) -> Lists:
        """Each number of a list once, in rising order."""
        keys = _distinct(_pairs(self.of, self.values))
        return Lists(keys & LOW, np.bincount(keys >> 32, minlength=len(self.counts)))

    def doubled(self) -> Lists:
        """The numbers that a list has twice in a row, each once."""
        of = self.of
        same = (of[:-1] == of[1:]) & (self.values[:-1] == self.values[1:])
        counts = np.bincount(of[:-1][same], minlength=len(self.counts))
        return Lists(self.values[:-1][same], counts).distinct()

    def sequences(self, length: int) -> Lists:
        """A number for each sequence of so many numbers of a list, equal ones alike."""
        numbers = self.values
        for more in range(1, length):
            numbers = pd.factorize(_pairs(numbers[:-1], self.values[more:]))[0]
        first = self.of[: len(numbers)]
        inside = first == self.of[length - 1 :]  # one list's, from its first number to its last
        counts = np.bincount(first[inside], minlength=len(self.counts))
        return Lists(numbers[inside], counts)


def words_of(texts: pa.Array) -> tuple[Lists, list[str]]:
    """The words of texts as numbers, in lower case, and the word of each number.

    >>> lists, names = words_of(pa.array(["A fox, a well-kept fox", "", "fox"]))
    >>> lists.values.tolist(), lists.counts.tolist(), names
    ([0, 1, 0, 2, 3, 1, 1], [6, 0, 1], ['a', 'fox', 'well', 'kept'])
    """
    pieces = pc.utf8_split_whitespace(pc.utf8_lower(texts))
    coded = pieces.flatten().dictionary_encode()  # few are different: each is looked at once
    numbers: dict[str, int] = {}
    found = [
        [numbers.setdefault(word, len(numbers)) for word in _WORD.findall(piece)]
        for piece in coded.dictionary.to_pylist()
    ]
    words = Lists(
        np.array([number for of in found for number in of], dtype=np.int64),
        np.array([len(of) for of in found], dtype=np.int64),
    ).take(coded.indices.to_numpy())
    text = np.repeat(np.arange(len(texts)), pc.list_value_length(pieces).to_numpy())
    counts = np.bincount(text[words.of], minlength=len(texts))
    return Lists(words.values, counts), list(numbers)


def pattern_tables(rollouts: pa.Table, known: set[str]) -> dict[str, pd.DataFrame]:
    """What some steps' rollouts show.

    Args:
        rollouts: The answer to `ROLLOUTS`, anchors among them.
        known: The words of all texts of the run.

    Returns:
        `patterns`: for each rollout that is trained `step group row advantage tokens best`, each of
        `PATTERNS`, and `odd`, the share of its words that are unsupported. `group_words`: for each
        word of a group `step group word`, how many rollouts have it (`n`) and the sum of their
        advantages (`earned`), `size` and `total` of the group, whether the word is `known` and
        `in_text`. `doubled`: for each word that a rollout has twice in a row `step best pair`.
    """
    texts, said = (rollouts[name].combine_chunks().dictionary_encode() for name in _TEXTS)
    lists, names = words_of(pa.concat_arrays([texts.dictionary, said.dictionary]))
    table = rollouts.drop_columns(_TEXTS).to_pandas()
    table["text"] = texts.indices.to_numpy()  # the list of its words
    table["said"] = said.indices.to_numpy() + len(texts.dictionary)
    table["about"] = table.groupby(["step", "example", "negative"]).ngroup()  # who means the same
    trained = table[rollouts["advantage"].is_valid().to_numpy()].reset_index(drop=True)
    trained["at"] = trained.groupby(["step", "group"]).ngroup()
    ranked = trained.sort_values(["at", "advantage", "row"], ascending=[True, False, True])
    trained["best"] = ~ranked["at"].duplicated()  # by index: the first of each group

    known_names = np.array([name in known for name in names], dtype=bool)
    words, odd = _group_words(table, trained, lists, known_names)
    distinct = lists.distinct().counts[trained["said"]]
    doubled = lists.doubled()
    count = lists.counts[trained["said"]]
    twice = (count >= 6) & (2 * distinct <= count)
    patterns = trained[["step", "group", "row", "advantage", "tokens", "best"]].assign(
        empty=count == 0,
        endless=trained["truncated"],
        repetition=twice | (doubled.counts[trained["said"]] > 0),
        copy=_copied(lists.sequences(GRAM), trained["said"], trained["text"]),
        same=_same(lists, trained),
        unsupported=odd > 0,
        odd=odd / np.maximum(distinct, 1),
    )
    shown = doubled.take(trained["said"].to_numpy())
    pairs = trained.loc[shown.of, ["step", "best"]]
    pairs["pair"] = [f"{names[word]} {names[word]}" for word in shown.values]
    words["word"] = pd.Categorical.from_codes(words["word"], names)
    return {"patterns": patterns, "group_words": words, "doubled": pairs}


def _pairs(first: np.ndarray | pd.Series, second: np.ndarray | pd.Series) -> np.ndarray:
    """Two whole numbers of 32 bits each as one."""
    return np.asarray(first, dtype=np.int64) << 32 | np.asarray(second, dtype=np.int64)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """`np.unique`, which hashes, and takes many times as long for numbers like these."""
    found = np.sort(numbers)
    return found[np.concatenate([[True], found[1:] != found[:-1]])] if len(found) else found


def _among(numbers: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Whether each is among what `_distinct` found."""
    places = np.searchsorted(distinct, numbers)
    return np.append(distinct, -1)[places] == numbers


def _group_words(
    table: pd.DataFrame, trained: pd.DataFrame, lists: Lists, known: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray]:
    """The words of each group, and how many unsupported ones each trained rollout has."""
    read = _distinct(_pairs(table["about"], table["text"]))
    told = lists.take(read & LOW)
    there = _distinct(_pairs((read >> 32)[told.of], told.values))
    each = lists.distinct().take(trained["said"].to_numpy())
    keys, place = np.unique(
        _pairs(trained["at"].to_numpy()[each.of], each.values), return_inverse=True
    )
    groups = trained.groupby("at").agg(
        step=("step", "first"),
        group=("group", "first"),
        about=("about", "first"),
        size=("row", "size"),
        total=("advantage", "sum"),
    )
    words = groups.iloc[keys >> 32].reset_index(drop=True)
    words["word"] = keys & LOW
    words["n"] = np.bincount(place, minlength=len(keys))
    earned = trained["advantage"].to_numpy()[each.of]
    words["earned"] = np.bincount(place, earned, minlength=len(keys))
    words["known"] = known[words["word"]]
    words["in_text"] = _among(_pairs(words.pop("about"), words["word"]), there)
    odd = words["known"] & ~words["in_text"] & (2 * words["n"] < words["size"])
    return words, np.bincount(each.of, odd.to_numpy()[place], minlength=len(trained))


def _copied(sequences: Lists, said: pd.Series, text: pd.Series) -> np.ndarray:
    """(R,) whether half of a rationale's sequences of words stand in its text."""
    pairs, place = np.unique(_pairs(said, text), return_inverse=True)
    own, texts = sequences.take(pairs >> 32), pairs & LOW
    there = _distinct(_pairs(sequences.of, sequences.values))
    stands = _among(_pairs(texts[own.of], own.values), there)
    copied = np.bincount(own.of, stands, minlength=len(pairs))
    return ((own.counts > 0) & (2 * copied >= own.counts))[place]


def _same(lists: Lists, trained: pd.DataFrame) -> np.ndarray:
    """(R,) whether its very words were written of a third of its step's texts, three at least."""
    ends = lists.counts.cumsum()
    places = zip(ends - lists.counts, ends, strict=True)
    written = [lists.values[start:end].tobytes() for start, end in places]
    alike = pd.factorize(pd.Series(written, dtype=object))[0][trained["said"]]
    step = pd.factorize(trained["step"])[0]
    saying = pd.factorize(_pairs(step, alike))[0]
    texts = np.bincount(_distinct(_pairs(saying, trained["text"])) >> 32)[saying]
    groups = np.bincount(_distinct(_pairs(step, trained["at"])) >> 32)[step]
    return (lists.counts[trained["said"]] > 0) & (texts >= 3) & (3 * texts >= groups)


MADE = f"""
CREATE OR REPLACE TABLE patterns (step BIGINT, "group" BIGINT, row BIGINT, advantage FLOAT,
  tokens BIGINT, best BOOLEAN, {", ".join(f"{name} BOOLEAN" for name in PATTERNS)}, odd DOUBLE);
CREATE OR REPLACE TABLE group_words (step BIGINT, "group" BIGINT, word VARCHAR, n BIGINT,
  earned DOUBLE, size BIGINT, total DOUBLE, known BOOLEAN, in_text BOOLEAN);
CREATE OR REPLACE TABLE doubled (step BIGINT, best BOOLEAN, pair VARCHAR);
"""
"""The tables that `pattern_tables` fills."""

BY_STEP = (
    "SELECT step, count(*) AS rollouts, avg(tokens) AS tokens, avg(odd) AS odd, "
    + ", ".join(
        f"avg({name}::INT) AS {name}, avg({name}::INT) FILTER (best) AS best_{name}"
        for name in PATTERNS
    )
    + " FROM patterns GROUP BY step ORDER BY step"
)
"""Share of rollouts, and of the best of their group, that show each pattern, at each step."""

PAID = " UNION ALL ".join(
    f"""SELECT '{name}' AS pattern, avg(shown) AS "with", avg(other) AS without FROM (
    SELECT avg(advantage) FILTER ({name}) AS shown, avg(advantage) FILTER (NOT {name}) AS other
    FROM patterns GROUP BY step, "group") WHERE shown IS NOT NULL AND other IS NOT NULL"""
    for name in PATTERNS
)
"""Mean advantage inside the groups that have rollouts with and without a pattern."""

ODD_PAYS = """
SELECT corr(apart, advantage) AS pays FROM (
  SELECT advantage, odd - avg(odd) OVER (PARTITION BY step, "group") AS apart FROM patterns
  WHERE step >= ?)
"""
"""Correlation inside of groups of the advantage and the share of words that are unsupported."""

WORDS = """
WITH bounds AS (SELECT ? AS early, ? AS late), sizes AS (
  SELECT count(*) AS rollouts, count(*) FILTER (step <= early) AS first,
    count(*) FILTER (step >= late) AS last,
    count(DISTINCT (step, "group")) FILTER (step >= late) AS groups
  FROM patterns, bounds
)
SELECT word, sum(n) / any_value(rollouts) AS share,
  coalesce(sum(n) FILTER (step <= early), 0) / any_value(first) AS first,
  coalesce(sum(n) FILTER (step >= late), 0) / any_value(last) AS last,
  avg(earned / n) FILTER (n < size) AS "with",
  avg((total - earned) / (size - n)) FILTER (n < size) AS without,
  count(*) FILTER (n < size) AS compared,
  sum((n / size) ** 2) FILTER (step >= late) / any_value(groups) AS squares,
  sum(n / size) FILTER (step >= late) / any_value(groups) AS rate,
  sum(n / size / size) FILTER (step >= late) / any_value(groups) AS noise,
  avg(known::INT) AS known, sum(n) FILTER (in_text) / sum(n) AS in_text
FROM group_words, bounds, sizes
GROUP BY word HAVING sum(n) >= 5
"""
"""Every word: how often at first and at last, mean advantage inside of groups with and without it,
and the moments from which follows whether its use depends on the text."""

WORD_STEPS = """
SELECT word, step, sum(n) / any_value(rollouts) AS share FROM group_words
JOIN (SELECT step, count(*) AS rollouts FROM patterns GROUP BY step) USING (step)
WHERE list_contains(?, word) GROUP BY word, step ORDER BY word, step
"""

DOUBLED = """
SELECT pair, count(*) AS n FROM doubled WHERE best AND step >= ?
GROUP BY pair ORDER BY n DESC, pair LIMIT 1
"""
"""The word that is most often written twice in a row by the best of a group."""
