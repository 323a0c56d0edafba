"""grace-rl push RUN --repo NAME/MODEL"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "share a run's model on a hub, with a card written from the run"
RECIPE_OVERRIDES = False
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BESIDE = ("grace.json", "gircse.json", "tokenizer*", "chat_template*", "reader/centre.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a finished run directory")
    parser.add_argument(
        "--repo", required=True, metavar="NAME/MODEL", help="made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="if it is made")
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="only the adapter of the last checkpoint, not the model with it merged in",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be sent, and print the card"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    import shutil
    import tempfile

    from grace_rl.run.card import model_card
    from grace_rl.run.files import write_text
    from grace_rl.run.printing import say

    path = Path(options.run)
    card = model_card(path, options.repo)
    files = _adapter(path) if options.adapter else _whole(path)
    if options.dry_run:
        for name in files:
            say(f"{name}: {files[name].stat().st_size:,} bytes")
        say(card)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for name, file in files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.symlink_to(file.resolve())  # the hub's client follows it
            except OSError:  # a file system without links
                shutil.copyfile(file, target)
        write_text(Path(folder) / "README.md", card)
        say(f"{_upload(Path(folder), options)} has {len(files) + 1} files")
    return 0


def _whole(run: Path) -> dict[str, Path]:
    """Every file of model/; weights are safetensors, nothing is code."""
    model = run / "model"
    files = {str(file.relative_to(model)): file for file in model.rglob("*") if file.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in Path(name).parts)}
    return {name: files[name] for name in sorted(set(files) - hidden - {"README.md"})}


def _adapter(run: Path) -> dict[str, Path]:
    """The adapter of the last checkpoint that has one, and what reads it."""
    from grace_rl.errors import UserError

    found = [file.parent for file in (run / "checkpoints").glob(f"*/{ADAPTER[1]}")]
    if not found:
        raise UserError(f"{run}: no checkpoint has an adapter; leave out --adapter")
    last = max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))
    model = run / "model"
    beside = {file for pattern in BESIDE for file in model.glob(pattern)}
    files = {str(file.relative_to(model)): file for file in sorted(beside)}
    return files | {name: last / name for name in ADAPTER}


def _upload(folder: Path, options: argparse.Namespace) -> str:
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    from grace_rl.errors import UserError

    api = HfApi(library_name="grace-rl")
    try:
        made = api.create_repo(options.repo, private=options.private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=made.repo_id, commit_message="Model and card of a run"
        )
    except OfflineModeIsEnabled as error:
        raise UserError("--repo: HF_HUB_OFFLINE=1 is set, so nothing can be sent") from error
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--repo: {options.repo} could not be sent: {reason} (hf auth login?)"
        ) from error
    return str(made)
