#!/usr/bin/env bash
# torchrun, the same line on each host: NODES=4 GPUS=8 HOST0=node01 launchers/torchrun.sh RUN.yaml [key=value ...]
# HOST0 is the first host, and PORT a free port of it.
set -euo pipefail
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "${HOST0:-localhost}:${PORT:-29500}" --rdzv-id "${JOB:-cosmos}" \
  --module cosmos_scale.train "$@"
