"""The peak rates of known chips in dense matrix products, by arithmetic, from their makers' data sheets.

Rates hold without sparsity; data sheets often print the rate with it, twice as high. bf16 and fp16 add up in float32.
"""

import re
from typing import Literal, NamedTuple

import torch

Arithmetic = Literal["bf16", "fp16", "tf32", "fp32"]


class ChipPeaks(NamedTuple):
    """A chip's peaks. words: all of them stand in the name that the driver gives the chip.

    teraflops: peak in 1e12 operations a second by arithmetic; one that the chip's matrix units lack has no entry.
    source: where the numbers stand.
    """

    name: str
    words: tuple[str, ...]
    teraflops: dict[Arithmetic, float]
    source: str


def _peaks(half: float, tf32: float, fp32: float) -> dict[Arithmetic, float]:
    """Return the rates of a chip whose bf16 and fp16 are equally fast."""
    return {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}


_H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet; half of the rates with sparsity"
_H200_SHEET = "NVIDIA H200 Tensor Core GPU data sheet; half of the rates with sparsity"
_V100_SHEET = "NVIDIA V100 Tensor Core GPU data sheet"

# The first whose words all stand in a name is the chip, so that special forms stand before plain ones.
CHIP_PEAKS = (
    ChipPeaks("H100 NVL", ("H100", "NVL"), _peaks(835.5, 417.5, 60.0), _H100_SHEET),
    ChipPeaks("H100 PCIe", ("H100", "PCIE"), _peaks(756.0, 378.0, 51.0), "NVIDIA H100 PCIe GPU product brief"),
    ChipPeaks("H100 SXM", ("H100",), _peaks(989.4, 494.7, 66.9), _H100_SHEET),
    ChipPeaks("H200 NVL", ("H200", "NVL"), _peaks(835.5, 417.5, 60.0), _H200_SHEET),
    ChipPeaks("H200 SXM", ("H200",), _peaks(989.4, 494.7, 66.9), _H200_SHEET),
    ChipPeaks(
        "GH200", ("GH200",), _peaks(989.4, 494.7, 66.9), "NVIDIA GH200 data sheet; half of the rates with sparsity"
    ),
    ChipPeaks("B200", ("B200",), _peaks(2250.0, 1125.0, 75.0), "NVIDIA HGX B200 data sheet, an eighth of 8 GPUs"),
    ChipPeaks("GB200", ("GB200",), _peaks(2500.0, 1250.0, 80.0), "NVIDIA GB200 NVL72 data sheet, a 72nd of 72 GPUs"),
    ChipPeaks("A100", ("A100",), _peaks(312.0, 156.0, 19.5), "NVIDIA A100 Tensor Core GPU data sheet, SXM and PCIe"),
    ChipPeaks("A10", ("A10",), _peaks(125.0, 62.5, 31.2), "NVIDIA A10 data sheet"),
    ChipPeaks("L40S", ("L40S",), _peaks(362.05, 183.0, 91.6), "NVIDIA L40S data sheet"),
    ChipPeaks("RTX 4090", ("RTX", "4090"), _peaks(165.2, 82.6, 82.6), "NVIDIA Ada GPU architecture, appendix A"),
    ChipPeaks("V100 SXM2", ("V100", "SXM2"), {"fp16": 125.0, "fp32": 15.7}, _V100_SHEET),
    ChipPeaks("V100 PCIe", ("V100", "PCIE"), {"fp16": 112.0, "fp32": 14.0}, _V100_SHEET),
    ChipPeaks("MI300X", ("MI300X",), _peaks(1307.4, 653.7, 163.4), "AMD Instinct MI300X data sheet"),
)
# Parts and weaker forms of a chip, whose rates are others: a slice of a GPU, a laptop's, a cut-down one.
_OTHER_FORMS = {"MIG", "LAPTOP", "D"}


def find_chip(device_name: str) -> ChipPeaks | None:
    """Return the chip of a device by the name that the driver gives it; None for one that is not known."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if words & _OTHER_FORMS:
        return None
    return next((chip for chip in CHIP_PEAKS if words.issuperset(chip.words)), None)


def peak_flops(device: torch.device, precision: Literal["bf16", "fp16", "fp32"]) -> float | None:
    """Return a device's peak operations a second in the products of a run of this precision; None where not known.

    CPUs are not known: their rates hang on clocks and cores that no name tells. In fp32 a GPU multiplies in TF32 where
    torch is set so.
    """
    chip = find_chip(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if chip is None:
        return None
    arithmetic: Arithmetic = precision
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        arithmetic = "tf32"
    teraflops = chip.teraflops.get(arithmetic)
    return None if teraflops is None else teraflops * 1e12
