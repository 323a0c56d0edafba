"""A vLLM server beside the training: looked at before it starts, kept or replaced while it runs.

TRL's client gives up after about a minute, on the main process alone, while the others wait in a
collective. Here every request is an attempt whose outcome all processes learn. After a fault they
wait together, with growing pauses, until the server answers; if it has lost the weights (a restart,
or another run's push) it gets them again before it writes another rationale; and if it does not
come back in time, all of them raise `ServerLost` at the same place, so that a checkpoint can be
saved.

Each push marks the server's weights with a version of this run (vLLM 0.31's `/weight_info`), and
every batch of rationales is preceded by a look at it: rationales from stale weights would train on,
silently. Servers without that endpoint are watched less well: after any fault the weights are
pushed again.

What only GPUs have is TRL's: the weights travel over NCCL. A server that dies in the middle of a
push blocks there until NCCL gives up.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from accelerate.utils import broadcast_object_list
from requests.adapters import HTTPAdapter
from rich.console import Console

from grace_rl.errors import UserError
from grace_rl.run.screen import Screen

ANSWER = 10.0  # seconds for what a live server answers at once
LONGEST_PAUSE = 30.0
THEFTS = 3
NOTHING: dict[str, list[Any]] = {
    "prompt_ids": [],
    "completion_ids": [],
    "logprobs": [],
    "logprob_token_ids": [],
}


class ServerLost(RuntimeError):
    """The server did not come back in time; raised on every process at once."""


class _Refused(Exception):
    """The server lives and says no: trying again would change nothing."""


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
    models = _get(url, "/v1/models")["data"]
    names = [str(model[key]) for model in models for key in ("id", "root") if model.get(key)]
    lengths = [model["max_model_len"] for model in models if model.get("max_model_len")]
    info = _get(url, "/server_info?config_format=json", optional=True)
    config = {} if info is None else info["vllm_config"]
    return ServerState(
        version=str(_get(url, "/version")["version"]),
        models=tuple(dict.fromkeys(names)),
        weight_version=_weight_version(url),
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
            f"no vLLM server answers at {url} ({_reason(error)}); start it with: "
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


def keep_server(generation: Any, patience: float, console: Console | None = None) -> None:
    """Make a trainer's server mode survive a server that is lost for a while.

    Args:
        generation: TRL's `VLLMGeneration` in server mode; its `generate` and `sync_weights` are
            replaced.
        patience: Seconds without a good answer after which `ServerLost` is raised; also how long a
            request may take.
        console: Where the main process says what happens.
    """
    _KeptServer(generation, patience, console or Screen())


class _KeptServer:
    def __init__(self, generation: Any, patience: float, console: Console) -> None:
        self.generation, self.patience, self.console = generation, patience, console
        self.main = generation.accelerator.is_main_process
        self.run = f"grace-rl-{uuid.uuid4().hex[:12]}"
        self.pushed = 0
        self.thefts = 0
        self.fault: BaseException | None = None  # of the attempt under way; main process only
        self._generate, self._sync = generation.generate, generation.sync_weights
        generation.generate, generation.sync_weights = self.generate, self.sync_weights
        if not self.main:
            return
        client = self.client = generation.vllm_client
        for scheme in ("http://", "https://"):  # one place that tries again, and it is here
            client.session.mount(scheme, HTTPAdapter(max_retries=0, pool_maxsize=64))
        client.session.request = functools.partial(
            client.session.request, timeout=(ANSWER, self.patience)
        )
        client.generate = functools.partial(self._ask, client.generate)
        client.update_named_params = functools.partial(self._push, client.update_named_params)
        client.reset_prefix_cache = functools.partial(self._caught, client.reset_prefix_cache)

    # -- on every process ---------------------------------

    def generate(
        self, prompts: list[Any], images: Any, num_generations: int, profiler: Any = None
    ) -> Any:
        return self._persist(
            lambda: self._generate(prompts, images, num_generations, profiler), again=True
        )

    def sync_weights(self) -> None:
        self._persist(self._push_all, again=False)

    def _push_all(self) -> None:
        """Push the weights; the main process looks first whether anybody would take them."""
        self._caught(lambda: _get(self.url, "/health", plain=True))
        if self._agree(self.fault) is not None:
            return
        self._sync()
        if self.main and self.fault is None:
            self.pushed += 1
            self._caught(self._mark)

    def _persist(self, attempt: Callable[[], Any], again: bool) -> Any:
        """Attempt until it succeeds on the main process.

        Args:
            attempt: A collective action; leaves the main process's error in `fault`.
            again: It needs the weights that were pushed last.
        """
        self.fault = None
        end: float | None = None
        pause = 0.5
        push = False
        while True:
            if push:
                self._caught(self._reconnect)
                if again and self._agree(self.fault) is None:
                    self._push_all()
            result = None
            if self._agree(self.fault) is None:
                result = attempt()
            problem = self._agree(self.fault)
            if problem is None:
                if end is not None:
                    self._say("the vLLM server is back" + (", with new weights" if push else ""))
                return result
            if problem.startswith("refused: "):
                raise UserError(f"the vLLM server {problem}")
            now = time.monotonic()
            if end is None:
                end = now + self.patience
                self._say(f"lost the vLLM server ({problem}); trying again for {self.patience:g} s")
            # Only the main process's clock counts, and only it knows the server.
            verdict = self._wait(end, pause, again) if self.main else None
            state = [verdict]
            broadcast_object_list(state)
            pause = min(2 * pause, LONGEST_PAUSE)
            if state[0] == "lost":
                raise ServerLost(problem)
            push = state[0] == "push"
            self.fault = None

    def _agree(self, fault: BaseException | None) -> str | None:
        """The main process's fault, in words, on every process."""
        words = [_reason(fault) if self.main and fault is not None else None]
        broadcast_object_list(words)
        return words[0]

    # -- on the main process ---------------------------------

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    @property
    def version(self) -> str:
        return f"{self.run}-{self.pushed}"

    def _wait(self, end: float, pause: float, again: bool) -> str:
        """Pause until the server answers: `lost`, `push` the weights first, or just `go` on."""
        while True:
            left = end - time.monotonic()
            if left <= 0:
                return "lost"
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                _get(self.url, "/health", plain=True)
                served = ask_server(self.url).models
                if self.client.model not in served:
                    continue  # somebody started another one: it may go away again
                mark = _weight_version(self.url)
            except (requests.RequestException, ValueError, KeyError, TypeError):
                continue
            return "go" if again and self.pushed and mark == self.version else "push"

    def _reconnect(self) -> None:
        self.client.close_communicator()
        self.client.init_communicator(device=self.generation.accelerator.device)

    def _ask(self, ask: Callable[..., Any], *, prompts: Any, n: int, **more: Any) -> Any:
        """TRL's `generate`, which after a fault returns nothing instead of raising: the other
        processes wait for what it returns."""
        try:
            mark = _weight_version(self.url)
            if self.pushed and mark is not None and mark != self.version:
                self._stolen(mark)
            answer = ask(prompts=prompts, n=n, **more)
            _check_answer(answer, len(prompts), n)
            return answer
        except Exception as error:  # TRL raises Exception itself for a bad status
            self.fault = _permanent(error)
            return NOTHING

    def _stolen(self, mark: str) -> None:
        if mark.startswith("grace-rl-") and not mark.startswith(self.run):
            self.thefts += 1
            if self.thefts >= THEFTS:
                raise _Refused("holds the weights of another run; give each run a server")
        raise RuntimeError(f"it holds other weights, {mark!r}")

    def _push(self, push: Callable[..., Any], metadata: Any, named_params: Iterator[Any]) -> None:
        self._caught(push, metadata, named_params)
        for _ in named_params:  # after a fault: the other processes gather every weight
            pass

    def _mark(self) -> None:
        answer = requests.post(
            f"{self.url}/update_weight_version", json={"new_version": self.version}, timeout=ANSWER
        )
        if answer.status_code != 404:  # vLLM before 0.31
            answer.raise_for_status()

    def _caught(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Do what only the main process does, unless something failed before."""
        if not self.main or self.fault is not None:
            return
        try:
            action(*arguments)
        except Exception as error:
            self.fault = _permanent(error)

    def _say(self, what: str) -> None:
        if self.main:
            self.console.print(what, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _get(url: str, path: str, *, plain: bool = False, optional: bool = False) -> Any:
    answer = requests.get(url + path, timeout=ANSWER)
    if optional and answer.status_code == 404:
        return None
    answer.raise_for_status()
    return None if plain else answer.json()


def _weight_version(url: str) -> str | None:
    answer = _get(url, "/weight_info", optional=True)
    return None if answer is None else str(answer["weight_version"])


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def _check_answer(answer: Mapping[str, Any], prompts: int, n: int) -> None:
    """Raise ValueError unless there are n rationales of token ids for each prompt."""
    written = answer["completion_ids"]
    if len(written) != prompts * n or len(answer["prompt_ids"]) != prompts:
        raise ValueError(f"it wrote {len(written)} rationales and not {prompts * n}")
    if not all(isinstance(ids, list) and ids for ids in written):
        raise ValueError("it wrote rationales without tokens")
    logps = answer["logprobs"]
    if logps is not None and [len(row) for row in logps] != [len(ids) for ids in written]:
        raise ValueError("its log-probabilities do not belong to its tokens")


def _permanent(error: Exception) -> Exception:
    """The error as it is, or as `_Refused` where the server understood and said no."""
    words = str(error)
    no = any(words.startswith(f"Request failed: {status},") for status in (400, 401, 403, 404, 422))
    return _Refused(f"says: {words}") if no else error


def _reason(error: BaseException) -> str:
    if isinstance(error, _Refused):
        return f"refused: it {error}"
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
