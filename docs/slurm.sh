#!/usr/bin/env bash
#SBATCH --job-name=vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@120
#
# Submit it in the project's folder: sbatch docs/slurm.sh. One task a machine starts one process a GPU. Two
# minutes before the time limit the run saves and stops; --resume auto continues it in the next job.

set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} # the first line
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another port for each job
export NNODES=$SLURM_JOB_NUM_NODES GPUNUM=all LAUNCHER=torchrun

# SLURM_NODEID differs between the machines, so it is read there, not here.
srun bash -c '
  export LAUNCH_ARGS="--nnodes=$NNODES --node_rank=$SLURM_NODEID"
  exec bash run_demo.sh --resume auto "$@"' run_demo "$@" &
trap 'kill -TERM $!' TERM
wait $! || wait $!
