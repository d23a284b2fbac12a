#!/usr/bin/env bash
# Trains the 7B model with one pool of experts on N nodes of 8 GPUs:
#
#   sbatch slurm/moue_7b.sh                                  # two nodes
#   sbatch --nodes=4 slurm/moue_7b.sh --train.steps 1000     # options after the script go to `moue train`
#
# Submit from the folder that holds slurm/, on a file system that all nodes share. The job goes on from the run folder's
# checkpoints/latest: after a requeue by itself, after a time limit when it is submitted again. It deletes nothing.
#
# Environment (sbatch passes it on):
#   MOUE_CONFIG   configuration: a file or a shipped name   default moue_7b
#   MOUE_PYTHON   interpreter with moue-dist installed      default .venv/bin/python
#   MASTER_ADDR   where rank 0 listens                      default first host of the job
#   MASTER_PORT   and on which port                         default follows from the job's number
#
#SBATCH --job-name=moue_7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
[[ -f slurm/common.sh ]] || { echo "error: submit from the folder that holds slurm/: sbatch slurm/moue_7b.sh" >&2; exit 2; }
source slurm/common.sh
find_python
run_on_all_nodes train "${MOUE_CONFIG:-moue_7b}" "$@"
