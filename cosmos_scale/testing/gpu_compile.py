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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosmos_scale.kernels import shard_table, triton_adamw_ema, triton_contrastive

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of a block, at most
TENSOR_MEMORY = 512  # columns
WIDTH = 512  # of features: ViT-B's
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class LaunchedKernel(NamedTuple):
    """A kernel as it is launched.

    types: of its run-time arguments in order, such as "*bf16". multiplies: whether it needs tensor cores.
    least_access: bytes that a thread's widest access to the GPU's memory must have.
    """

    name: str
    function: Any
    types: tuple[str, ...]
    constants: Mapping[str, object]
    warps: int
    stages: int
    multiplies: bool
    least_access: int = 0


class Resources(NamedTuple):
    """What a compiled kernel asks for. spilled: bytes of registers stored and loaded. shared: bytes of a block.

    widest: bytes of a thread's widest access to the GPU's memory, addresses aside.
    """

    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    has_trap: bool
    multiplies: bool
    widest: int


def kernels(tiles: triton_contrastive.TileSizes = triton_contrastive.TILES) -> Iterator[LaunchedKernel]:
    """Yield every kernel with the launch parameters that training uses, for bfloat16 features of ViT-B's width."""
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


def optimizer_kernels(*, aligned: bool = True) -> Iterator[LaunchedKernel]:
    """Yield the optimizer's kernels as stages 1 to 3 launch them in bfloat16, and stage 0 for hundreds of parameters.

    aligned: whether all shards begin where wide accesses may begin; DeepSpeed's do.
    """
    numbers = {"gradient_factor": None, **triton_adamw_ema.numbers_constants(0.9, 0.98)}
    types = (*("*fp32",) * 3, "fp32", "fp32")
    yield LaunchedKernel("optimizer numbers", triton_adamw_ema.numbers_kernel, types, numbers, 1, 3, multiplies=False)
    blocks, access = triton_adamw_ema.BLOCKS, shard_table.ALIGNMENT if aligned else 0
    for where, shards in (("flat", 1), ("listed", 215)):
        for name, average_first in (("published order", True), ("average last", False)):
            constants = triton_adamw_ema.update_constants(
                shards,
                torch.bfloat16,
                torch.bfloat16,
                weight_copies=True,
                average_copies=True,
                average_first=average_first,
                clamps=False,
                aligned=aligned,
            )
            yield LaunchedKernel(
                f"optimizer update, {where}, {name}",
                triton_adamw_ema.update_kernel,
                ("*i64", "*fp32", *("fp32",) * 8),
                constants,
                blocks.warps,
                3,
                multiplies=False,
                least_access=access,
            )
        yield LaunchedKernel(
            f"gradient squares, {where}",
            triton_adamw_ema.squares_kernel,
            ("*i64", "*fp32"),
            triton_adamw_ema.squares_constants(shards, torch.bfloat16, aligned=aligned),
            blocks.warps,
            3,
            multiplies=False,
            least_access=access,
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
        widest=_widest_access(ptx),
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
        f"accesses of {found.widest} bytes, {kernel.least_access} at least": found.widest < kernel.least_access,
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


def _widest_access(ptx: str) -> int:
    """Return the bytes of the widest load or store of elements of at most 32 bits by a thread; 0 without any."""
    found = re.findall(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](16|32)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def check(launched: Iterable[LaunchedKernel]) -> int:
    """Compile kernels for every capability and print a json line each; returns 1 where anything is wrong."""
    wrong = False
    for kernel in launched:
        for capability in CAPABILITIES:
            found = compile_for(kernel, capability)
            bad = faults(kernel, capability, found)
            wrong |= bool(bad)
            row = {"kernel": kernel.name, "capability": capability, **found._asdict(), "faults": bad}
            print(json.dumps(row), flush=True)
    return 1 if wrong else 0


def main() -> int:
    """Check every kernel."""
    return check((*kernels(), *optimizer_kernels()))


if __name__ == "__main__":
    sys.exit(main())
