"""grace-rl embed MODEL --input FILE --output FILE"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "write the vectors of a file of texts; an unfinished output resumes"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run's model/, or any sentence encoder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="FILE", help="texts: .jsonl[.gz], .csv[.gz] or .parquet")
    source.add_argument(
        "--from-rationales",
        metavar="FILE",
        help="stored rationales: read them with this model and write none",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a .parquet file")
    parser.add_argument("--text-column", default="text", metavar="NAME")
    parser.add_argument("--id-column", default="id", metavar="NAME", help="default: the row number")
    parser.add_argument("--rationales", action="store_true", help="keep texts and rationales too")
    parser.add_argument(
        "--rationale", choices=("greedy", "sample", "none"), help="default: as the model was saved"
    )
    parser.add_argument("--max-rationale-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="of samples")
    parser.add_argument("--seed", type=int, metavar="N", help="of samples")
    parser.add_argument("--instruction", metavar="TEXT", help="in place of the trained one")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only every N-th row")
    parser.add_argument("--chunk", type=int, default=4096, metavar="ROWS", help="rows of a part")
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument("--cache", metavar="FILE", help="a sqlite file that remembers rationales")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.errors import UserError

    shard = _shard(options.shard)
    output = Path(options.output).expanduser()
    problems = []
    if shard is None:
        problems.append(f"--shard: must be I/N with 1 <= I <= N, such as 2/4, not {options.shard}")
    if output.suffix != ".parquet":
        problems.append(f"--output: must be a .parquet file, not {output}")
    if options.chunk < 1:
        problems.append(f"--chunk: must be at least 1, not {options.chunk}")
    if problems or shard is None:
        raise UserError(problems)

    from grace_rl.data.texts import TextSource
    from grace_rl.embed.corpus import EmbedJob, embed_file
    from grace_rl.embed.encoder import RationaleEncoder
    from grace_rl.embed.loading import load_encoder, usable_device
    from grace_rl.run.screen import Screen

    given = bool(options.from_rationales)
    path = Path(options.from_rationales or options.input).expanduser()
    source = TextSource(
        path, None if given else options.text_column, options.id_column, shard=shard
    )
    if not given:
        source.check()  # before the model loads
    device = usable_device(options.device)
    encoder = load_encoder(options.model, device, engine=options.engine, cache=options.cache)
    if given:
        if not isinstance(encoder, RationaleEncoder):
            raise UserError(f"{options.model}: reads texts, not rationales; use --input")
        needs = encoder.reader.config.span != "bottleneck"
        text = options.text_column if needs or options.rationales else None
        source = TextSource(path, text, options.id_column, "rationale", shard)
    if shard[1] > 1:
        output = output.with_name(f"{output.stem}-{shard[0]}-of-{shard[1]}.parquet")
    console = Screen(stderr=True)
    reader = encoder.reader if isinstance(encoder, RationaleEncoder) else None
    if reader is not None and reader.config.centre and reader.centre is None:
        console.print(
            f"{options.model} has no centre, so its cosines are all close to 1: "
            f"grace-rl centre {options.model} --input TEXTS fits one",
            style="yellow",
        )
    job = EmbedJob(source, output, options.rationales, _settings(options, encoder), options.chunk)
    try:
        rows = embed_file(
            encoder, job, Path(options.model), overwrite=options.overwrite, console=console
        )
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on after the last finished part")
        return 130
    console.print(f"{rows:,} vectors are in {output}", highlight=False, soft_wrap=True)
    return 0


def _settings(options: argparse.Namespace, encoder: Any) -> dict[str, Any]:
    from grace_rl.embed.encoder import RationaleEncoder
    from grace_rl.errors import UserError

    if options.rationales and not encoder.writes_rationales:
        raise UserError(f"--rationales: {options.model} writes none; leave it out")
    names = ("rationale", "max_rationale_tokens", "temperature", "seed", "instruction")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and (options.from_rationales or not isinstance(encoder, RationaleEncoder)):
        told = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{told}: nothing is written here; leave it out")
    return given


def _shard(told: str) -> tuple[int, int] | None:
    """`2/4` -> (2, 4); None if it is none."""
    first, _, count = told.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        return None
    return int(first), int(count)
