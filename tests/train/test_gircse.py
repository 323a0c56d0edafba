"""Soft-token refinement: its terms against the formula, its batches, and whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl import cli
from grace_rl.data import scenes
from grace_rl.embed.soft_token_encoder import SoftTokenEncoder
from grace_rl.errors import UserError
from grace_rl.recipe import load_recipe
from grace_rl.run.records import read_metrics
from grace_rl.train.gircse import GIRCSETrainer, plan
from grace_rl.train.gircse_config import GIRCSEConfig
from grace_rl.train.gircse_terms import (
    ICRConfig,
    icr_loss,
    regression_penalty,
    step_losses,
)
from grace_rl.train.gircse_words import read_words

# --- terms ---------------------------------------------------------------------------------


def some_vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(seed))


def test_step_losses_are_infonce_at_every_step():
    queries, candidates = some_vectors(4, 0), some_vectors(7, 1)
    positives = torch.tensor([0, 2, 3, 6])
    found = step_losses(queries, candidates, positives, temperature=0.1)
    for i in range(4):
        for k in range(3):
            cosine = normalize(queries[i, k], dim=0) @ normalize(candidates[:, k], dim=-1).T
            scores = (cosine / 0.1).exp()
            assert found[i, k] == pytest.approx(-float((scores[positives[i]] / scores.sum()).log()))


def test_a_masked_candidate_is_as_if_it_were_not_there():
    queries, candidates = some_vectors(3, 0), some_vectors(6, 1)
    positives = torch.arange(3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4] = False
    mask[0, 0] = False  # a positive counts whatever the mask says
    kept = [0, 1, 2, 3, 5]
    fewer = step_losses(queries, candidates[kept], positives)
    assert torch.allclose(step_losses(queries, candidates, positives, mask), fewer)
    half = mask.float()
    half[:, 4] = 0.5  # half a candidate: two of them are one
    twice = step_losses(queries, torch.cat([candidates, candidates[4:5]]), positives)
    doubled = torch.cat([half, half[:, 4:5]], 1)
    again = step_losses(queries, torch.cat([candidates, candidates[4:5]]), positives, doubled)
    assert torch.allclose(again, step_losses(queries, candidates, positives), atol=1e-5)
    assert not torch.allclose(again, twice)


def test_the_penalty_is_the_papers_formula_in_the_papers_preset():
    losses = torch.tensor([[0.4, 0.6, 0.2], [0.6, 0.6, 0.2]], requires_grad=True)
    settings = ICRConfig(preset="paper", weight=0.5)
    means = losses.mean(0)
    expected = torch.relu((means[1:] + 1e-8).log() - (means[:-1] + 1e-8).log()).mean()
    loss, penalty = icr_loss(losses, settings)
    assert torch.allclose(penalty, expected)
    assert torch.allclose(loss, means.sum() + 0.5 * expected)
    # Descent on it raises the earlier loss too.
    assert (torch.autograd.grad(penalty, losses)[0][:, 0] < 0).all()


def test_the_penalty_holds_the_earlier_step_fixed_and_bounds_the_pull():
    losses = torch.tensor([[0.5, 0.6], [1e-4, 1.2e-4], [0.6, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(regression_penalty(losses, floor=0.01), losses)
    assert (gradient[:, 0] == 0).all()
    assert gradient[0, 1] == pytest.approx(1 / 0.61 / 3, rel=1e-4)
    assert 0 < gradient[1, 1] < 1 / 0.01 / 3  # solved already: at most 1 / floor
    assert gradient[2, 1] == 0  # got better


def test_the_weight_and_the_steps_do_something():
    losses = torch.tensor([[1.0, 2.0, 1.5]])
    plain = {
        steps: float(icr_loss(losses, ICRConfig(steps=steps, weight=0.0))[0])
        for steps in ("mean", "sum", "last")
    }
    assert plain == {"mean": 1.5, "sum": 4.5, "last": 1.5}
    penalty = regression_penalty(losses)
    heavy = icr_loss(losses, ICRConfig(weight=3.0))[0]
    assert torch.allclose(heavy, torch.tensor(1.5) + 3 * penalty)


def test_all_mistakes_in_the_objective_are_named_together():
    with pytest.raises(UserError) as error:
        ICRConfig.of(
            {"temperature": 0, "weight": -1, "floor": float("nan"), "steps": "first",
             "preset": ["paper"], "lambda": 1}
        )  # fmt: skip
    keys = {problem.partition(":")[0] for problem in error.value.problems}
    assert keys == {f"icr.{key}" for key in
                    ("temperature", "weight", "floor", "steps", "preset", "lambda")}  # fmt: skip


# --- trainer -------------------------------------------------------------------------------

TRIPLETS = scenes.rows(form="triplet", count=32)


def trainer_for(policy: str, output: Path, rows=TRIPLETS, **given) -> GIRCSETrainer:
    keywords = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "gircse_steps": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "icr": {"temperature": 0.1},
    }
    others = {name: given.pop(name) for name in ("peft_config",) if name in given}
    args = GIRCSEConfig(output_dir=str(output), **keywords | given)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return GIRCSETrainer(model, args, rows, AutoTokenizer.from_pretrained(policy), **others)


def loss_and_gradients(trainer: GIRCSETrainer) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(TRIPLETS[:8]))
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("how", [{"mini_batch_size": 5}, {"gradient_checkpointing": True}])
def test_parts_and_checkpointing_change_neither_loss_nor_gradients(policy, tmp_path, how):
    plain = trainer_for(policy, tmp_path)
    other = trainer_for(policy, tmp_path, **how)
    if "gradient_checkpointing" in how:
        other.model.gradient_checkpointing_enable()
    (loss, gradients), (loss_2, gradients_2) = loss_and_gradients(plain), loss_and_gradients(other)
    assert loss == pytest.approx(loss_2, rel=1e-5)
    assert gradients.keys() == gradients_2.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradients_2[name], gradient, rtol=1e-4, atol=1e-5), name


def test_parts_keep_fewer_activations(policy, tmp_path):
    kept = {}
    for size in (None, 6):
        trainer = trainer_for(policy, tmp_path, mini_batch_size=size)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.compute_loss(trainer.model, trainer.data_collator(TRIPLETS[:8]))
        kept[size] = count
    assert kept[6] < 0.1 * kept[None]


def test_the_loss_is_the_objective_of_the_rows(policy, tmp_path):
    trainer = trainer_for(policy, tmp_path)
    rows = TRIPLETS[:4]
    encoder = trainer.encoder()
    queries = encoder.every_step([row["query"] for row in rows], 3)
    passages = [row["positive"] for row in rows] + [row["negative"][0] for row in rows]
    losses = step_losses(queries, encoder.every_step(passages, 3), torch.arange(4), temperature=0.1)
    expected = icr_loss(losses, trainer.icr)[0]
    found = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


GUIDE = """
import torch

