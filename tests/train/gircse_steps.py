"""Three steps of soft-token refinement, on as many processes as it is started with.

python gircse_steps.py POLICY FOLDER ROWS_PER_PROCESS [DEEPSPEED.json]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from grace_rl.data import scenes
from grace_rl.rollout.policy import load_policy
from grace_rl.run.processes import join_processes
from grace_rl.run.zero import whole_policy
from grace_rl.train.gircse import GIRCSETrainer
from grace_rl.train.gircse_config import GIRCSEConfig


def main() -> None:
    policy, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    given = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": rows,
        "gircse_steps": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam turns the rounding of a small gradient into a whole step
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "icr": {"temperature": 0.1},
        "deepspeed": sys.argv[4] if len(sys.argv) > 4 else None,
    }
    args = GIRCSEConfig(output_dir=str(folder), **given | join_processes(given))
    model, tokenizer = load_policy(policy, dtype=torch.float32)
    triplets = scenes.rows(form="triplet", count=64)
    trainer = GIRCSETrainer(model, args, triplets, tokenizer, run_folder=folder)
    folder.mkdir(exist_ok=True, parents=True)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    with whole_policy(trainer):
        if trainer.is_world_process_zero():
            inner = trainer.accelerator.unwrap_model(trainer.model)
            end = {name: p.detach().clone() for name, p in inner.named_parameters()}
            last = [log for log in trainer.state.log_history if "icr/loss_1" in log]
            end["losses"] = torch.tensor([log["loss"] for log in last])
            torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main()
