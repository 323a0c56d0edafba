"""Looks at a policy without its weights: will it write, be read and be trained as told?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from grace_rl.embed.hidden_states import decoder_blocks, decoder_stack, layer_numbers
from grace_rl.errors import Finding, UserError
from grace_rl.launch.subject import Subject
from grace_rl.recipe.schema import nearest
from grace_rl.rollout.generator import end_token

EXTENSIONS = ("jinja2.ext.loopcontrols",)  # as transformers renders templates
WAYS = {"date": "today's date", "chance": "chance"}


def ending(subject: Subject) -> Iterator[Finding]:
    """What is written must be able to end."""
    if subject.prompts and subject.policy is not None:
        end_token(subject.policy.tokenizer)
    yield from ()


def template(subject: Subject) -> Iterator[Finding]:
    """The prompt must be the same tomorrow."""
    found = [way for prompt in subject.prompts.values() for way in prompt.changes_with()]
    if changing := list(dict.fromkeys(found)):
        ways = " and ".join(WAYS[way] for way in changing)
        yield Finding(
            "template",
            f"the chat template prints {ways}; what it gives at the start is kept with the model",
            "warning",
            ["chat_template_kwargs that fix it, such as {date_string: 1 Jan 2026}"],
        )


def template_arguments(subject: Subject) -> Iterator[Finding]:
    """The template must read what it is given."""
    given = getattr(subject.args, "chat_template_kwargs", None)
    if not given or subject.policy is None:
        return
    source = subject.policy.tokenizer.chat_template
    if not isinstance(source, str):
        yield _wrong("chat_template_kwargs", "the tokenizer has no chat template", "leave it out")
        return
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)  # transformers' own tag
    try:
        read = find_undeclared_variables(Environment(extensions=EXTENSIONS).parse(source))
    except TemplateSyntaxError:  # told where it is rendered
        return
    for name in given:
        if name not in read:
            found = f"the chat template does not read {name}{nearest(name, read)}"
            yield _wrong("chat_template_kwargs", found, "leave it out")


def revision(subject: Subject) -> Iterator[Finding]:
    """A folder has no revisions."""
    if subject.recipe.model.get("model_revision") is not None and Path(subject.place).is_dir():
        found = f"{subject.place} is a folder, which has no revisions"
        yield _wrong("model_revision", found, "leave it out")


def reader_layers(subject: Subject) -> Iterator[Finding]:
    """The reader's layers must be there."""
    reader = subject.reader
    if subject.policy is None:
        return
    blocks = decoder_blocks(decoder_stack(subject.policy.model))
    if reader is not None and reader.reads_with_language_model and reader.layers is not None:
        layer_numbers(reader.layers, len(blocks))
    yield from ()


def lengths(subject: Subject) -> Iterator[Finding]:
    """Prompt and rationale must fit into what the engine and the model can hold."""
    args = subject.args
    if not subject.prompts or not hasattr(args, "max_completion_length"):
        return
    around = max(len(prompt.render("a").token_ids) - 1 for prompt in subject.prompts.values())
    whole = around + subject.text_tokens + args.max_completion_length
    words = (
        f"the longest text has {subject.text_tokens} tokens, the prompt around it {around}, and "
        f"max_completion_length is {args.max_completion_length}: {whole}"
    )
    engine = getattr(args, "vllm_max_model_length", None) if args.use_vllm else None
    if engine is not None and whole > engine:
        yield _wrong("vllm_max_model_length", f"is {engine}, but {words}", f"give {whole} or more")
    positions = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and whole > positions:
        yield _wrong(
            "max_completion_length",
            f"the model has {positions} positions, but {words}",
            "give a smaller max_completion_length or max_text_tokens",
        )


def adapter(subject: Subject) -> Iterator[Finding]:
    """Every name of LoRA's must be a module of the model; PEFT passes over those that are not."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model = subject.recipe.model
    if not model.get("use_peft") or subject.policy is None:
        return
    modules = [name for name, _ in subject.policy.model.named_modules() if name]
    kind = subject.config.model_type
    given = model.get("lora_target_modules")
    if given is None and model.get("lora_target_parameters") is None and kind not in DEFAULTS:
        yield _wrong(
            "lora_target_modules",
            f"is needed: PEFT has no default for {kind}",
            f"give all-linear, or names of its layers: {', '.join(_linear(subject))}",
        )
    for key in ("lora_target_modules", "lora_modules_to_save"):
        for name in _names(model.get(key)):
            if name != "all-linear" and not _is_there(name, modules):
                last = {module.rpartition(".")[2] for module in modules}
                near = difflib.get_close_matches(name, sorted(last), n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]}?" if near else ""
                found = f"the model has no module {name}{hint}"
                yield _wrong(key, found, f"its linear layers are {', '.join(_linear(subject))}")


def _names(given: Any) -> Sequence[str]:
    return [given] if isinstance(given, str) else given or []


def _is_there(name: str, modules: Sequence[str]) -> bool:
    try:
        pattern = re.compile(name)
    except re.error:
        pattern = re.compile(re.escape(name))
    return any(
        module == name or module.endswith(f".{name}") or pattern.fullmatch(module)
        for module in modules
    )


def _linear(subject: Subject) -> list[str]:
    """Last names of the linear layers below the head."""
    if subject.policy is None:
        raise RuntimeError("subject.policy must be there")
    kinds = ("Linear", "Conv1D")
    stack = decoder_stack(subject.policy.model)
    names = [n for n, module in stack.named_modules() if type(module).__name__ in kinds]
    return sorted({name.rpartition(".")[2] for name in names})


def hardware(subject: Subject) -> Iterator[Finding]:
    """What runs on a GPU only."""
    if subject.machine.gpus:
        return
    model = subject.recipe.model
    for key in ("load_in_8bit", "load_in_4bit"):
        if model.get(key):
            yield _wrong(key, "needs a GPU, and none is used", "leave it out, dtype: bfloat16")
    attention = str(model.get("attn_implementation") or "")
    if "flash" in attention:
        found = f"{attention} needs a GPU, and none is used"
        yield _wrong("attn_implementation", found, "give sdpa")


def folder(subject: Subject) -> Iterator[Finding]:
    """The model's folder must be whole, and a language model where one is needed."""
    if subject.policy is not None and subject.policy.config.is_encoder_decoder:
        raise UserError(f"{subject.place}: has an encoder; give a decoder alone")
    yield from ()


def _wrong(key: str, found: str, advice: str) -> Finding:
    return Finding(key, f"{found}; {advice}", "problem", [f"{key}: {advice}"])


LOOKS = (
    folder,
    revision,
    ending,
    template,
    template_arguments,
    reader_layers,
    lengths,
    adapter,
    hardware,
)
