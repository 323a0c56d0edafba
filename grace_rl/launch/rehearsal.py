"""Every reward on four made-up rollouts of the recipe's own rows, as training calls it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.errors import Finding, UserError
from grace_rl.reward.example import example_batch, with_prefixes
from grace_rl.reward.loading import load_rewards
from grace_rl.reward.trial import scorer, value_range

ROLLOUTS = (
    "A short description of it.",
    "What it says, in other words, with the parts that matter first and all the others after.",
    "again again again again",
    "",
)


def rehearse(recipe: Any, args: Any, rows: list[dict[str, Any]]) -> Finding:
    """Every reward on four rollouts of two rows, as training calls it."""
    loaded = load_rewards(recipe.rewards, recipe.path.parent)
    batch = _four_rollouts(args, rows, steps=any(reward.steps for reward in loaded))
    said, worst, advice = [], "ok", []
    for reward in loaded:
        if hasattr(reward.plugin.target, "start_from"):
            said.append(f"{reward.label} not run (it starts from the policy's weights)")
            continue
        began = time.perf_counter()
        try:
            found = value_range([scorer(reward)(batch).values[:, 0]])
        except UserError as error:
            return Finding("rewards", str(error), "problem")
        said.append(f"{reward.label} {found.message}, {time.perf_counter() - began:.2g} s")
        if found.level != "ok":
            worst, advice = "warning", [f"look at {reward.label}: grace-rl rewards check"]
    return Finding("rewards", f"on {len(batch)} rollouts: " + "; ".join(said), worst, advice)  # type: ignore[arg-type]


def _four_rollouts(args: Any, rows: list[dict[str, Any]], steps: bool) -> Any:
    bundles = Bundles(rows[:2], parse_roles(args.roles, args.num_generations))
    generator = torch.Generator().manual_seed(0)
    role = bundles.prompts[0].role
    texts: dict[tuple[int, str], str] = {}
    everything = [*bundles.prompts, *(text for row in bundles.anchors for text, _ in row)]
    for text in everything:
        texts.setdefault((text.example, text.role), text.text)
    made: list[dict[str, Any]] = [{} for _ in rows[:2]]
    for example, its_role in texts:
        scene = torch.randn(1, 8, generator=generator)
        count = 2 if its_role == role else 1
        noise = torch.randn(count, 8, generator=generator)
        made[example][its_role] = (scene + noise).tolist()
    count = sum(len(row[role]) for row in made)
    batch = example_batch(made, [role], rationales=ROLLOUTS[:count], texts=texts)
    examples = batch.example.tolist()
    columns = {key: [rows[i].get(key) for i in examples] for key in rows[0]}
    batch = dataclasses.replace(batch, columns=columns)
    return with_prefixes(batch, segments=2) if steps else batch
