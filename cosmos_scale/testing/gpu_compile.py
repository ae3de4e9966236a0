"""Triton kernels compiled for GPUs that are not here, and what each asks of its GPU; a program of its own.

A kernel that compiles may still be slow or wrong on its GPU: it may spill registers, ask for more shared or tensor
memory than there is, hold a bare `trap` in place of code that its GPU lacks, or multiply without tensor cores.
Run in a process without TRITON_INTERPRET: kernels that are interpreted cannot be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosmos_scale.kernels import triton_bias, triton_contrastive, triton_norm, triton_sums

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block, at most
TENSOR_MEMORY = 512  # columns
WIDTH = 512  # of features: ViT-B's
WIDTHS = (512, 768, 1024, 1280)  # of towers
TOKENS = 39424
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class LaunchedKernel(NamedTuple):
    """A kernel as it is launched.

    types: of its run-time arguments in order, such as "*bf16". multiplies: whether it needs tensor cores.
    """

    name: str
    function: Any
    types: tuple[str, ...]
    constants: dict[str, int]
    warps: int
    stages: int
    multiplies: bool


class Resources(NamedTuple):
    """What a compiled kernel asks for. spilled: bytes of registers stored and loaded. shared: bytes of a block."""

    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    has_trap: bool
    multiplies: bool


def contrastive_kernels(tiles: triton_contrastive.TileSizes = triton_contrastive.TILES) -> Iterator[LaunchedKernel]:
    """Yield the loss's kernels with the launch parameters that training uses: bfloat16 features of ViT-B's width."""
    features, numbers = ("*bf16", "*bf16"), ("*fp32",)
    yield LaunchedKernel(
        "contrastive statistics",
        triton_contrastive.statistics_kernel,
        (*features, *numbers * 6, *("i32",) * 4),
        triton_contrastive.statistics_constants(tiles, WIDTH),
        tiles.warps,
        tiles.stages,
        multiplies=True,
    )
    yield LaunchedKernel(
        "contrastive slopes",
        triton_contrastive.slopes_kernel,
        (*features, *numbers * 5, *("i32",) * 11),
        triton_contrastive.slopes_constants(tiles, WIDTH),
        tiles.warps,
        tiles.stages,
        multiplies=True,
    )


def pointwise_kernels() -> Iterator[LaunchedKernel]:
    """Yield the kernels around products and attention, as bfloat16 training launches them; every width in WIDTHS."""
    low, numbers, warps, stages = "*bf16", "*fp32", triton_sums.WARPS, triton_sums.STAGES
    for D in WIDTHS:
        rows, columns, *_ = triton_norm.norm_tiling(TOKENS, D)
        sizes = {"D": D, "ROWS": rows, "COLUMNS": columns}
        yield LaunchedKernel(
            f"add and norm, width {D}",
            triton_norm.add_norm_kernel,
            (*(low,) * 6, numbers, numbers, "i32", "fp32"),
            sizes | {"ADDS": True, "SAVES": True},
            warps,
            stages,
            multiplies=False,
        )
        yield LaunchedKernel(
            f"add and norm backward, width {D}",
            triton_norm.add_norm_backward_kernel,
            (*(low,) * 3, numbers, numbers, low, low, numbers, "i32", "i32"),
            sizes | {"JOINS": True, "SUMS_BIAS": True},
            warps,
            stages,
            multiplies=False,
        )
        rows, columns, *_ = triton_bias.columns_tiling(TOKENS, 4 * D)
        yield LaunchedKernel(
            f"gelu backward, width {4 * D}",
            triton_bias.gelu_backward_kernel,
            (*(low,) * 3, numbers, "i32", "i32"),
            {"W": 4 * D, "ROWS": rows, "COLUMNS": columns},
            warps,
            stages,
            multiplies=False,
        )
        rows, columns, *_ = triton_bias.columns_tiling(TOKENS, D, 3)
        yield LaunchedKernel(
            f"stack of gradients, width {D}",
            triton_bias.stack_gradients_kernel,
            (*(low,) * 4, numbers, "i32", "i32"),
            {"STRIDE": D, "D": D, "ROWS": rows, "COLUMNS": columns, "STORES": True},
            warps,
            stages,
            multiplies=False,
        )
        yield LaunchedKernel(
            f"sum of partial sums, width {D}",
            triton_sums.sum_partials_kernel,
            (numbers, *(low,) * 3, "i32", "i32"),
            triton_sums.sum_constants(D),
            triton_sums.SECOND_WARPS,
            stages,
            multiplies=False,
        )


def compile_for(kernel: LaunchedKernel, capability: int) -> Resources:
    """Compile a kernel for a compute capability (80: 8.0) and return what it asks for."""
    names = kernel.function.arg_names
    types = iter(kernel.types)
    signature = {name: "constexpr" if name in kernel.constants else next(types) for name in names}
    # Tensors begin at multiples of 16 bytes. torch's allocator sees to it, and Triton looks at each launch.
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=aligned)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _registers(ptx, capability)
    return Resources(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        has_trap=re.search(r"^\s*trap;", ptx, re.MULTILINE) is not None,
        multiplies=PRODUCTS[capability] in ptx,
    )


def faults(kernel: LaunchedKernel, capability: int, found: Resources) -> list[str]:
    """Return what is wrong with a compiled kernel, a line each."""
    limit = SHARED_MEMORY[capability]
    checks = {
        f"{found.spilled} bytes of registers are spilled": found.spilled > 0,
        f"{found.shared} bytes of shared memory, {limit} at most": found.shared > limit,
        f"{found.tensor_columns} columns of tensor memory, {TENSOR_MEMORY} at most": found.tensor_columns
        > TENSOR_MEMORY,
        "a bare trap": found.has_trap,
        f"no {PRODUCTS[capability]}": kernel.multiplies and not found.multiplies,
    }
    return [text for text, wrong in checks.items() if wrong]


def _registers(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes that are spilled."""
    assembler = BINARIES / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    target = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [str(assembler), "-v", f"-arch={target}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return int(registers), sum(map(int, spilled))


def main() -> int:
    """Compile every kernel for every capability and print a json line each; returns 1 where anything is wrong."""
    wrong = False
    for kernel in (*contrastive_kernels(), *pointwise_kernels()):
        for capability in CAPABILITIES:
            found = compile_for(kernel, capability)
            bad = faults(kernel, capability, found)
            wrong |= bool(bad)
            row = {"kernel": kernel.name, "capability": capability, **found._asdict(), "faults": bad}
            print(json.dumps(row), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
