"""A vLLM server beside the training, kept or replaced while it runs.

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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import requests
from accelerate.utils import broadcast_object_list
from requests.adapters import HTTPAdapter
from rich.console import Console

from grace_rl.errors import UserError
from grace_rl.rollout.server import ANSWER, ask_server, get, reason_of, weight_version
from grace_rl.run.screen import Screen

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
        self._caught(lambda: get(self.url, "/health", plain=True))
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
        words = [_in_words(fault) if self.main and fault is not None else None]
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
                get(self.url, "/health", plain=True)
                served = ask_server(self.url).models
                if self.client.model not in served:
                    continue  # somebody started another one: it may go away again
                mark = weight_version(self.url)
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
            mark = weight_version(self.url)
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


def _in_words(error: BaseException) -> str:
    return f"refused: it {error}" if isinstance(error, _Refused) else reason_of(error)
