"""A run directory is data: whatever it names is neither imported, built nor unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grace_rl.cli import main
from grace_rl.data.scenes import COLD_START
from grace_rl.errors import UserError
from grace_rl.inspect import Run
from grace_rl.inspect.checkpoints import Checkpoint, checkpoints
from grace_rl.inspect.safety import check_model
from grace_rl.run.checkpoints import mark_complete


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "unpickled")


def weights(folder: Path) -> Path:
    """A real model, whole."""
    shutil.copytree(COLD_START, folder)
    return folder


def pickled(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))


def module(folder: Path, kind: str) -> None:
    parts = [{"idx": 0, "name": "0", "path": "", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(parts))


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


PLANTS = {
    "module": lambda folder, mark: module(folder, "subprocess.Popen"),
    "file": lambda folder, mark: module(folder, "evil.Evil"),
    "code": lambda folder, mark: changed(
        folder, "config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}
    ),
    "tokenizer": lambda folder, mark: changed(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    ),
    "adapter": lambda folder, mark: changed(
        folder, "adapter_config.json", auto_mapping={"parent_library": "evil"}
    ),
    "pickle": pickled,
}


@pytest.fixture
def planted(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run with a trap in every file that can hold one; leaving it checks that none sprang."""
    mark = tmp_path / "mark"
    evil = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\nclass Evil: ...\n"
    monkeypatch.chdir(tmp_path)
    rewards = "".join(
        f"  - {{name: '{name}', args: ['touch', '{mark}'], label: '{label}'}}\n"
        for label, name in {
            "a": "subprocess:Popen",
            "b": f"{run_folder}/evil.py:Evil",
            "c": "evil.py:Evil",
            "d": "evil:Evil",
        }.items()
    )
    (run_folder / "recipe.yaml").write_text(
        f"method: grpo\nmodel_name_or_path: {run_folder}/start\nrewards:\n{rewards}"
        f"dataset_name: {run_folder}/rows.py\nfalse_negatives: {{guide: 'evil:Evil'}}\n"
    )
    line = {"text": "evil.py:Evil", "steps": [{"words": [["subprocess:Popen", 1.0]]}], "step": 1}
    (run_folder / "soft_tokens.jsonl").write_text(json.dumps(line) + "\n")
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "seconds": 9, "reward": "!!python/object/apply:os.system"}\n')
    (run_folder / "evaluation.json").write_text('{"rows": ["evil.py:Evil"], "model": "evil.py"}')
    (run_folder / "environment.json").write_text('{"code": "evil.py:Evil"}')
    (run_folder / "replays").mkdir()
    (run_folder / "replays" / "evil.parquet").write_bytes(pickle.dumps(Bomb(mark)))
    (run_folder / "rollouts" / "step-000002.parquet").write_bytes(pickle.dumps(Bomb(mark)))
    places = [run_folder / "model", run_folder / "start"]
    places += [run_folder / "checkpoints" / f"checkpoint-{i}" for i in range(1, len(PLANTS) + 1)]
    plants = [*PLANTS.values(), PLANTS["module"], PLANTS["code"]]
    for folder, plant in zip(places, plants, strict=True):
        plant(weights(folder), mark)
        changed(folder, "grace.json", reader={"span": "bottleneck", "weights": "evil"})
        for name in ("evil.py", "optimizer.pt", "trainer_state.json"):
            (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
        (folder / "evil.py").write_text(evil)
        mark_complete(folder)
    for place in (run_folder, tmp_path):
        (place / "evil.py").write_text(evil)
    yield run_folder
    assert not mark.exists()


def test_the_terminal_and_the_file_execute_nothing(planted: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--groups"], ["--step", "1", "--row", "0"], ["--step", "1"]):
        assert main(["inspect", str(planted), "--terminal", *arguments]) == 0
    assert main(["inspect", str(planted), "--html", str(tmp_path / "report.html")]) == 0


def test_no_view_and_no_table_executes_anything(planted: Path) -> None:
    """Every address of the page: a page, a table or a line that says why not, and no model."""
    testing = pytest.importorskip("starlette.testclient", reason="needs grace-rl[inspect]")
    pytest.importorskip("httpx", reason="the test client needs it")
    from grace_rl.inspect.page.answers import STREAMS, TABLES
    from grace_rl.inspect.page.server import HEADINGS, app
    from grace_rl.inspect.page.site import CSV

    client = testing.TestClient(app([Run(planted)]))
    names = checkpoints(Run(planted))
    assert len(names) == len(PLANTS) + 2
    asked = "run=written&step=1&row=0&group=0&text=a+red+fox+runs&name=evil&path=evil.py"
    paths = [*HEADINGS, "/group", "/rollout", "/stamp"]
    paths += [f"/csv/{name}" for name in (*CSV, *TABLES)] + [f"/stream/{name}" for name in STREAMS]
    for path in paths:
        answer = client.get(f"{path}?{asked}")
        assert answer.status_code in (200, 404), path
    for name in names:
        for path in ("/stream/try", "/csv/try"):
            answer = client.get(f"{path}?of=written:{name}&text=x")
            assert "not loaded" in answer.text, (name, answer.text)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_folder_that_names_code_is_refused_before_it_is_loaded(
    plant: str, run_folder: Path, tmp_path: Path
) -> None:
    folder = weights(run_folder / "model")
    PLANTS[plant](folder, tmp_path / "mark")
    with pytest.raises(UserError, match="not loaded"):
        Checkpoint(Run(run_folder), "model")


def test_what_a_model_leads_to_is_looked_at_too(tmp_path: Path) -> None:
    """The base of an adapter and a frozen reader; two that name each other end."""
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    changed(first, "adapter_config.json", base_model_name_or_path=str(second))
    changed(second, "grace.json", reader={"weights": str(first)})
    check_model(first)
    pickled(second, tmp_path / "mark")
    with pytest.raises(UserError, match="second: weights must be safetensors"):
        check_model(first)
