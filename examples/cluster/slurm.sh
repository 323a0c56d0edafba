#!/bin/bash
# Two machines of 8 GPUs under Slurm:  sbatch examples/cluster/slurm.sh RECIPE [--key value ...]
# The repository, its .venv and output_dir lie on a disk that both see. Slurm sends SIGTERM to every
# process five minutes before the time is over: a checkpoint is saved, and the same line goes on.
#SBATCH --job-name=grace-rl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PET_SHUTDOWN_TIMEOUT=600   # accelerate's patience while a checkpoint is saved

# The backslash keeps SLURM_NODEID for the machine that runs the line.
exec srun --kill-on-bad-exit=1 bash -c ".venv/bin/accelerate launch \
  --config_file recipes/accelerate/multi-node.yaml \
  --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * 8)) \
  --machine_rank \$SLURM_NODEID --main_process_ip $first --main_process_port 29500 \
  -m grace_rl train $*"
