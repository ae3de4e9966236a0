"""What the machine is: versions, memory, and how fast bytes move."""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from tools.gpu_stages.recorder import Recorder

PACKAGES = ("deepspeed", "triton", "flash-attn", "xformers", "numpy", "pydantic", "nvidia-dali-cuda130")


def measure(recorder: Recorder) -> None:
    """Write versions, and the rate of a copy on the device and of one from pinned host memory."""
    gpu = recorder.on_gpu
    installed = {
        str(found.metadata["Name"]).lower().replace("_", "-"): found.version
        for found in importlib.metadata.distributions()
    }
    recorder.write(
        rehearsal=recorder.tiny,
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        device=torch.cuda.get_device_name(recorder.device) if gpu else "cpu",
        capability=torch.cuda.get_device_capability(recorder.device) if gpu else None,
        memory_gb=torch.cuda.get_device_properties(recorder.device).total_memory / 1e9 if gpu else None,
        cores=len(os.sched_getaffinity(0)),
        shm_gb=shutil.disk_usage("/dev/shm").total / 1e9,
        compiler=shutil.which("g++"),
        headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),  # Triton compiles a launcher with them
        packages={name: installed.get(name) for name in PACKAGES},
    )
    elements = 2**20 if recorder.tiny else 2**28
    source = torch.empty(elements, device=recorder.device)
    target = torch.empty_like(source)
    spent = recorder.milliseconds(lambda: target.copy_(source))
    recorder.write(what="copy on the device, read and written", tb_per_s=8 * elements / spent / 1e9)
    if gpu:
        host = torch.empty(2**27, dtype=torch.uint8).pin_memory()
        there = host.to(recorder.device)
        spent = recorder.milliseconds(lambda: there.copy_(host, non_blocking=True))
        recorder.write(what="copy from pinned memory", gb_per_s=2**27 / spent / 1e6)
