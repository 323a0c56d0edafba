"""How far each reader's vectors move when rationales are swapped, shuffled or blanked.

    grace-rl train recipes/quickstart.yaml
    python benchmarks/faithfulness.py runs/quickstart/model

The policy writes a rationale for --rows queries of each split of scenes; the readers read them
changed. Also for the cold start, which RL has not touched. Prints a table; the numbers go to
benchmarks/results/faithfulness.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.settings import EncoderSettings
from grace_rl.evaluate.faithfulness import EDITS, faithfulness

RESULTS = Path(__file__).parent / "results" / "faithfulness.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="model/ of a quickstart run")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    trained = RationaleEncoder.from_pretrained(options.model)
    settings = EncoderSettings(instruction=None, max_rationale_tokens=trained.max_rationale_tokens)
    policies = {
        "cold start": RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings),
        "after RL": trained,
    }
    found = []
    print("| policy | split | reader | " + " | ".join(EDITS) + " | follows |")
    print("|---|---|---|" + "---|" * (len(EDITS) + 1))
    for policy, encoder in policies.items():
        for split in ("test", "transfer"):
            rows = scenes.rows(split, "triplet", options.rows, seed=1)  # type: ignore[arg-type]
            measured = faithfulness(encoder, [row["query"] for row in rows])
            for span, values in measured.items():
                found.append({"policy": policy, "split": split, "reader": span, **values})
                cells = " | ".join(f"{values[name]:.2f}" for name in (*EDITS, "follows"))
                print(f"| {policy} | {split} | {span} | {cells} |")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
