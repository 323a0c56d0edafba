"""Is the vector made of the rationale? Change the rationale, and see how far the vector moves.

A rationale explains an embedding only as far as another rationale would have given another
embedding. The policy writes once; then its rationales are swapped, shuffled or blanked, and each
reader reads text and changed rationale again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig, Span

EDITS = ("swap", "shuffle", "blank")


def faithfulness(
    encoder: RationaleEncoder,
    texts: Sequence[str],
    spans: Sequence[Span] = ("context", "rationale", "bottleneck", "joint"),
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How far vectors move when their rationales are changed, for readers of one policy.

    Every reader's vectors are centred by the mean of their unedited ones.

    Args:
        encoder: Writes the rationales, greedily.
        texts: N different texts, at least 3.
        spans: Readers, each with its usual layers and the policy's weights.
        seed: Of the shuffled words.

    Returns:
        For each span `swap`, `shuffle` and `blank`: the mean distance (1 - cosine) of a text's
        vector to that with the changed rationale, in units of the mean distance between different
        texts: 0 does not move, 1 is as far away as another text. And `follows`, 0 to 1: the share
        of texts that, given another text's rationale, are nearer to that text than to themselves.
    """
    if len(texts) < 3:
        raise ValueError(f"faithfulness needs at least 3 texts, not {len(texts)}")
    written = encoder.write(texts, "greedy")
    rationales = [item.rationale for item in written]
    changed = {
        "swap": [*rationales[1:], rationales[0]],
        "shuffle": shuffled(rationales, seed),
        "blank": [""] * len(texts),
    }
    found: dict[str, dict[str, float]] = {}
    for span in spans:
        config = ReaderConfig(span=span)
        reader = Reader(config, encoder.tokenizer, encoder.end_ids, encoder.model)
        reader.weight = encoder.reader.weight
        raw = reader.read(written).float()
        reader.centre = reader.mean(raw)
        unit = reader.finish(raw)
        cosines = unit @ unit.T
        apart = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        usual = 1 - float(cosines[apart].mean())
        found[span] = {}
        for edit in EDITS:
            moved = reader.finish(reader.read(encoder.written(changed[edit], texts)).float())
            distance = 1 - float((unit * moved).sum(-1).mean())
            found[span][edit] = distance / usual
            if edit == "swap":
                donor = unit.roll(-1, 0)
                nearer = (normalize(moved, dim=-1) * (donor - unit)).sum(-1) > 0
                found[span]["follows"] = float(nearer.float().mean())
    return found


def shuffled(rationales: Sequence[str], seed: int) -> list[str]:
    """Each rationale's words in another order, a space between them.

    >>> sorted(shuffled(["a thief hides a lamp"], 0)[0].split())
    ['a', 'a', 'hides', 'lamp', 'thief']
    """
    draw = random.Random(seed)
    return [" ".join(draw.sample(words, len(words))) for words in map(str.split, rationales)]
