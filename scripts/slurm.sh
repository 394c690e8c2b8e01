#!/usr/bin/env bash
# TinyLlama 1.1B on 2 nodes x 8 A100 under Slurm, one task a card:
#   sbatch scripts/slurm.sh                       sbatch scripts/slurm.sh --resume auto
#
#   a step      16 ranks x 8 micro x 8 accumulation x 2,048 tokens = 2,097,152 tokens
#   the run     1,430,512 steps = 3.0e12 tokens = 2.19e22 FLOP
#   time        3.0e12 / (16 cards x 24,000 tok/s) = 7.8e6 s = 90 days; 34,722 card hours
#   disk        1.8 TB of packed data and 13.2 GB a checkpoint, on a file system that both nodes see
#
# srun sets SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS, which the program reads. The ranks meet at the step's first
# node, at port 12000 + job number mod 20000; MASTER_ADDR and MASTER_PORT choose another place. Rank 0 writes into the
# job's output, the others into OUT_DIR/logs/. Five minutes before the time limit Slurm sends SIGTERM: all ranks save
# the same step and end with 143. `resume: auto` goes on from it in the next job (sbatch --dependency=singleton), and in
# this one where Slurm puts it back into the queue (a lost node, preemption).
#SBATCH --job-name=tinyllama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tinyllama-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"

# Built once, by `cargo build --release` on a node with the cluster's glibc. The network of Gloo and NCCL, where the
# default route is not it:
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# A rank that fails ends the others within seconds; srun's --kill-on-bad-exit is for one that cannot say so.
# Since 22.05 srun does not take over sbatch's cores a task.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" target/release/tinyllama pretrain configs/tinyllama.yaml "$@"
