"""ZeRO's stages and DeepSpeed's insides stay in engine/zero.py, in the base of its classes, and in what counts both."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

ALONE = ("cosmos_scale/engine/zero.py", "cosmos_scale/engine/layout.py")
# What the planner counts: whose memory a rank's tensors are, and what each stage would cost.
COUNTED = (
    "cosmos_scale/profiling/states.py",
    *(f"cosmos_scale/profiling/{name}.py" for name in ("plan", "plan_files", "plan_time_text", "scaled_counts")),
)
# Rules between keys name the stages that they are about.
RULES = "cosmos_scale/config/"
# What DeepSpeed (0.19) keeps for itself: attributes of its optimizer wrapper and of the parameters that it took over.
INSIDES = {
    "_hp_mapping",
    "_link_all_hp_params",
    "allreduce_gradients",
    "averaged_gradients",
    "bit16_groups",
    "bit16_groups_flat",
    "ds_numel",
    "ds_shape",
    "ds_tensor",
    "enable_backward_allreduce",
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "loss_scale_config",
    "params_in_partition",
    "params_not_in_partition",
    "parallel_partitioned_bit16_groups",
    "parameter_offload",
    "partition_numel",
    "persistent_parameters",
    "single_partition_of_fp32_groups",
    "sub_group_to_group_id",
    "update_lp_params",
}


def trespasses(path: Path) -> Iterator[str]:
    """Name the lines that compare a stage or read DeepSpeed's insides."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and any(_is_stage(side) for side in (node.left, *node.comparators)):
            yield f"line {node.lineno}: a branch on the stage"
        if isinstance(node, ast.Attribute):
            of_engine = node.attr == "optimizer" and isinstance(node.value, ast.Name | ast.Attribute)
            if of_engine and ast.unparse(node.value).endswith("engine"):
                yield f"line {node.lineno}: the engine's optimizer"
            if node.attr in INSIDES:
                yield f"line {node.lineno}: DeepSpeed's {node.attr}"
        if isinstance(node, ast.Constant) and node.value in INSIDES:
            yield f"line {node.lineno}: DeepSpeed's {node.value}"


def _is_stage(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id == "stage") or (
        isinstance(node, ast.Attribute) and node.attr == "stage"
    )


def test_no_other_file_knows_stages_or_insides() -> None:
    files = [path for path in (REPOSITORY / "cosmos_scale").rglob("*.py") if "kernels" not in path.parts]
    others = [
        path for path in files if not path.relative_to(REPOSITORY).as_posix().startswith((*ALONE, *COUNTED, RULES))
    ]
    assert len(others) == len(files) - len(ALONE) - len(COUNTED) - len(list((REPOSITORY / RULES).glob("*.py")))
    found = [f"{path.relative_to(REPOSITORY)}, {trespass}" for path in others for trespass in trespasses(path)]
    assert found == []
    assert not any("DeepSpeed" in line for path in COUNTED[1:] for line in trespasses(REPOSITORY / path))
    for path in (*ALONE, *COUNTED):
        assert list(trespasses(REPOSITORY / path)), "nothing is found where everything is"


@pytest.mark.parametrize(
    "line",
    [
        "if student.stage == 3: pass",
        "x = 1 if config.zero.stage < 3 else 2",
        "y = stage in (1, 2)",
        "wrapper = self.engine.optimizer",
        "parameter.ds_tensor.copy_(shard)",
        "getattr(wrapper, 'fp16_groups', [])",
    ],
)
def test_planted_lines_are_found(tmp_path: Path, line: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line)
    assert list(trespasses(path))
