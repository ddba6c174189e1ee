#!/usr/bin/env bash
# One rank: sets the trainer's environment variables from those of srun, then becomes the script.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))

# The interface with this node's address towards the first node; on the first node itself that must not be `lo`.
if ((SLURM_JOB_NUM_NODES > 1)) && [[ -z ${TRAINER_INTERFACE:-} ]]; then
  address=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 { print $1 }')
  if [[ -n $(ip -o address show to "$address") ]]; then
    TRAINER_INTERFACE=$(ip -o address show to "$address" | awk 'NR == 1 { print $2 }')
  else
    TRAINER_INTERFACE=$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  fi
fi
if [[ -n ${TRAINER_INTERFACE:-} ]]; then
  export GLOO_SOCKET_IFNAME=$TRAINER_INTERFACE NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$TRAINER_INTERFACE}
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  OMP_NUM_THREADS=1 # loader workers use the cores of a GPU's task; a rank without a GPU computes on them
  [[ -n ${CUDA_VISIBLE_DEVICES:-} && ${DS_ACCELERATOR:-} != cpu ]] || OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  export OMP_NUM_THREADS
fi
exec "$TRAINER_PYTHON" "$@"
