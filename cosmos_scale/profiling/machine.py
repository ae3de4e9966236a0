"""The GPUs that a plan can be for: their memory and rates, from data sheets, or measured and read from a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, reason_of

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in a cluster.

    memory_gib: what torch sees of a GPU's memory. peak, products: TFLOP/s of dense bf16 products, of the data sheet and
    the most that anybody measured. memory_rate: TB/s. link: GB/s of a GPU in one direction inside a node. network: GB/s
    of a GPU in one direction between nodes. source: where the numbers come from. measured: whether they were measured
    on this kind of machine.
    """

    name: str
    memory_gib: Rate
    peak: Rate
    products: Rate
    memory_rate: Rate
    link: Rate
    network: Rate
    source: str
    measured: bool = False

    def to_json(self) -> str:
        """Return the machine as the text of a file that `read_machine` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"


# Peaks, memory's rate, links: NVIDIA's data sheets of the SXM modules. Memory: as CUDA reports it. Measured products:
# the maximum achievable rates in Stas Bekman's "Machine Learning Engineering". The network is an assumption: an adapter
# of 200 Gbit/s (A100) or 400 Gbit/s for each GPU.
_SOURCE = "data sheets; products as measured by others; network assumed"
MACHINES = {
    "a100-40": Machine("A100 SXM 40 GB", 39.4, 312, 271, 1.56, 300, 25, _SOURCE),
    "a100-80": Machine("A100 SXM 80 GB", 79.1, 312, 271, 2.04, 300, 25, _SOURCE),
    "h100": Machine("H100 SXM 80 GB", 79.1, 989, 795, 3.35, 450, 50, _SOURCE),
    "h200": Machine("H200 SXM 141 GB", 139.8, 989, 795, 4.8, 450, 50, _SOURCE),
    "b200": Machine("B200 SXM 180 GB", 178.3, 2250, 1745, 8.0, 900, 50, _SOURCE),
}


def read_machine(path: Path) -> Machine:
    """Read a machine from a file. Raises UserError: no such file, no such keys, no numbers."""
    try:
        return TypeAdapter(Machine).validate_json(read_regular(path), strict=True)
    except OSError as error:
        raise UserError(f"{path}: {reason_of(error)}") from None
    except ValidationError as error:
        found = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, found['loc'])) or 'the file'}: {found['msg']}") from None
