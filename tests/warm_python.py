"""Python programs that start with torch, TRL and grace-rl imported.

A start of `grace-rl train` costs 15 seconds of CPU time before its first line of work, and tests
start about two hundred. Here one process imports all of it once and forks for each program, which
then runs as any other: a process of its own with its own arguments, environment, signals and end.

`Popen` takes what `subprocess.Popen` takes and is put in its place (conftest.py), in the forks too:
torchrun is real, its workers are forks. A program that is not Python's, or whose imports are what a
test looks at, starts as ever (`cold`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PLACE = "WARM_PYTHON"
"""Environment: where the process that forks listens, or `off`."""
READ = "WARM_PYTHON_READ"
"""Environment: what it has read of the environment when it imported."""
IMPORTED = (
    "grace_rl.cli", "grace_rl.train.run", "grace_rl.train.ppo", "grace_rl.train.sft",
    "grace_rl.train.gircse", "grace_rl.train.infonce", "grace_rl.train.reconstruction",
    "grace_rl.embed.encoder", "deepspeed", "pandas",
    "torch.distributed.elastic.multiprocessing.api",
)  # fmt: skip
MODULES = ("grace_rl", "torch.distributed.run")
READ_AT_IMPORT = ("PYTHON", "HF_", "OMP_", "MKL_", "CUDA_", "LD_", "TOKENIZERS_", "DS_", "VLLM_")
"""Beginnings of variables that libraries read once."""
NOT_READ = ("PYTHONPATH", "PYTHON_EXEC")

cold = subprocess.Popen


def is_program(arguments: list[str]) -> bool:
    """Whether it is a script or a module of Python's, with no option but `-u`."""
    if not arguments or arguments[0] != sys.executable:
        return False
    rest = [a for a in arguments[1:3] if a != "-u"]
    if rest[:1] == ["-m"]:
        return arguments[arguments.index("-m") + 1] in MODULES
    return bool(rest) and rest[0].endswith(".py") and "site-packages" not in rest[0]


def read_at_import(environment: Any) -> dict[str, str]:
    return {
        key: value
        for key, value in environment.items()
        if key.startswith(READ_AT_IMPORT) and key not in NOT_READ
    }


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """As `subprocess.Popen`; the process is a fork where that makes no difference."""

    _answer: socket.socket | None = None

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
        cwd: Any, env: Any, *rest: Any,
    ) -> None:  # fmt: skip
        arguments = [] if isinstance(args, str | bytes) else [os.fspath(a) for a in args]
        environment = dict(os.environ if env is None else env)
        wanted = not (executable or preexec_fn or pass_fds or rest[2]) and is_program(arguments)
        place = os.environ.get(PLACE, "off")
        wanted = wanted and "off" not in (environment.get(PLACE), place)
        if wanted and not place:
            place = start()
        if not wanted or read_at_import(environment) != json.loads(os.environ[READ]):
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
            )
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        order = {
            "arguments": arguments,
            "cwd": os.fspath(cwd) if cwd else os.getcwd(),
            "environment": environment | {key: os.environ[key] for key in (PLACE, READ)},
            "session": bool(rest[14]),
        }
        with open(os.devnull, "rb") as nothing:
            self._answer = socket.socket(socket.AF_UNIX)
            self._answer.connect(place)
            message = json.dumps(order).encode()
            descriptors = [
                nothing.fileno() if p2cread == -1 else p2cread,
                1 if c2pwrite == -1 else c2pwrite,
                2 if errwrite == -1 else errwrite,
            ]
            socket.send_fds(self._answer, [len(message).to_bytes(8, "big")], descriptors)
            self._answer.sendall(message)
        self.pid = int.from_bytes(self._answer.recv(8), "big")
        self._child_created = True
        for own, other in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if own != -1 and other != -1:
                os.close(own)
        if (null := getattr(self, "_devnull", None)) is not None:
            os.close(null)
        self._closed_child_pipe_fds = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """What `os.waitpid` says of a child of one's own, of one that another process forked."""
        if self._answer is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        self._answer.setblocking(wait_flags == 0)
        try:
            status = self._answer.recv(8)
        except BlockingIOError:
            return 0, 0
        self._answer.close()
        self._answer = None
        return self.pid, int.from_bytes(status, "big") if status else signal.SIGKILL

    def _internal_poll(self, _deadstate: Any = None, *others: Any, **more: Any) -> int | None:
        if self._answer is None:
            return super()._internal_poll(_deadstate, *others, **more)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def start() -> str:
    """Start the process that forks, for this process and its children."""
    folder = tempfile.mkdtemp()
    place = os.path.join(folder, "fork")
    ours, its = os.pipe()[::-1]
    os.environ[READ] = json.dumps(read_at_import(os.environ))
    process = cold(
        [sys.executable, __file__, place, str(its)],
        pass_fds=[its], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=folder,
    )  # fmt: skip
    os.close(its)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != b"ready\n":
        assert line, "the process that forks ended"
    os.environ[PLACE] = place
    atexit.register(os.close, ours)
    return place


# -- the process that forks ---------------------------------


def serve(place: str, alive: int) -> dict[str, Any] | None:
    """Fork for each order; returns an order in the child, and None when nobody is left to serve."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    waking, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake)
    selector = selectors.DefaultSelector()
    for readable in (listener, waking, alive):
        selector.register(readable, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    os.write(1, b"ready\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    while True:
        for key, _ in selector.select():
            if key.fileobj == alive:
                return None
            if key.fileobj == waking:
                os.read(waking, 4096)
                while children:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    with contextlib.suppress(OSError), children.pop(pid) as asked:
                        asked.sendall(status.to_bytes(8, "big"))
                continue
            asked, _ = listener.accept()
            length, descriptors, _, _ = socket.recv_fds(asked, 8, 3)
            message = b""
            while len(message) < int.from_bytes(length, "big"):
                message += asked.recv(1 << 20)
            if not (pid := os.fork()):
                for i, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, i)
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                selector.close()
                for held in (*children.values(), listener, asked):
                    held.close()
                for number in (waking, wake, alive, null, *descriptors):
                    os.close(number)
                return dict(json.loads(message))
            for descriptor in descriptors:
                os.close(descriptor)
            children[pid] = asked
            asked.sendall(pid.to_bytes(8, "big"))


def become(order: dict[str, Any]) -> None:
    """Run the program of an order as Python's own start does."""
    if order["session"]:
        os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    atexit.register(gc.unfreeze)  # some libraries count what is left at the end
    random.seed()
    subprocess.Popen = Popen  # type: ignore[misc]
    sys.orig_argv = arguments = order["arguments"]
    rest = arguments[1:]
    unbuffered = rest[0] == "-u"
    rest = rest[unbuffered:]
    # Those of the start know what they were opened on.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=unbuffered)
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    del sys.path[0]
    sys.path[:0] = more
    if rest[0] == "-m":
        sys.argv = rest[1:]
        sys.path.insert(0, order["cwd"])
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, str(Path(rest[0]).resolve().parent))
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):
            __import__(name)
    sys.modules["warm_python"] = sys.modules["__main__"]
    gc.collect()
    gc.freeze()  # no child looks through all this for garbage, or copies its pages
    if order := serve(sys.argv[1], int(sys.argv[2])):
        become(order)
    else:
        os._exit(0)
