"""grace-rl centre MODEL --input FILE"""

from __future__ import annotations

import argparse
from pathlib import Path

from grace_rl.run.printing import say

HELP = "fit the centre of a model's vectors on a file of texts and keep it with the model"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run's model/")
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="texts: .jsonl[.gz], .csv[.gz] or .parquet"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME")
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="the first N texts")
    parser.add_argument("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument("--cache", metavar="FILE", help="a sqlite file that remembers rationales")
    parser.add_argument("--device", help="default: a GPU if there is one")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from itertools import islice

    from grace_rl.data.texts import TextSource
    from grace_rl.embed.encoder import RationaleEncoder
    from grace_rl.embed.loading import usable_device

    source = TextSource(Path(options.input).expanduser(), options.text_column)
    source.check()
    device = usable_device(options.device)
    folder = Path(options.model).expanduser()
    encoder = RationaleEncoder.from_pretrained(
        folder, device, engine=options.engine, cache=options.cache
    )
    texts = (row["text"] for row in islice(source.rows(), options.rows))
    count = encoder.fit_centre(texts, progress=True)
    encoder.reader.save(folder)
    say(f"the centre of {count:,} texts is in {folder}/reader")
    return 0
