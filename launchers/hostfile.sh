#!/usr/bin/env bash
# The hosts of a hostfile: launchers/hostfile.sh HOSTFILE RUN.yaml [key=value ...]
# By our own launcher over ssh; with LAUNCHER=pdsh by DeepSpeed's, after our look at the hosts.
set -euo pipefail
hosts=${1:?the hostfile, with a line a host: NAME slots=N} run=${2:?the run\'s YAML file}
shift 2
if [ "${LAUNCHER:-ours}" = ours ]; then
  exec cosmos-scale launch --hostfile "$hosts" "$run" "$@"
fi
cosmos-scale launch --check --hostfile "$hosts" "$run" "$@"
# DeepSpeed passes on only what stands in such a file, each line of it NAME=VALUE: no comment, no empty line.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(CUDA|DS|GLOO|HF|NCCL|OMP|TORCH|WANDB)_[A-Z0-9_]*=' | grep -v '^DS_ENV_FILE=' >"$DS_ENV_FILE" || true
deepspeed --hostfile "$hosts" --launcher "$LAUNCHER" --module cosmos_scale.train "$run" "$@"
