"""Tables as csv that a spreadsheet shows and does not run."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n]")


def csv_text(table: pd.DataFrame) -> str:
    """A table as csv. Text that a spreadsheet would take for a formula begins with a quote sign.

    Models and data sets wrote the texts, and a cell such as `=HYPERLINK(...)` acts once the file is
    opened. A quote sign in front is what OWASP advises; numbers stay as they are.

    >>> csv_text(pd.DataFrame({"rationale": ["=1+1", "red fox"], "advantage": [-0.5, 1.0]}))
    "rationale,advantage\\r\\n'=1+1,-0.5\\r\\nred fox,1.0\\r\\n"
    """
    inert = table.rename(columns=_inert).copy()
    for place, kind in enumerate(inert.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            inert.isetitem(place, inert.iloc[:, place].map(_inert))
    # With this line end a lone return or newline inside a cell is quoted too.
    return inert.to_csv(index=False, lineterminator="\r\n")


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value
