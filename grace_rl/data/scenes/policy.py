"""The tiny policy of the `scenes` world: a tokenizer of whole words and a small Qwen3 decoder."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from grace_rl.data.scenes.rationales import FILLER, OPENER
from grace_rl.data.scenes.texts import NEAR, TEMPLATES, Rendering
from grace_rl.data.scenes.world import FACT_OF_WORD, VALUES

COLD_START = Path(__file__).parent / "cold_start"
"""The trained policy that ships with the package; `recipes/scenes/sft.yaml` makes it."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# A word takes the space before it along, as in GPT-2; the opener of a rationale is one piece.
_PIECE = rf"{re.escape(OPENER)}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+"


def save_untrained(path: str | Path, seed: int = 0) -> Path:
    """Write the policy with random weights: the same seed, the same files.

    Args:
        path: Folder; made if missing.
        seed: Seed of the weights.

    Returns:
        The folder, which `transformers` and vLLM load.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        max_window_layers=3,
        tie_word_embeddings=True,
        # Wider than usual: a model this small then learns to look words up much sooner.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: every word of the world is one token, any other text is spelled in bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, END, SYSTEM, USER, ASSISTANT]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [word for word in _whole_words() if word not in tokens]
    # No merges: a piece that is in the vocabulary is one token (ignore_merges), any other piece
    # falls to bytes.
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)}, merges=[], ignore_merges=True
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens[:5]]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _whole_words() -> list[str]:
    """Pieces with a token of their own, in byte-level spelling (a space is written as U+0120)."""
    pieces = {OPENER} | {f" {word}" for word in (*FACT_OF_WORD, *FILLER)}
    plain = {attribute: next(iter(values)) for attribute, values in VALUES.items()}
    # With these two both articles and both prepositions of time are met in every sentence.
    with_a = plain | {"time": "dawn"}, plain | {"trait": "tall"}
    with_an = (
        plain | {"time": "spring"},
        plain | {"trait": "old", "agent": "instructor", "object": "automobile"},
    )
    for scene, words in (with_a, with_an):
        for template, near in itertools.product(range(len(TEMPLATES)), NEAR):
            pieces |= set(re.findall(r" ?[A-Za-z]+", Rendering(scene, words, template, near).text))
    return [piece.replace(" ", "\u0120") for piece in sorted(pieces)]
