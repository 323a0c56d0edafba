"""grace-rl embed MODEL --input TEXTS --output FILE|DIR"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grace_rl.run.workers import Cluster

if TYPE_CHECKING:
    from grace_rl.data.corpus import Texts
    from grace_rl.embed.loading import EncoderKind

HELP = "write the vectors of a file or corpus of texts; an unfinished output resumes"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run's model/, or any sentence encoder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        metavar="TEXTS",
        help="a .jsonl[.gz], .csv[.gz] or .parquet file; a folder, pattern or address of parquet",
    )
    source.add_argument(
        "--from-rationales",
        metavar="FILE",
        help="stored rationales: read them with this model and write none",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE|DIR", help=".parquet, or a folder of parts"
    )
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
    parser.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm", "ray"),
        default="auto",
        help="what writes; ray: many workers, each as auto says",
    )
    Cluster.add_arguments(parser)
    parser.add_argument("--cache", metavar="FILE", help="a sqlite file that remembers rationales")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.errors import UserError

    shard = _shard(options.shard)
    problems = _problems(options, shard)
    cluster = Cluster.told(options, problems)
    if problems:
        raise UserError(problems)

    from grace_rl.embed.corpus import EmbedJob, embed_corpus
    from grace_rl.embed.loading import encoder_kind, load_encoder, look_before, usable_device
    from grace_rl.embed.reader import CENTRE_FILE
    from grace_rl.run.screen import Screen

    model = Path(options.model)
    kind = encoder_kind(model)
    settings = _settings(options, kind)
    texts = _texts(options, kind, shard or (1, 1))
    look_before(model, kind)
    device = options.device if cluster else usable_device(options.device)
    engine: Literal["auto", "transformers", "vllm"] = "auto" if cluster else options.engine
    load = partial(load_encoder, model.absolute(), device, engine=engine, cache=options.cache)
    console = Screen(stderr=True)
    if kind.settings and kind.settings.reader.centre and not (model / CENTRE_FILE).exists():
        console.print(
            f"{options.model} has no centre, so its cosines are all close to 1: "
            f"grace-rl centre {options.model} --input TEXTS fits one",
            style="yellow",
        )
    output = Path(options.output).expanduser()
    if shard and shard[1] > 1:
        output = output.with_name(f"{output.stem}-{shard[0]}-of-{shard[1]}{output.suffix}")
    job = EmbedJob(texts, output.absolute(), options.rationales, settings, options.chunk)
    try:
        done = embed_corpus(
            load, job, model, cluster=cluster, overwrite=options.overwrite, console=console
        )
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on with the parts that are not there")
        return 130
    told = f", {done.errors:,} of them errors (see the column error)" if done.errors else ""
    console.print(f"{done.rows:,} vectors are in {output}{told}")
    return 0


def _problems(options: argparse.Namespace, shard: tuple[int, int] | None) -> list[str]:
    """What is wrong with the options by themselves."""
    problems = []
    if shard is None:
        problems.append(f"--shard: must be I/N with 1 <= I <= N, such as 2/4, not {options.shard}")
    if "://" in options.output:
        problems.append(
            f"--output: must lie on a disk that all workers see, such as a mounted store, not at "
            f"the address {options.output}"
        )
    elif Path(options.output).suffix not in (".parquet", ""):
        problems.append(f"--output: must be a .parquet file or a folder, not {options.output}")
    if options.chunk < 1:
        problems.append(f"--chunk: must be at least 1, not {options.chunk}")
    return problems


def _texts(options: argparse.Namespace, kind: EncoderKind, shard: tuple[int, int]) -> Texts:
    """Where the texts, or the stored rationales, come from."""
    from grace_rl.data.corpus import OneFile, texts_of
    from grace_rl.data.texts import TextSource
    from grace_rl.errors import UserError

    text: str | None = options.text_column
    if options.from_rationales:
        if kind.settings is None:
            raise UserError(f"{options.model}: reads texts, not rationales; use --input")
        needed = kind.settings.reader.span != "bottleneck" or options.rationales
        text = text if needed else None
    place = options.from_rationales or options.input
    columns = TextSource(
        Path(place).expanduser().absolute(),
        text,
        options.id_column,
        "rationale" if options.from_rationales else None,
        shard,
    )
    texts = texts_of(place, columns)
    if shard[1] > 1 and not isinstance(texts, OneFile):
        raise UserError("--shard: is for one file; --engine ray shares a corpus among workers")
    return texts


def _settings(options: argparse.Namespace, kind: EncoderKind) -> dict[str, Any]:
    from grace_rl.errors import UserError

    if options.rationales and not kind.module.writes_rationales:
        raise UserError(f"--rationales: {options.model} writes none; leave it out")
    names = ("rationale", "max_rationale_tokens", "temperature", "seed", "instruction")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and (options.from_rationales or kind.settings is None):
        told = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"{told}: nothing is written here; leave it out")
    return given


def _shard(told: str) -> tuple[int, int] | None:
    """`2/4` -> (2, 4); None if it is none."""
    first, _, count = told.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        return None
    return int(first), int(count)
