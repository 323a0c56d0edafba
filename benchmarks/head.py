"""A micro-batch of a policy with an adapter: TRL's head as it is on a CPU, and spared.

    OMP_NUM_THREADS=1 python benchmarks/head.py models/smollm2-135m --dtype bfloat16

Rows of --tokens random tokens of which the last --scored are scored, forward and backward through
TRL's fused head, LoRA (rank 16) on every layer. Two ways of attention and the two heads take turns,
--repeats times after a warm-up. Prints the median of processor time, and the ratio to the first.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from grace_rl.train.head import spare_head


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a language model's folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=84)
    parser.add_argument("--scored", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    policies = {
        f"{attention}, {'spared' if spared else 'as it is'}": policy(options, attention, spared)
        for attention in ("sdpa", "eager")
        for spared in (False, True)
    }
    torch.manual_seed(0)
    ids = torch.randint(10, 1000, (options.rows, options.tokens))
    labels = ids.clone()
    labels[:, : -options.scored] = -100
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for repeat in range(options.repeats + 1):
        for name, model in policies.items():
            began = time.process_time()
            output = model(ids, attention_mask=ids > 0, labels=labels, fused_lm_head=True)
            (output.log_probs.sum() + 0.01 * output.entropy.sum()).backward()
            if repeat:
                seconds[name].append(time.process_time() - began)
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:>16}: {middle:.2f} s ({low:.2f} to {high:.2f}), ratio {middle / first:.2f}")


def policy(options: argparse.Namespace, attention: str, spared: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, attn_implementation=attention
    )
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    if spared:
        spare_head(adapted)
    return adapted


if __name__ == "__main__":
    main()
