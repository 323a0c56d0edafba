"""The built-in world of small scenes: rows, rationales, gold similarity, and its tiny policy."""

from grace_rl.data.scenes.dataset import rows
from grace_rl.data.scenes.policy import COLD_START, save_untrained
from grace_rl.data.scenes.rationales import FactReading, read_facts, reference_rationale
from grace_rl.data.scenes.world import TRANSFER_WORDS, VALUES, gold_similarity, split_of

__all__ = [
    "COLD_START",
    "TRANSFER_WORDS",
    "VALUES",
    "FactReading",
    "gold_similarity",
    "read_facts",
    "reference_rationale",
    "rows",
    "save_untrained",
    "split_of",
]
