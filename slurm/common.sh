# Sourced by the job scripts of this folder, in the folder that sbatch was called from.

die() {
  echo "error: $*" >&2
  exit 2
}

# Sets `python`, the interpreter that every node runs.
find_python() {
  python=${MOUE_PYTHON:-$PWD/.venv/bin/python}
  [[ -x $python ]] || die "no Python at $python: run 'make setup' in $PWD first, or set MOUE_PYTHON"
}

# One torchrun on each node of the job, met through the job's host list; the arguments are those of `moue`.
run_on_all_nodes() {
  echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: moue ${*: 1:6} ..."
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none "$python" -m moue_dist.launchers.slurm "$@"
}
