"""The GPUs that a plan can be for: their memory and rates, from data sheets, or measured and read from a file."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of, whole_path
from cosmos_scale.host import usable_cores
from cosmos_scale.profiling.calibration import Calibration
from cosmos_scale.profiling.chips import find_chip
from cosmos_scale.words import counted

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in a cluster.

    memory_gib: what torch sees of a GPU's memory. peak, products: TFLOP/s of dense bf16 products, of the data sheet and
    the most that anybody measured. memory_rate: TB/s. link: GB/s of a GPU in one direction inside a node. network: GB/s
    of a GPU in one direction between nodes. source: where the numbers come from. cores: of a CPU for each GPU, or
    all of a host whose CPUs compute. pcie: GB/s from the host to a GPU. calibration: rates that were measured on such
    a machine.
    """

    name: str
    memory_gib: Rate
    peak: Rate
    products: Rate
    memory_rate: Rate
    link: Rate
    network: Rate
    source: str
    cores: Rate = 12.0
    pcie: Rate = 25.0
    calibration: Calibration | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether steps run as on a GPU."""
        return self.calibration is None or self.calibration.device != "cpu"

    @property
    def chip(self) -> str:
        """What computes a rank's step, in a word."""
        return "GPU" if self.is_gpu else "CPU"

    @property
    def unit(self) -> str:
        """What a cluster is counted in: GPUs, one rank each, or the ranks that share CPUs."""
        return "GPU" if self.is_gpu else "rank"

    def to_json(self) -> str:
        """Return the machine as the text of a file that `read_machine` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"


# Peaks, memory's rate, links: NVIDIA's data sheets of the SXM modules. Memory: as CUDA reports it. Measured products:
# the maximum achievable rates in Stas Bekman's "Machine Learning Engineering". The network is an assumption: an adapter
# of 200 Gbit/s (A100) or 400 Gbit/s for each GPU. So are the cores for each GPU, and what of PCIe 4 or 5 is reached.
_SOURCE = "data sheets; products as measured by others; network assumed"
MACHINES = {
    "a100-40": Machine("A100 SXM 40 GB", 39.4, 312, 271, 1.56, 300, 25, _SOURCE, cores=12, pcie=24),
    "a100-80": Machine("A100 SXM 80 GB", 79.1, 312, 271, 2.04, 300, 25, _SOURCE, cores=8, pcie=24),
    "h100": Machine("H100 SXM 80 GB", 79.1, 989, 795, 3.35, 450, 50, _SOURCE, cores=12, pcie=55),
    "h200": Machine("H200 SXM 141 GB", 139.8, 989, 795, 4.8, 450, 50, _SOURCE, cores=12, pcie=55),
    "b200": Machine("B200 SXM 180 GB", 178.3, 2250, 1745, 8.0, 900, 50, _SOURCE, cores=14, pcie=55),
}


def link_rate(device_name: str) -> float | None:
    """Return the GB/s of a GPU's link in one direction inside a node, by its driver's name; None where not known.

    The link is that of SXM modules. A100s of both forms are one chip: the name must say SXM.
    """
    chip = find_chip(device_name)
    if chip is None or (chip.name == "A100" and "SXM" not in device_name.upper()):
        return None
    return next((machine.link for machine in MACHINES.values() if machine.name.startswith(chip.name)), None)


def calibrated_machine(calibration: Calibration) -> Machine:
    """Return the machine that was measured, which this process runs on; what was not measured is of its data sheet.

    Of a CPU, and of a GPU that MACHINES lacks, peak and products are the fastest products that were measured.
    """
    fastest = max(point.flops for point in calibration.products) / 1e12
    source = f"measured with {calibration.fitted_on}"
    if calibration.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        name = f"a CPU, {counted(calibration.threads, 'thread')}"
        cores = float(usable_cores())
        base = Machine(name, memory, fastest, fastest, 1.0, 10.0, 1.0, source, cores, pcie=10.0)
    else:
        memory = torch.cuda.mem_get_info()[1] / 2**30
        closest = min(MACHINES.values(), key=lambda machine: abs(machine.memory_gib - memory))
        known = closest.name.split()[0] in calibration.device
        peak = closest.peak if known else fastest
        base = replace(closest, name=calibration.device, memory_gib=memory, peak=peak, source=source)
    return replace(base, products=fastest, memory_rate=calibration.copied / 1e12, calibration=calibration)


def read_machine(path: Path) -> Machine:
    """Read a machine from a file. Raises UserError: no such file, no such keys, no numbers."""
    try:
        return TypeAdapter(Machine).validate_json(read_regular(path), strict=True)
    except OSError as error:
        raise UserError(f"{whole_path(path)}: {reason_of(error)}") from None
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, found["loc"])) or "the file"
        value = f"{found['input']!r}; " if isinstance(found["input"], (str, int, float)) and found["loc"] else ""
        raise UserError(f"{path}: {key}: {value}{found['msg']}; rule: a file as plan --calibrate writes it") from None
