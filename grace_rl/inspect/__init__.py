"""Looking at runs: tables of what they left, in notebooks, in the terminal and on a local page.

>>> from grace_rl.inspect import Run
>>> Run("runs/quickstart").rollouts(step=10, role="query", text="fox")  # doctest: +SKIP
"""

from grace_rl.inspect.filters import Filter
from grace_rl.inspect.run import Run

__all__ = ["Filter", "Run"]
