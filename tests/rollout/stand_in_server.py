"""What a vLLM server looks like over HTTP, with faults on demand.

The answers have the form of vLLM 0.31's. Rationales are random tokens. Weights go nowhere: that
path is NCCL's.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 1  # the end token of scenes


class StandInServer:
    """Listens on a port of its own, from `start` to `stop`.

    Attributes:
        faults: What happens to the next requests for rationales, one each: `drop` (hang up), `500`,
            `400`, `garbage` (no JSON), `short` (a rationale too few), `html`, or seconds to wait.
        calls: How often each path was asked for.
        weight_version: As `/weight_info` says; None: it has no such endpoint.
    """

    def __init__(self, model: str, max_length: int = 512) -> None:
        self.model, self.max_length = model, max_length
        self.version = "0.31.0"
        self.weight_version: str | None = "default"
        self.pushable = True
        self.logprobs_mode = "processed_logprobs"
        self.faults: list[str | float] = []
        self.calls: Counter[str] = Counter()
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        outer = self

        class Handler(_Handler):
            standing_in = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def restart_after(self, seconds: float) -> None:
        """Come back with the weights of the start, as a restarted server does."""

        def come_back() -> None:
            time.sleep(seconds)
            self.weight_version = "default"
            self.start()

        threading.Thread(target=come_back, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    standing_in: StandInServer

    def do_GET(self) -> None:
        server = self.standing_in
        path = self.path.partition("?")[0]
        server.calls[path] += 1
        answers: dict[str, Any] = {
            "/health": {},
            "/version": {"version": server.version},
            "/v1/models": {
                "data": [
                    {"id": server.model, "root": server.model, "max_model_len": server.max_length}
                ]
            },
            "/server_info": {
                "vllm_config": {
                    "model_config": {"logprobs_mode": server.logprobs_mode},
                    "weight_transfer_config": {"backend": "nccl"} if server.pushable else None,
                }
            },
            "/get_world_size": {"world_size": 1},
        }
        if server.weight_version is not None:
            answers["/weight_info"] = {"weight_version": server.weight_version}
        self._answer(answers.get(path))

    def do_POST(self) -> None:
        server = self.standing_in
        server.calls[self.path] += 1
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(content) if content else {}
        if self.path == "/v1/completions":
            self._write_rationales(asked)
        elif self.path == "/update_weight_version":
            if server.weight_version is None:
                self._answer(None)
                return
            server.weight_version = asked["new_version"]
            self._answer({"success": True})
        else:
            self._answer({"success": True})

    def _write_rationales(self, asked: dict[str, Any]) -> None:
        fault = self.standing_in.faults.pop(0) if self.standing_in.faults else None
        if fault == "drop":
            self.connection.close()
            return
        if fault in ("400", "500"):
            self._answer({"error": "on purpose"}, int(fault))
            return
        if fault in ("garbage", "html"):
            self._answer("<html>a proxy says hello</html>" if fault == "html" else "{{{")
            return
        if isinstance(fault, float):
            time.sleep(fault)
        choices = []
        for prompt in asked["prompt"]:
            for _ in range(asked["n"]):
                ids = [random.randrange(5, 60) for _ in range(random.randrange(2, 8))] + [END]
                ids = ids[: asked["max_tokens"]]
                choices.append(
                    {
                        "prompt_token_ids": prompt,
                        "token_ids": ids,
                        "logprobs": {
                            "tokens": [f"token_id:{i}" for i in ids],
                            "token_logprobs": [-2.0] * len(ids),
                            "top_logprobs": [{f"token_id:{i}": -2.0} for i in ids],
                        },
                    }
                )
        self._answer({"choices": choices[:-1] if fault == "short" else choices})

    def _answer(self, content: Any, status: int = 200) -> None:
        body = content if isinstance(content, str) else json.dumps(content)
        self.send_response(404 if content is None else status)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        with suppress(OSError):  # who asked may have given up
            self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def without_nccl(patch: Any) -> Iterator[None]:
    """Let TRL's client push its weights nowhere: everything around NCCL stays as it is."""
    from types import SimpleNamespace

    from trl.generation import vllm_client

    from grace_rl.rollout import engines, server

    engines._give_trl_vllm()  # before the patches: it loads TRL's modules once more

    def join(client: Any, device: Any = 0) -> None:
        client._post(f"{client.base_url}/init_weight_transfer_engine", json={"init_info": {}})
        client.communicator = SimpleNamespace(group=SimpleNamespace())

    def broadcast(iterator: Any, **_: Any) -> None:
        for _named in iterator:
            pass

    patch.setattr(vllm_client.VLLMClient, "init_communicator", join)
    patch.setattr(vllm_client, "packed_nccl_broadcast_producer", broadcast, raising=False)
    patch.setattr(server, "_can_push", lambda device: True)
    yield
