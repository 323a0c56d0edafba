"""What policies do instead of writing about the text: each pattern as a column, in SQL.

A pattern is judged by words alone, from a rollout, its siblings and the texts of its step; nothing
here knows what is true. `PATTERNS` are the names that a filter takes.
"""

from __future__ import annotations

PATTERNS = {
    "empty": "nothing is written",
    "endless": "never ended",
    "repetition": "a word twice in a row, or every word twice",
    "copy": "half of its word sequences (of four) stand in the text",
    "same": "word for word what was written of a third of the step's texts",
    "unsupported": "a word of other texts that neither its own text nor most siblings have",
}

WORD = r"[\p{L}\p{N}]+"
_WORDS = "regexp_extract_all(lower({}), '" + WORD.replace("{", "{{").replace("}", "}}") + "')"
_PAIR = "step, example, role LIKE 'negative%' AS negative"
MADE = f"""
CREATE OR REPLACE TABLE words_of AS
SELECT step, "group", row, example, role LIKE 'negative%' AS negative, advantage, tokens, truncated,
       text, {_WORDS.format("rationale")} AS words,
       row_number() OVER (PARTITION BY step, "group" ORDER BY advantage DESC, row) = 1 AS best
FROM rollouts WHERE advantage IS NOT NULL;

CREATE OR REPLACE TABLE group_words AS
WITH each_word AS (
  SELECT step, "group", advantage, unnest(list_distinct(words)) AS word FROM words_of
), sizes AS (
  SELECT step, "group", any_value(example) AS example, any_value(negative) AS negative,
         count(*) AS size, sum(advantage) AS total FROM words_of GROUP BY step, "group"
), said AS (
  SELECT step, example, negative, unnest(words) AS word FROM (
    SELECT DISTINCT {_PAIR}, {_WORDS.format("text")} AS words FROM rollouts)
), there AS (SELECT DISTINCT step, example, negative, word FROM said),
known AS (SELECT DISTINCT word FROM there),
counted AS (
  SELECT step, "group", word, count(*) AS n, sum(advantage) AS earned
  FROM each_word GROUP BY step, "group", word
)
SELECT counted.*, size, total, known.word IS NOT NULL AS known, there.word IS NOT NULL AS in_text
FROM counted JOIN sizes USING (step, "group")
LEFT JOIN there USING (step, example, negative, word) LEFT JOIN known ON known.word = counted.word;

CREATE OR REPLACE TABLE patterns AS
WITH odd AS (
  SELECT step, "group", word FROM group_words WHERE known AND NOT in_text AND 2 * n < size
), texts AS (SELECT step, count(DISTINCT "group") AS texts FROM words_of GROUP BY step),
spread AS (
  SELECT step, words, count(DISTINCT text) AS written FROM words_of
  WHERE len(words) > 0 GROUP BY step, words
), claims AS (
  SELECT step, row, count(*) AS odd_words FROM (
    SELECT step, "group", row, unnest(list_distinct(words)) AS word FROM words_of)
  SEMI JOIN odd USING (step, "group", word) GROUP BY step, row
), grams AS (
  SELECT step, row, ' ' || array_to_string({_WORDS.format("text")}, ' ') || ' ' AS text,
    list_transform(range(1, len(words) - 2),
      lambda i: ' ' || array_to_string(words[i:i + 3], ' ') || ' ') AS grams
  FROM words_of WHERE len(words) >= 4
), copies AS (
  SELECT step, row FROM grams
  WHERE 2 * len(list_filter(grams, lambda gram: contains(text, gram))) >= len(grams)
)
SELECT step, "group", row, advantage, tokens, best,
  len(words) = 0 AS empty,
  truncated AS endless,
  (len(words) >= 6 AND 2 * len(list_distinct(words)) <= len(words)) OR coalesce(list_bool_or(
    list_transform(range(1, len(words)), lambda i: words[i] = words[i + 1])), false) AS repetition,
  copies.row IS NOT NULL AS copy,
  coalesce(written >= 3 AND 3 * written >= texts, false) AS same,
  claims.row IS NOT NULL AS unsupported,
  coalesce(odd_words / len(list_distinct(words)), 0) AS odd
FROM words_of JOIN texts USING (step) LEFT JOIN spread USING (step, words)
LEFT JOIN claims USING (step, row) LEFT JOIN copies USING (step, row);
"""
"""Makes the tables `words_of`, `group_words` and `patterns` from the table `rollouts`."""

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
  FROM words_of, bounds
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
JOIN (SELECT step, count(*) AS rollouts FROM words_of GROUP BY step) USING (step)
WHERE list_contains(?, word) GROUP BY word, step ORDER BY word, step
"""

DOUBLED = """
SELECT pair, count(*) AS n, min(step) AS since FROM (
  SELECT step, unnest(list_distinct(list_transform(range(1, len(words)), lambda i:
    CASE WHEN words[i] = words[i + 1] THEN words[i] || ' ' || words[i + 1] END))) AS pair
  FROM words_of WHERE best AND step >= ?)
WHERE pair IS NOT NULL GROUP BY pair ORDER BY n DESC, pair LIMIT 1
"""
"""The word that is most often written twice in a row by the best of a group."""
