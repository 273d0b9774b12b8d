#!/bin/bash
# Train on several nodes of a Slurm cluster. Change the lines below, then: sbatch examples/slurm_train.sh
#
# Every node starts one torchrun, which starts a rank per GPU. The repository, the Python environment, the data and the
# run must be in directories that all nodes share. The job starts again where it stopped after a preemption, the failure of a
# node or the time limit.
#SBATCH --job-name=mygpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

TRAIN=(-m MyGPT train --config configs/gpt2_124m.yaml --out runs/gpt2_124m --resume auto)
# The network interface that connects the nodes, if the first one does not (see: ip -brief address).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise the nodes do not find each other after a restart
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds for the checkpoint after SIGTERM, before torchrun kills the ranks

# Slurm sends USR1 to this script 300 seconds before the time limit (--signal).
requeue=no
trap 'requeue=yes; kill -TERM "$training"' USR1
trap 'kill -TERM "$training"' TERM

srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    "${TRAIN[@]}" &
training=$!
wait "$training"
status=$?
while kill -0 "$training" 2>/dev/null; do # a signal has interrupted wait, and the ranks are saving a checkpoint
    wait "$training"
    status=$?
done

if [ "$requeue" = yes ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
