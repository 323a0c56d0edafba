"""What every test shares: no hub, one thread, no sign of the process that runs pytest."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import warm_python

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What a script starts in the background is told to ignore Ctrl-C, and so are its children.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault(warm_python.PLACE, "")
subprocess.Popen = warm_python.Popen  # type: ignore[misc]

ROOT = Path(__file__).resolve().parents[1]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell of a failure when it happens: a run that is cut off never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.stderr.write(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}\n")


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection, half a second each."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries count what is left at the end


@pytest.fixture(autouse=True)
def _its_own_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret that one test meets is masked in no other's messages."""
    monkeypatch.setattr("grace_rl.run.secrets._met", set())


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; tests skip where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data and models), which is not here")
    return folder


@pytest.fixture
def cold_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs start from nothing: what they import, or who gets a terminal's signals, counts."""
    monkeypatch.setenv(warm_python.PLACE, "off")
