"""The judge against a real local endpoint that can misbehave."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grace_rl.reward import RewardError, RewardRuntime, RewardSpec, load_rewards
from grace_rl.reward.example import example_batch

pytest.importorskip("openai", reason="the judge needs the extra grace-rl[judge]")


class Endpoint:
    """Grades a rationale by its first number; `faults` HTTP codes are answered first."""

    def __init__(self):
        self.faults: list[int] = []
        self.meeting: threading.Barrier | None = None  # so many calls wait for each other
        self.answers = threading.Event()  # before it, nothing is answered
        self.answers.set()
        self.bodies: list[dict] = []
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.bodies.append(body)
                    endpoint.busy += 1
                    endpoint.busiest = max(endpoint.busiest, endpoint.busy)
                    fault = endpoint.faults.pop(0) if endpoint.faults else 0
                if endpoint.meeting is not None:
                    endpoint.meeting.wait()
                endpoint.answers.wait()
                with endpoint._lock:
                    endpoint.busy -= 1
                note = body["messages"][-1]["content"].partition("Note:\n")[2]
                code = fault or (400 if "refused" in note else 200)
                content = "no idea" if "empty" in note else f"I say {note.split()[0]}."
                message = {"role": "assistant", "content": content}
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
                }
                data = json.dumps(answer if code == 200 else {"error": {"message": "x"}}).encode()
                try:
                    self.send_response(code)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except BrokenPipeError:
                    pass  # the client had no more patience

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def judged(endpoint, rationales, on_error="raise", **keywords):
    spec = RewardSpec(
        "judge", on_error=on_error, keywords={"model": "m", "base_url": endpoint.url, **keywords}
    )
    rewards = load_rewards([spec], ".")
    batch = example_batch(
        [{"text": [[1, 0]] * len(rationales)}], trained=["text"], rationales=rationales
    )
    return RewardRuntime(rewards).score(batch), rewards[0].function


def test_grades_become_values_and_an_answer_without_a_number_is_not_scored(endpoint):
    scored, _ = judged(endpoint, ["7 words", "10 words", "99 words", "empty"])
    values = scored.values[:, 0]
    assert values[:3].tolist() == pytest.approx([0.7, 1.0, 1.0]) and values[3].isnan()
    assert {body["model"] for body in endpoint.bodies} == {"m"}


def test_equal_rationales_are_asked_and_paid_once(endpoint):
    scored, judge = judged(endpoint, ["3 a", "3 a", "4 b"], price_per_million=[1.0, 10.0])
    assert len(endpoint.bodies) == 2
    assert judge.spent == pytest.approx(2 * (100 * 1.0 + 10 * 10.0) / 1e6)
    assert scored.values[:, 0].tolist() == pytest.approx([0.3, 0.3, 0.4])
    assert scored.components["judge/prompt_tokens"].tolist() == [100, 0, 100]


def test_no_more_calls_at_a_time_than_asked(endpoint):
    endpoint.meeting = threading.Barrier(3)
    judged(endpoint, [f"{i} note" for i in range(12)], concurrency=3)
    assert endpoint.busiest == 3


def test_passing_faults_are_tried_again(endpoint):
    endpoint.faults = [503, 429]
    scored, _ = judged(endpoint, ["7 words"], retries=3)
    assert scored.values[0, 0] == pytest.approx(0.7) and len(endpoint.bodies) == 3


def test_a_slow_judge_is_given_up_after_the_time_limit(endpoint):
    endpoint.answers.clear()
    with pytest.raises(RewardError, match="1 of 1 calls to .* failed; the first: APITimeoutError"):
        judged(endpoint, ["7 words"], call_timeout=0.1, retries=0)
    endpoint.answers.set()


def test_a_failed_call_ends_the_run_or_abstains_as_asked(endpoint):
    rationales = ["7 words", "refused"]
    with pytest.raises(RewardError, match="the reward 'judge' failed .* 1 of 2 calls"):
        judged(endpoint, rationales)
    scored, _ = judged(endpoint, rationales, skip_failures=True)
    assert scored.values[0, 0] == pytest.approx(0.7) and scored.values[1, 0].isnan()
    assert scored.components["judge/failed"].tolist() == [0, 1]
    with pytest.warns(UserWarning, match="it abstains"):
        scored, _ = judged(endpoint, rationales, on_error="abstain")
    assert scored.values.isnan().all()


def test_calls_beside_a_failed_one_are_counted_in_the_cost(endpoint):
    prices, rationales = {"price_per_million": [1.0, 1.0]}, ["7 words", "refused"]
    with pytest.warns(UserWarning, match="it abstains"):
        _, judge = judged(endpoint, rationales, on_error="abstain", **prices)
    assert judge.spent == pytest.approx(110e-6)


def test_every_call_failing_is_an_error_even_when_failures_are_skipped(endpoint):
    with pytest.raises(RewardError, match="2 of 2 calls"):
        judged(endpoint, ["refused", "refused too"], skip_failures=True)


def test_spending_stops_at_the_limit(endpoint):
    _, judge = judged(endpoint, ["7 a"], price_per_million=[1.0, 1.0], max_cost=1e-6)
    rewards = load_rewards([judge], ".")
    batch = example_batch([{"text": [[1, 0]]}], trained=["text"], rationales=["8 b"])
    with pytest.raises(RewardError, match="max_cost is reached"):
        RewardRuntime(rewards).score(batch)


def test_wrong_settings_are_refused_together_and_no_key_is_taken_from_a_recipe(monkeypatch):
    from grace_rl.errors import UserError

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    keywords = {
        "model": "m",
        "base_url": "ftp://x",
        "api_key_variable": "NO_SUCH_KEY",
        "retries": 99,
    }
    with pytest.raises(UserError) as caught:
        load_rewards([RewardSpec("judge", keywords=keywords)], ".")
    message = str(caught.value)
    assert "http://" in message and "NO_SUCH_KEY is not set" in message and "retries" in message
    with pytest.raises(UserError, match="api_key: unknown argument"):
        load_rewards([RewardSpec("judge", keywords={"model": "m", "api_key": "secret"})], ".")
