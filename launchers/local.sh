#!/bin/sh
# All GPUs of this host, or some ranks (--ranks 2): launchers/local.sh RUN.yaml [key=value ...]
exec cosmos-scale launch "$@"
