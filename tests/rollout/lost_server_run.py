"""`grace-rl` in each of two processes, with nothing sent over NCCL; prints the exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stand_in_server import without_nccl

from grace_rl.cli import main

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, without_nccl(patch):
        print(f"exit code {main(sys.argv[1:])}", flush=True)
