"""What ranks and runs import, for the fork server that they come from: it imports this module once, and they share it.

A process that imports all of this itself spends three seconds on it. DeepSpeed imports torch's compiler for a sharded
run, torch's optimizers a part of it for any. What a process of a run makes once, the server makes too.
"""

import gc
import logging
from importlib import import_module

import deepspeed
import torch._inductor.compile_fx  # noqa: F401
from PIL import Image

import cosmos_scale.cli.main
import cosmos_scale.engine.comm_build
import cosmos_scale.run.dry_run
import cosmos_scale.run.explain
import cosmos_scale.run.supervisor
import cosmos_scale.train  # noqa: F401
from cosmos_scale.model.tokenizer import Tokenizer

# It warns on machines with a CUDA toolkit and no GPU, where a run silences it before it imports it.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
import_module("torch.utils.cpp_extension")
Image.preinit()  # imports what Pillow imports at its first picture
Tokenizer(2)  # reads the vocabulary, which takes longer than the steps of a tiny run
assert deepspeed.ops.__compatible_ops__  # asks a compiler, at the first look

# Collections in the processes to come pass over what is imported; at ZeRO's stage 3, DeepSpeed collects in each start.
gc.freeze()
