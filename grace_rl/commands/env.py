"""grace-rl env"""

from __future__ import annotations

import argparse

HELP = "print what to paste into a bug report: versions, machine, packages"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.run.environment import describe_environment
    from grace_rl.run.printing import say
    from grace_rl.run.versions import untested

    found = describe_environment()
    for name, version in found["versions"].items():
        say(f"{name}: {version}")
    cpu, git = found["cpu"], found["git"]
    say(f"python: {found['python']}")
    say(f"platform: {found['platform']}")
    say(f"cpu: {cpu['machine']}, {cpu['cores']} cores, {cpu['torch_threads']} threads of torch")
    say(f"gpus: {', '.join(found['gpus']) or 'none'}")
    say(
        f"git: {git['commit'] + (' (changed)' if git['dirty'] else '') if git else 'no repository'}"
    )
    for difference in untested(found["versions"]):
        say(f"note: {difference}")
    return 0
