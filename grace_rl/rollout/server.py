"""A vLLM server beside the training: where it is, what it is, and what is wrong with it.

What keeps a run going while its server is lost is `grace_rl.rollout.kept_server`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from grace_rl.errors import UserError

ANSWER = 10.0  # seconds for what a live server answers at once


@dataclass(frozen=True)
class ServerState:
    """What a server says of itself.

    Attributes:
        version: vLLM's.
        models: Names of what it serves, the path or hub id among them.
        weight_version: The mark of its weights: `default` as loaded; None where it has none.
        max_length: Longest prompt and rationale together, in tokens; None where it does not say.
        pushable: Whether weights can be pushed into it; None where it does not say.
        logprobs_mode: vLLM's; training needs `processed_logprobs`.
    """

    version: str
    models: tuple[str, ...]
    weight_version: str | None
    max_length: int | None
    pushable: bool | None
    logprobs_mode: str | None


def server_url(args: Any) -> str:
    """Where a trainer's config says that the server is."""
    if args.vllm_server_base_url:
        return str(args.vllm_server_base_url).rstrip("/")
    host = "127.0.0.1" if args.vllm_server_host == "0.0.0.0" else args.vllm_server_host
    return f"http://{host}:{args.vllm_server_port}"


def ask_server(url: str) -> ServerState:
    """Ask a server what it is and what it serves.

    Raises:
        requests.RequestException, ValueError, KeyError, TypeError: It cannot be reached, or what
            answers is no vLLM.
    """
    models = get(url, "/v1/models")["data"]
    names = [str(model[key]) for model in models for key in ("id", "root") if model.get(key)]
    lengths = [model["max_model_len"] for model in models if model.get("max_model_len")]
    info = get(url, "/server_info?config_format=json", optional=True)
    config = {} if info is None else info["vllm_config"]
    return ServerState(
        version=str(get(url, "/version")["version"]),
        models=tuple(dict.fromkeys(names)),
        weight_version=weight_version(url),
        max_length=min(lengths, default=None),
        pushable=bool(config["weight_transfer_config"]) if config else None,
        logprobs_mode=config["model_config"]["logprobs_mode"] if config else None,
    )


def server_problems(
    url: str, model: str, tokens: int = 0, versions: Sequence[str] = ("0.31",)
) -> list[str]:
    """What is wrong with a server for a policy, each with what to do.

    Args:
        url: Such as `http://127.0.0.1:8000`.
        model: The policy's path or hub id.
        tokens: The longest text and rationale together.
        versions: Minor versions of vLLM that were tested.
    """
    try:
        state = ask_server(url)
    except (requests.ConnectionError, requests.Timeout) as error:
        return [
            f"no vLLM server answers at {url} ({reason_of(error)}); start it with: "
            f"grace-rl serve {model}"
        ]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return [f"what answers at {url} is no vLLM server; is the port right?"]
    problems = []
    if not any(_same_model(model, name) for name in state.models):
        problems.append(
            f"the server at {url} serves {state.models[0] if state.models else 'nothing'}, and the "
            f"policy is {model}; start it with: grace-rl serve {model} (where it knows the same "
            f"model by another path: add --served-model-name {model})"
        )
    if state.pushable is None or not state.pushable:
        missing = "has no weight transfer" if state.pushable is False else "hides /server_info"
        problems.append(
            f"the server at {url} {missing}, so it could never get the trained weights; "
            f"start it with: grace-rl serve {model}"
        )
    if state.logprobs_mode not in (None, "processed_logprobs"):
        problems.append(
            f"the server at {url} gives {state.logprobs_mode}; start it with: "
            f"grace-rl serve {model}, which sets --logprobs-mode processed_logprobs"
        )
    if state.max_length is not None and state.max_length < tokens:
        problems.append(
            f"the server at {url} takes {state.max_length} tokens, and a text (max_text_tokens) "
            f"with its rationale (max_completion_length) may have {tokens} and more; start it "
            "with a larger --max_model_len"
        )
    if not any(f"{state.version}.".startswith(f"{minor}.") for minor in versions):
        problems.append(
            f"the server at {url} runs vLLM {state.version}; tested is {', '.join(versions)}"
        )
    return problems


def require_server(args: Any, model: str) -> None:
    """Before training in server mode: wait for the server, then look at it.

    Args:
        args: The trainer's config, with `use_vllm` and `vllm_mode: server`.
        model: The policy's path or hub id.

    Raises:
        UserError: It does not answer within `vllm_server_timeout` seconds, or is not what the
            policy needs; or there is no GPU for the push.
    """
    url, tokens = server_url(args), args.max_text_tokens + args.max_completion_length
    problems = []
    if not _can_push(args.device):
        problems.append(
            "vllm_mode: server pushes weights over NCCL, which needs a GPU; use colocate"
        )
    end = time.monotonic() + args.vllm_server_timeout
    found = server_problems(url, model, tokens)
    while found and found[0].startswith("no vLLM server answers") and time.monotonic() < end:
        time.sleep(min(2.0, max(0.0, end - time.monotonic())))
        found = server_problems(url, model, tokens)
    problems += [f"vllm_mode: {problem}" for problem in found]
    if args.world_size > 1 and args.vllm_server_retry_timeout * 2 > args.ddp_timeout:
        problems.append(
            f"vllm_server_retry_timeout: {args.vllm_server_retry_timeout:g} s is more than half of "
            f"ddp_timeout ({args.ddp_timeout} s), at which the waiting processes end the run"
        )
    if problems:
        raise UserError(problems)


def _can_push(device: torch.device) -> bool:
    return device.type == "cuda"


def get(url: str, path: str, *, plain: bool = False, optional: bool = False) -> Any:
    """What a server answers: as JSON, unless `plain`; None for an `optional` path it lacks."""
    answer = requests.get(url + path, timeout=ANSWER)
    if optional and answer.status_code == 404:
        return None
    answer.raise_for_status()
    return None if plain else answer.json()


def weight_version(url: str) -> str | None:
    """The mark of a server's weights; None where it has no such endpoint."""
    answer = get(url, "/weight_info", optional=True)
    return None if answer is None else str(answer["weight_version"])


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def reason_of(error: BaseException) -> str:
    """Why a request failed, in a few words."""
    text = " ".join(str(error).split())
    for known, words in (
        ("Connection refused", "connection refused"),
        ("timed out", "no answer in time"),
        ("Name or service not known", "unknown host"),
        ("RemoteDisconnected", "it hung up"),
        ("Connection aborted", "it hung up"),
    ):
        if known in text:
            return words
    return text[:200] or type(error).__name__
