#!/usr/bin/env bash
# Run train.py on a Slurm cluster. In the repository's folder, with its Python environment active:
#
#     sbatch cloud/slurm.sh config/tiny_stories.py --max_iters 1000     all words are passed to train.py
#     sbatch --nodes=4 cloud/slurm.sh config/tiny_stories.py            options of sbatch override those below
#     OUT_DIR=out-mine INIT_FROM=out-tiny-stories sbatch cloud/slurm.sh --dataset mine --max_iters 500
#
# Before its time is up the job saves, goes back into the queue, and resumes from there in its next turn.
# The output of all nodes and turns is in slurm-JOB.log.

#SBATCH --job-name=stories
#SBATCH --nodes=1                      # for several nodes, change only this line
#SBATCH --gpus-per-node=1              # one process per GPU; 0: one process per node, on its CPUs
#SBATCH --cpus-per-task=8              # CPUs per node, for all its processes together
#SBATCH --time=24:00:00                # of one turn, not of the whole training
#SBATCH --signal=B:USR1@120            # the notice: seconds before the end, sent to this script only
#SBATCH --requeue                      # also after a node has failed
#SBATCH --ntasks-per-node=1            # torchrun, which starts the other processes
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append

set -euo pipefail

# OUT_DIR and INIT_FROM are environment variables, because --init_from changes from turn to turn. A job that
# is queued again keeps its number. In its first turn it does not resume: a run that is in the folder already
# belongs to another job, and train.py refuses to replace it.
out_dir=${OUT_DIR:-out-$SLURM_JOB_ID}
init_from=${INIT_FROM:-scratch}
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$out_dir/ckpt.pt" ]; then
    init_from=resume
fi

processes=${SLURM_GPUS_ON_NODE:-0}
[ "$processes" -gt 0 ] || processes=1
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# One port per job, as two jobs may share a node; below the range that Linux assigns by itself.
port=$((20000 + SLURM_JOB_ID % 10000))

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds for saving; the default, 30, is short for a slow disk

# The notice is SIGUSR1 and not SIGTERM, because scancel sends SIGTERM, and a job that is cancelled must not
# be queued again. scancel passes the notice on as SIGTERM: srun would kill its processes on SIGTERM.
noticed=
trap 'noticed=yes; echo "the time is nearly up: saving"; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1

# srun runs in the background, because bash runs a trap only after the foreground command has ended. A node
# whose torchrun fails stops the others. That loses nothing, as no rank exits before a save is complete.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${nodes[0]}:$port" \
    train.py "$@" --out_dir "$out_dir" --init_from "$init_from" &
step=$!
status=138
while [ "$status" = 138 ]; do  # 128 + SIGUSR1: the notice has interrupted `wait`
    status=0
    wait "$step" || status=$?
done

# torchrun exits with 1 whatever the status of train.py is, so the notice tells interruptions from mistakes.
# A mistake that happens after the notice is queued again once; in the next turn there is no notice.
if [ "$noticed" ] && [ "$status" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
