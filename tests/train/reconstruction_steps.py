"""Three steps of the reconstruction stage, on as many processes as it is started with.

python reconstruction_steps.py POLICY FOLDER ROWS_PER_PROCESS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from grace_rl.data import scenes
from grace_rl.rollout.policy import load_policy
from grace_rl.train.reconstruction import ReconstructionTrainer, paired_with_writing
from grace_rl.train.reconstruction_config import ReconstructionConfig


def main() -> None:
    policy, folder, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    args = ReconstructionConfig(
        output_dir=str(folder),
        instruction=None,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=rows,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        optim="sgd",  # Adam turns the rounding of a small gradient into a whole step
        max_grad_norm=1.0,
        writing_share=0.25,
    )
    model, tokenizer = load_policy(policy, dtype=torch.float32)
    examples = paired_with_writing(scenes.rows(form="triplet", count=64), args)
    trainer = ReconstructionTrainer(model, args, examples, tokenizer)
    trainer.train()
    if trainer.is_world_process_zero():
        end = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        last = [log for log in trainer.state.log_history if "loss_q2d" in log][-1]
        names = ("loss_q2d", "loss_d2q", "loss_writing")
        end["losses"] = torch.tensor([last[name] for name in names])
        assert trainer.reader.centre is not None
        end["centre"] = trainer.reader.centre
        folder.mkdir(exist_ok=True)
        torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    main()
