"""vLLM inside TRL, on a GPU and on a CPU.

TRL's own vLLM path is used as it is. On a CPU it needs two repairs (vLLM 0.31, TRL 1.16):

- vLLM's CPU linear layers repack their weights after loading and lose the loader that TRL's push
  calls, so weights are pushed through the model runner's `reload_weights` with an explicit
  iterator. (Without an iterator that call would reload the first checkpoint from disk; with one it
  takes what it is given.) A head tied to the input embeddings gets no weights of its own in that
  push and would go on sampling from its old packed copy, so it is packed again.
- Compiling for the CPU takes most of a minute at start; small models run as fast without.

TRL imports vLLM with its trainers wherever it is installed, which takes seconds and warns. So this
module imports them as if it were not, and `vllm_start` gives it to them where a run uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import reload
from typing import Any

import torch
from torch import Tensor
from trl import import_utils

from grace_rl.rollout.generator import CPU_DEFAULTS, vllm_runs_on_cpu

_installed: Any = import_utils.is_vllm_available
import_utils.is_vllm_available = lambda min_version=None: False
try:
    from trl import GRPOTrainer as GRPOTrainer
    from trl.generation import vllm_client, vllm_generation
finally:
    import_utils.is_vllm_available = _installed


def _give_trl_vllm() -> None:
    """TRL's modules once more, now with vLLM; their classes see it in their modules' names."""
    if not hasattr(vllm_generation, "LLM"):
        reload(vllm_client)
        reload(vllm_generation)


@contextmanager
def vllm_start(use_vllm: bool) -> Iterator[None]:
    """Inside, TRL builds its vLLM engine, if any, with settings that suit the platform."""
    if not use_vllm:
        yield
        return
    _give_trl_vllm()
    if not vllm_runs_on_cpu():
        yield
        return
    for name, value in CPU_DEFAULTS.items():
        os.environ.setdefault(name, value)
    module: Any = vllm_generation  # for mypy its LLM is a class, which nothing may replace
    original = module.LLM
    module.LLM = partial(original, enforce_eager=True)
    try:
        yield
    finally:
        module.LLM = original


def repair_weight_push(generation: Any) -> None:
    """Replace the weight push of TRL's `VLLMGeneration` where vLLM runs on a CPU, only there."""
    if generation.mode == "colocate" and vllm_runs_on_cpu():
        generation.sync_weights = partial(_push_weights_on_cpu, generation)


def _push_weights_on_cpu(generation: Any) -> None:
    def copies() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in generation._iter_named_params():
            yield name, parameter.detach().clone()

    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    with torch.no_grad():
        runner.reload_weights(weights_iterator=copies())
        model = runner.get_model()
        if runner.model_config.hf_text_config.tie_word_embeddings:
            model.lm_head.tie_weights(model.model.embed_tokens)
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
    generation.llm.reset_prefix_cache()