def vectors(texts):
    alike = [0 if text.startswith("a ") else 1 + texts.index(text) for text in texts]
    return torch.eye(1 + len(texts))[alike]
"""


@pytest.mark.parametrize("own_negatives", [True, False])
def test_equal_texts_missing_negatives_and_masked_candidates_are_left_out(
    policy, tmp_path, own_negatives
):
    rows = [
        {"query": "a fox", "positive": "one fox", "negative": ["a cat"]},  # the guide's, its own
        {"query": "a dog", "positive": "one dog", "negative": ["one fox"]},  # row 0's positive
        {"query": "a cow", "positive": "one cow"},
        {"query": "a hen", "positive": "one hen", "negative": ["a hen"]},  # its own query
    ]
    offered = ["one fox", "one dog", "one cow", "one hen", "a cat", "one fox", "one cow", "a hen"]
    allowed = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 5], 2: [0, 1, 2, 3, 5], 3: [0, 1, 2, 3, 5]}
    if not own_negatives:
        allowed[0].append(4)
    (tmp_path / "guide.py").write_text(GUIDE)
    guide = {"guide": f"{tmp_path}/guide.py:vectors", "sigma": 0.9, "own_negatives": own_negatives}
    trainer = trainer_for(
        policy, tmp_path, rows, per_device_train_batch_size=4, false_negatives=guide
    )
    batch = trainer.data_collator(rows)
    assert batch["texts"][4:] == offered
    found = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)[1]["losses"]
    (share,) = trainer.noted["false_negatives/masked_share"]
    assert float(share) * 32 == (8 if own_negatives else 6)  # two texts for every query
    encoder = trainer.encoder()
    for i, places in allowed.items():
        alone = step_losses(
            encoder.every_step([rows[i]["query"]], 3),
            encoder.every_step([offered[place] for place in places], 3),
            torch.tensor([places.index(i)]),
            temperature=0.1,
        )
        assert torch.allclose(found[i], alone[0], rtol=1e-3, atol=1e-4), i


def test_prompts_take_what_a_row_says(policy, tmp_path):
    rows = [row | {"task": f"task {i}"} for i, row in enumerate(TRIPLETS[:8])]
    trainer = trainer_for(
        policy, tmp_path, rows, query_prompt="{task}: ", passage_prompt="", max_text_tokens=200
    )
    batch = trainer.data_collator(rows)
    first = trainer.processing_class.decode(
        batch["input_ids"][0][batch["attention_mask"][0].bool()]
    )
    assert first == f"task 0: {rows[0]['query']}"
    assert batch["texts"][0] == rows[0]["query"]  # a false negative is one whatever the prompt


def test_it_learns_and_says_what_the_steps_do(policy, tmp_path):
    trainer = trainer_for(policy, tmp_path, max_steps=25, learning_rate=3e-3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "icr/loss_3" in log]
    assert logs[-1]["icr/loss_3"] < 0.6 * logs[0]["icr/loss_3"]
    assert 0 <= logs[-1]["icr/share_not_worse"] <= 1
    assert logs[-1]["soft_tokens/entropy"] > 0


def test_an_adapter_is_all_that_is_trained(policy, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    trainer = trainer_for(
        policy, tmp_path, peft_config=config, gradient_checkpointing=True, mini_batch_size=6
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_mistakes_are_named_before_a_model_loads(root, tmp_path):
    recipe = tmp_path / "bad.yaml"
    text = (root / "recipes/scenes/gircse.yaml").read_text(encoding="utf-8")
    wrong = "\nmini_batch_size: 0\nhard_negatives: -1\nsoft_temperature: 0.0\nquery_prompt: '{'\n"
    recipe.write_text(text + wrong, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(recipe, ["--icr", "{preset: papers}"])
    assert len(error.value.problems) == 5

    good = load_recipe(root / "recipes/scenes/gircse.yaml", ["--query_prompt", "{task}:"])
    args = good.training_arguments()
    with pytest.raises(UserError) as error:
        plan(good, args, TRIPLETS[:4])
    assert len(error.value.problems) == 2  # no such column, and too few rows
    empty = [row | {"task": None} for row in TRIPLETS]
    with pytest.raises(UserError, match="32 of 32 rows have no column 'task'"):
        plan(good, args, empty)
    for prompt in ("{}", "{0}", "{task.name}", "{task:5d}", "{task!r}"):
        with pytest.raises(UserError, match="must be a column's name alone"):
            load_recipe(root / "recipes/scenes/gircse.yaml", ["--query_prompt", f"'{prompt}'"])
    with pytest.raises(UserError, match="needs pairs"):
        plan(good, args, [{"text": "alone"}])


# --- runs ----------------------------------------------------------------------------------

SHORT = ["--dataset_rows", "64", "--per_device_train_batch_size", "8", "--evaluation", "null"]
SHORT += ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--warmup_steps", "0"]


def test_a_run_leaves_a_model_that_sentence_transformers_loads(root, tmp_path, capsys):
    run = tmp_path / "run"
    prompts = ["--query_prompt", "Say: ", "--passage_prompt", "Say: ", "--inference_steps", "4"]
    recipe = str(root / "recipes/scenes/gircse.yaml")
    assert cli.main(["train", recipe, *SHORT, *prompts, "--output_dir", str(run)]) == 0
    assert "What the soft tokens say" in capsys.readouterr().out

    model = SentenceTransformer(str(run / "model"), trust_remote_code=True)
    texts = ["A tall farmer was painting a fence.", "It rained.", "A dog ran."]
    vectors = model.encode(texts, convert_to_tensor=True)
    encoder = model[0]
    assert encoder.settings.gircse_steps == 4
    every = encoder.every_step(texts, 6, instruction="Say: ")
    assert torch.allclose(vectors.cpu(), every[:, 3], atol=1e-5)
    longer = model.encode(texts, gircse_steps=6, convert_to_tensor=True)
    assert torch.allclose(longer.cpu(), every[:, 5], atol=1e-5)

    lines = read_words(run / "soft_tokens.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 0, 4, 4, 4]
    assert all(len(line["steps"]) == 4 for line in lines)
    first = lines[0]["steps"][0]
    assert first["cosine"] is None
    assert first["words"][0][1] >= first["words"][1][1]
    assert {"icr/loss_1", "icr/penalty"} <= read_metrics(run)[-1].keys()


def run_program(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(root, tmp_path):
    recipe = str(root / "recipes/scenes/gircse.yaml")
    whole, cut = (["train", recipe, *SHORT, "--output_dir", str(tmp_path / x)] for x in "wc")
    told = [
        {"arguments": whole, "interrupt_at": None, "exit": 0},
        {"arguments": cut, "interrupt_at": 2, "exit": 130},
        {"arguments": cut, "interrupt_at": None, "exit": 0},
    ]
    (tmp_path / "told.json").write_text(json.dumps(told))
    run_program(str(Path(__file__).with_name("several_runs.py")), str(tmp_path / "told.json"))
    weights = [load_file(tmp_path / x / "model" / "model.safetensors") for x in "wc"]
    for key, tensor in weights[0].items():
        assert torch.equal(weights[1][key], tensor), key
    assert [line["step"] for line in read_metrics(tmp_path / "c")] == [1, 2, 3, 4]


STEPS = str(Path(__file__).with_name("gircse_steps.py"))


@pytest.fixture(scope="module")
def alone(policy, tmp_path_factory):
    """What one process makes of batches of 8 rows."""
    folder = tmp_path_factory.mktemp("alone")
    run_program(STEPS, policy, str(folder), "8")
    return torch.load(folder / "end.pt")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_two_processes_train_as_one_does(alone, policy, tmp_path, mode):
    """Same rows, same losses, same weights: negatives and gradients come from both processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", STEPS]
    command += [policy, str(tmp_path / "two"), "4"]
    if mode == "zero3":
        pytest.importorskip("deepspeed")
        sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
        config = {"zero_optimization": {"stage": 3}, **dict.fromkeys(sizes, "auto")}
        config["zero_allow_untested_optimizer"] = True  # plain SGD
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        command.append(str(tmp_path / "zero3.json"))
    run_program(*command)
    two = torch.load(tmp_path / "two" / "end.pt")
    assert torch.allclose(alone["losses"], two["losses"], rtol=1e-4)
    for name in alone.keys() - {"losses"}:
        assert torch.allclose(two[name], alone[name], rtol=1e-4, atol=1e-6), name
    saved = dict(
        SoftTokenEncoder.from_pretrained(tmp_path / "two" / "model").model.named_parameters()
    )
    assert all(torch.equal(saved[name], two[name]) for name in alone.keys() - {"losses"})
