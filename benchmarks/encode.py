"""Texts per second of the encoder, against a plain loop and against vLLM alone.

    OMP_NUM_THREADS=4 python benchmarks/encode.py speed
    OMP_NUM_THREADS=4 python benchmarks/encode.py speed --scenes 16 --dtype bfloat16
    OMP_NUM_THREADS=1 python benchmarks/encode.py documents --model FOLDER --dtype bfloat16
    python benchmarks/encode.py memory

`speed`: a Qwen3 of about 10M random parameters (or --model FOLDER) writes up to --tokens tokens for
each of --texts texts, each of --scenes scenes, and reads them with the bottleneck. In one process,
in turn, --repeats times after a warm-up: (a) a plain loop of generate and one forward per text, on
--loop-texts of them; (b) the same vLLM engine generating for the same prompts and nothing else; our
encoder with transformers, with vLLM, and with everything in its cache. Timed by the clock and in
processor time, which a busy machine disturbs less.

`documents`: texts that are not written for, by the reader `joint`, and sentence-transformers' own
encode of the same model with mean pooling, in turn.

`memory`: the peak of `grace-rl embed` on --small and on --large texts, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from random_policy import save_random_policy
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import ReaderConfig
from grace_rl.embed.settings import EncoderSettings

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--model", help="a language model's folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--scenes", type=int, default=1, help="how long a text is")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--loop-texts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = WHAT[options.what](options, Path(folder))
    found["options"] = vars(options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"encode-{options.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# -- speed ---------------------------------


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = Path(options.model or folder / "model")
    dtype = getattr(torch, options.dtype)
    if not options.model:
        save_random_policy(model, dtype=dtype)
    load = partial(
        RationaleEncoder.from_pretrained,
        model,
        settings=EncoderSettings(
            instruction=None, max_text_tokens=1024, max_rationale_tokens=options.tokens
        ),
        model_kwargs={"dtype": dtype},
    )
    plain, fast = load(), load(engine="vllm")
    cached = load(engine="vllm", cache=folder / "cache.sqlite")
    rows = scenes.rows("train", "triplet", options.texts * options.scenes)
    words = iter(row["query"] for row in rows)
    texts = [" ".join(islice(words, options.scenes)) for _ in range(options.texts)]
    prompts = [plain.template.render(text).token_ids for text in texts]
    few = texts[:: len(texts) // options.loop_texts][: options.loop_texts]
    engine = fast.writer.generator._started()  # type: ignore[attr-defined]
    cached.writer.generator = fast.writer.generator  # one engine in the process
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(
        max_tokens=options.tokens, temperature=0.0, stop_token_ids=fast.end_ids, detokenize=False
    )
    raw: list[Any] = []

    def generate_only() -> None:
        raw[:] = engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False
        )

    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "loop": (len(few), lambda: [loop(plain, text) for text in few]),
        "encode, transformers": (len(texts), lambda: plain.encode(texts)),
        "vLLM alone": (len(texts), generate_only),
        "encode, vLLM": (len(texts), lambda: fast.encode(texts)),
        "encode, cached": (len(texts), lambda: cached.encode(texts)),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, (count, run) in runs.items():
            engine.reset_prefix_cache()  # nobody profits from the prompts of the run before
            started, used = time.perf_counter(), time.process_time()
            run()
            if repeat:
                rates[name].append(count / (time.perf_counter() - started))
                cpu[name].append(count / (time.process_time() - used))
    written = fast.write(texts)
    same = [list(o.outputs[0].token_ids) for o in raw] == [item.token_ids for item in written]
    tokens = sum(len(item.token_ids) for item in written) / len(texts)
    prompt_tokens = sum(map(len, prompts)) / len(prompts)
    parameters = sum(p.numel() for p in plain.model.parameters())
    print(
        f"{len(texts)} texts, {prompt_tokens:.1f} tokens a prompt and {tokens:.1f} a rationale, "
        f"{parameters / 1e6:.1f}M parameters in {options.dtype},"
    )
    print(f"{torch.get_num_threads()} threads; vLLM alone wrote the same tokens: {same}")
    for name in runs:
        low, high, middle = min(rates[name]), max(rates[name]), statistics.median(rates[name])
        per_cpu = statistics.median(cpu[name])
        print(
            f"{name:>22}: {middle:9.1f} texts/s (from {low:.1f} to {high:.1f}), "
            f"{per_cpu:.1f} per second of processor time"
        )
    ratios = {"wall clock": compare(rates), "processor time": compare(cpu)}
    for clock, values in ratios.items():
        print(f"{clock}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in values.items()))
    return {
        "texts_per_second": rates,
        "texts_per_processor_second": cpu,
        "ratios": ratios,
        "tokens_per_prompt": prompt_tokens,
        "tokens_per_rationale": tokens,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "same_tokens": same,
    }


def compare(rates: dict[str, list[float]]) -> dict[str, float]:
    """The ratios that count, of medians."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(medians["encode, vLLM"], medians["encode, transformers"])
    return {
        "encode / loop": best / medians["loop"],
        "encode, vLLM / vLLM alone": medians["encode, vLLM"] / medians["vLLM alone"],
        "cached / encode": medians["encode, cached"] / best,
    }


