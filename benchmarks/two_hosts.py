"""Two hosts as network namespaces of one Linux machine: a training over both, and one that is lost.

    sudo python benchmarks/two_hosts.py [--zero2] [--steps 4]

Starts `accelerate launch` on both with the address of the first, on the CPU over gloo; waits for a
checkpoint; kills all of the second host; waits for the end of the first; starts both again, kills
again; starts the first alone, which DDP allows and ZeRO-2 refuses, and then (ZeRO-2) both once
more. It prints what each ended with. Needs root and the command `ip`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

HOSTS = ("grace-a", "grace-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RECIPE = {
    "method": "grpo",
    "model_name_or_path": "scenes",
    "dataset_name": "scenes",
    "dataset_rows": 32,
    "instruction": None,
    "dtype": "float32",
    "rewards": [{"name": "contrastive"}, {"name": "length"}],
    "roles": {"query": {}, "positive": {}},
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "print_rollouts_steps": 0,
    "ddp_timeout": 120,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
}
PORT = 29500


@contextmanager
def hosts() -> Iterator[None]:
    """Two namespaces with a wire between them; gone afterwards."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for host in HOSTS:
        ip("netns", "add", host)
    try:
        first, second = HOSTS
        wire = f"link add eth0 netns {first} type veth peer eth0 netns {second}"
        ip(*wire.split())
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False)


def config(folder: Path, zero2: bool, machines: int) -> Path:
    """accelerate's file; what recipes/accelerate/multi-node.yaml is with GPUs."""
    values = {
        "compute_environment": "LOCAL_MACHINE",
        # MULTI_CPU would want MPI. What is started is torchrun; the recipe says `use_cpu`.
        "distributed_type": "DEEPSPEED" if zero2 else "MULTI_GPU" if machines > 1 else "NO",
        "num_machines": machines,
        "num_processes": machines,
        "main_process_ip": ADDRESSES[0],
        "main_process_port": PORT,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if zero2:
        values["deepspeed_config"] = {
            "deepspeed_multinode_launcher": "standard",
            "zero_stage": 2,
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
        }
    path = folder / f"accelerate-{machines}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(rank: int, folder: Path, zero2: bool, machines: int) -> subprocess.Popen[bytes]:
    """One host's part of the run; its output goes to a file."""
    launch = ["accelerate.commands.launch", "--config_file", str(config(folder, zero2, machines))]
    launch += ["--machine_rank", str(rank), "-m", "grace_rl"]
    program = [sys.executable, "-m", *launch, "train", str(folder / "recipe.yaml")]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "eth0",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"host-{rank}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", HOSTS[rank], *program],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(event: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    while not event() and all(process.poll() is None for process in processes):
        time.sleep(0.2)


def kill_host(name: str) -> None:
    """Every process of a namespace, as a power cut does."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def report(name: str, folder: Path, processes: list[subprocess.Popen[bytes]], began: float) -> None:
    status = json.loads((folder / "run" / "status.json").read_text())
    codes = [process.wait() for process in processes]
    steps = sorted(path.name for path in (folder / "run" / "checkpoints").glob("checkpoint-*"))
    seconds = time.monotonic() - began
    print(f"{name}: exit codes {codes}, {status}, {steps}, {seconds:.0f} s", flush=True)
    for rank in range(len(processes)):
        log = (folder / f"host-{rank}.log").read_text(errors="replace").strip().splitlines()
        print(*[f"  host {rank}: {line[:200]}" for line in log[-4:]], sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zero2", action="store_true", help="DeepSpeed ZeRO-2 in place of DDP")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="two-hosts-"))
    recipe = RECIPE | {"output_dir": str(folder / "run"), "max_steps": options.steps}
    recipe |= {"use_cpu": not options.zero2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    saved = folder / "run" / "checkpoints"

    def part(name: str, machines: int, until: str | None = None) -> None:
        """Start so many hosts; once the file is there the second one is lost; tell of the end."""
        began = time.monotonic()
        running = [start(rank, folder, options.zero2, machines) for rank in range(machines)]
        if until is not None:
            wait(lambda: any(saved.glob(until)), running)
            kill_host(HOSTS[1])
        running[0].wait()
        for host in HOSTS:
            kill_host(host)
        report(name, folder, running, began)

    with hosts():
        part("one host lost", 2, "checkpoint-*/trainer_state.json")
        part("again with two, lost again", 2, f"checkpoint-{options.steps - 1}/trainer_state.json")
        part("then one alone", 1)
        if options.zero2:
            part("and two to the end", 2)


if __name__ == "__main__":
    main()
