#!/usr/bin/env bash
# A launch like the large ones, without a GPU: the tiny configuration on 2 nodes x 2 CPU ranks, in a minute or two.
#
#   sbatch slurm/debug.sh --train.steps 20     # options after the script go to `moue train`
#
# Same rules and environment as moue_7b.sh; MOUE_CONFIG is tiny unless set.
#
#SBATCH --job-name=moue_debug
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
[[ -f slurm/common.sh ]] || { echo "error: submit from the folder that holds slurm/: sbatch slurm/debug.sh" >&2; exit 2; }
source slurm/common.sh
find_python
export CUDA_VISIBLE_DEVICES= # CPU ranks, even on nodes with GPUs
run_on_all_nodes --nproc-per-node 2 train "${MOUE_CONFIG:-tiny}" --train.device cpu "$@"
