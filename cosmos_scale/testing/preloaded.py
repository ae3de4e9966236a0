"""What ranks and runs import, for the fork server that they come from: it imports this module once, and they share it.

A process that imports all of this itself spends three seconds on it. DeepSpeed imports torch's compiler for a sharded
run, torch's optimizers a part of it for any.
"""

import gc

import deepspeed  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import cosmos_scale.train  # noqa: F401

# Collections in the processes to come pass over what is imported; at ZeRO's stage 3, DeepSpeed collects in each start.
gc.freeze()
