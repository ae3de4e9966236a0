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
# The file has no name any more, so that nothing is left to do at the end, and deepspeed gets the signals itself.
file=$(mktemp)
env | grep -E '^(CUDA|DS|GLOO|HF|NCCL|OMP|TORCH|WANDB)_[A-Z0-9_]*=' | grep -v '^DS_ENV_FILE=' >"$file" || true
exec 9<"$file"
rm "$file"
export DS_ENV_FILE=/proc/self/fd/9
exec deepspeed --hostfile "$hosts" --launcher "$LAUNCHER" --module cosmos_scale.train "$run" "$@"
