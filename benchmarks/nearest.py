"""What a policy writes of a test scene and which texts lie nearest, before RL and after.

    grace-rl train recipes/quickstart.yaml && python benchmarks/nearest.py runs/quickstart/model

The README opens with one of these.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.loading import load_encoder
from grace_rl.evaluate.untrained import untrained_encoder
from grace_rl.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def show(encoder: RationaleEncoder, texts: list[str], asked: int) -> None:
    """Print the rationale of text `asked` and the two texts nearest to it."""
    written = [one.rationale for one in encoder.write(texts, "greedy")]
    vectors = encoder.encode_rationales(written, texts)
    cosines = vectors @ vectors[asked]
    cosines[asked] = -2.0
    print(f"  wrote   {written[asked]}")
    for value, place in zip(*cosines.topk(2), strict=True):
        print(f"  {value:.2f}    {texts[int(place)]}")


def main() -> None:
    trained = load_encoder(sys.argv[1])
    rows = scenes.rows(split="test", count=100, form="triplet")
    texts = list(dict.fromkeys(text for row in rows for text in _texts(row)))
    with tempfile.TemporaryDirectory() as scratch:
        start = untrained_encoder(load_recipe(RECIPE), Path(scratch))
        start.fit_centre(texts)
        for row in rows[:10]:
            print(f"\n{row['query']}")
            for name, encoder in (("before", start), ("after", trained)):
                print(f" {name}")
                show(encoder, texts, texts.index(row["query"]))


def _texts(row: dict) -> list[str]:
    negative = row["negative"]
    return [row["query"], row["positive"], *([negative] if isinstance(negative, str) else negative)]


if __name__ == "__main__":
    main()