@torch.no_grad()
def loop(encoder: RationaleEncoder, text: str) -> torch.Tensor:
    """What one would write by hand: generate for one text, then read it with a forward."""
    ids = encoder.template.render(text).token_ids
    prompt = torch.tensor([ids])
    generated = encoder.model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=encoder.max_rationale_tokens,
        do_sample=False,
        eos_token_id=encoder.end_ids,
        pad_token_id=encoder.end_ids[0],
    )[:, len(ids) :]
    hidden = encoder.model(generated, output_hidden_states=True).hidden_states
    states = [torch.nn.functional.layer_norm(h, h.shape[-1:]) for h in (hidden[0], hidden[-1])]
    vector: torch.Tensor = (states[0] + states[1]).mean(1)
    return vector


# -- documents ---------------------------------


def documents(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, dtype = Path(options.model or folder / "model"), getattr(torch, options.dtype)
    if not options.model:
        save_random_policy(model, dtype=dtype)
    ours = RationaleEncoder.from_pretrained(
        model,
        settings=EncoderSettings(instruction=None, reader=ReaderConfig(span="joint")),
        model_kwargs={"dtype": dtype},
    )
    theirs = SentenceTransformer(
        modules=[
            Transformer(str(model), model_args={"dtype": dtype}),
            Pooling(ours.model.config.hidden_size),
        ],
        device="cpu",
    )
    theirs.max_seq_length = ours.max_seq_length
    theirs.tokenizer.pad_token = theirs.tokenizer.pad_token or theirs.tokenizer.eos_token
    texts = [row["query"] for row in scenes.rows("train", "triplet", options.texts)]
    runs = {
        "sentence-transformers": lambda: theirs.encode(texts, batch_size=32),
        "ours": lambda: ours.encode(texts, "none"),
    }
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            used = time.process_time()
            run()
            if repeat:
                cpu[name].append(len(texts) / (time.process_time() - used))
    for name, values in cpu.items():
        low, high, middle = min(values), max(values), statistics.median(values)
        print(f"{name:>22}: {middle:.1f} texts per processor second ({low:.1f} to {high:.1f})")
    ratio = statistics.median(cpu["ours"]) / statistics.median(cpu["sentence-transformers"])
    print(f"ours / sentence-transformers: {ratio:.2f}")
    return {"texts_per_processor_second": cpu, "ratio": ratio}


# -- memory ---------------------------------


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = folder / "model"
    settings = EncoderSettings(instruction=None, max_text_tokens=128, max_rationale_tokens=8)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    some = [row["query"] for row in scenes.rows("train", "triplet", 2000)]
    encoder.fit_centre(some[:256])
    encoder.save(model)
    peaks = {}
    for count in (options.small, options.large):
        source, output = folder / f"{count}.jsonl", folder / f"{count}.parquet"
        with source.open("w", encoding="utf-8") as lines:
            for i in range(count):
                lines.write(json.dumps({"text": f"{some[i % len(some)]} {i}"}) + "\n")
        command = [sys.executable, "-m", "grace_rl", "embed", str(model)]
        process = subprocess.Popen([*command, "--input", str(source), "--output", str(output)])
        started = time.perf_counter()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"embed failed: {status}")
        seconds = time.perf_counter() - started
        peaks[count] = usage.ru_maxrss / 1024
        print(f"{count:>9,} texts: peak {peaks[count]:.0f} MiB, {seconds:.0f} s")
    ratio = peaks[options.large] / peaks[options.small]
    print(f"peak of {options.large:,} to peak of {options.small:,} texts: {ratio:.3f}")
    return {"peak_mib": peaks, "ratio": ratio}


WHAT = {"speed": speed, "documents": documents, "memory": memory}

if __name__ == "__main__":
    main()
