"""Chips are found by the names that drivers give them, and what is not known has no peak."""

from collections.abc import Callable, Iterator

import pytest
import torch

from cosmos_scale.profiling.chips import CHIP_PEAKS, find_chip, peak_flops

# As torch.cuda.get_device_name gives them.
NAMES = {
    "NVIDIA A100-SXM4-80GB": ("A100", 312.0),
    "NVIDIA A100 80GB PCIe": ("A100", 312.0),
    "NVIDIA H100 80GB HBM3": ("H100 SXM", 989.4),
    "NVIDIA H100 PCIe": ("H100 PCIe", 756.0),
    "NVIDIA H100 NVL": ("H100 NVL", 835.5),
    "NVIDIA H200": ("H200 SXM", 989.4),
    "NVIDIA H200 NVL": ("H200 NVL", 835.5),
    "NVIDIA GH200 480GB": ("GH200", 989.4),
    "NVIDIA B200": ("B200", 2250.0),
    "NVIDIA GB200": ("GB200", 2500.0),
    "NVIDIA A10": ("A10", 125.0),
    "NVIDIA L40S": ("L40S", 362.05),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 165.2),
    "AMD Instinct MI300X": ("MI300X", 1307.4),
}
UNKNOWN = (
    *("NVIDIA A10G", "NVIDIA L40", "NVIDIA H800", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU"),
    *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla T4", ""),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_its_own_form(name: str) -> None:
    chip = find_chip(name)
    assert chip is not None
    assert (chip.name, chip.teraflops["bf16"]) == NAMES[name]


def test_chips_without_bf16_have_no_peak_of_it() -> None:
    for name, fp16 in (("Tesla V100-SXM2-16GB", 125.0), ("Tesla V100-PCIE-32GB", 112.0)):
        chip = find_chip(name)
        assert chip is not None
        assert chip.teraflops.get("bf16") is None
        assert chip.teraflops["fp16"] == fp16


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_chips_and_their_parts_are_not_known(name: str) -> None:
    assert find_chip(name) is None


def test_every_chip_can_be_found_and_has_a_source() -> None:
    """A plain form that stood before a special one would hide it."""
    for chip in CHIP_PEAKS:
        assert find_chip(f"NVIDIA {' '.join(chip.words)}") is chip
        assert chip.source
        assert chip.teraflops["fp32"] < chip.teraflops["fp16"]


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Switches TF32 in torch's products on or off; at the end it is as before."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32

    def switch(on: bool) -> None:
        matmul.allow_tf32 = on

    yield switch
    matmul.allow_tf32 = before


def test_the_precision_says_which_peak(monkeypatch: pytest.MonkeyPatch, tf32: Callable[[bool], None]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    device = torch.device("cuda")
    assert peak_flops(device, "bf16") == peak_flops(device, "fp16") == pytest.approx(989.4e12)
    tf32(False)
    assert peak_flops(device, "fp32") == pytest.approx(66.9e12)
    tf32(True)
    assert peak_flops(device, "fp32") == pytest.approx(494.7e12)
    assert peak_flops(torch.device("cpu"), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H20")
    assert peak_flops(device, "bf16") is None
