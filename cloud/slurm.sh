#!/usr/bin/env bash
# train.py on a Slurm cluster. In the repository's folder, with its Python environment active:
#
#     sbatch cloud/slurm.sh config/tiny_stories.py --max_iters 1000     all words go to train.py
#     sbatch --nodes=4 cloud/slurm.sh config/tiny_stories.py            this wins over the line below
#     OUT_DIR=out-mine INIT_FROM=out-tiny-stories sbatch cloud/slurm.sh --dataset mine --max_iters 500
#
# Before its time is up the job saves, goes back into the queue, and goes on from there in its next turn.
# Slurm opens the log before this script runs: where there is no folder logs/, the job fails without a word.

#SBATCH --job-name=stories
#SBATCH --nodes=1                      # one, or many: this line alone
#SBATCH --gpus-per-node=1              # as many processes on each node; 0: one process, on its CPUs
#SBATCH --cpus-per-task=8              # of a node, for all its processes together
#SBATCH --time=24:00:00                # of one turn, not of the training
#SBATCH --signal=B:USR1@120            # the notice: seconds before the end, to this script alone
#SBATCH --requeue                      # after a node has failed, too
#SBATCH --ntasks-per-node=1            # torchrun, which starts the rest
#SBATCH --output=logs/%x-%j.log        # everything that any node says, of all turns
#SBATCH --open-mode=append

set -euo pipefail

# These two are not among the words, as the next turn changes one of them. A job keeps its number when it is
# queued again. In its first turn a run in the folder is another's, and train.py refuses.
out_dir=${OUT_DIR:-out-$SLURM_JOB_ID}
init_from=${INIT_FROM:-scratch}
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$out_dir/ckpt.pt" ]; then
    init_from=resume
fi

processes=${SLURM_GPUS_ON_NODE:-0}
[ "$processes" -gt 0 ] || processes=1
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))  # each job its own, as two may share a node; none that Linux hands out

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds to save in; torchrun's own 30 are few on a slow disk

# The notice is not SIGTERM, which this shell also gets from scancel, and who cancels a job wants it to end.
# It goes on as SIGTERM by scancel, as srun itself would kill all at once on a SIGTERM.
noticed=
trap 'noticed=yes; echo "the time is nearly up: saving"; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1

# In the background, as bash heeds no trap before a command in the foreground has ended. A node whose torchrun
# fails takes the others down; one that has saved does no harm, as ranks leave only after the save.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$processes" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${nodes[0]}:$port" \
    train.py "$@" --out_dir "$out_dir" --init_from "$init_from" &
step=$!
status=138
while [ "$status" = 138 ]; do  # 128 + SIGUSR1: the notice has cut the wait short
    status=0
    wait "$step" || status=$?
done

# torchrun exits with 1 whatever train.py does, so not the status but the notice tells an interruption from a
# mistake. One that coincides with it comes up again, without a notice, when the job's next turn begins.
if [ "$noticed" ] && [ "$status" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
