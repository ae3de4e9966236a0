"""Numbers of the published evaluation, and the tool that compares with them: every part of the file has a check."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.check_golden import main
from tools.golden_evaluation import CHECKS
from tools.golden_evaluation import compared_in as compared_by_tool
from tools.golden_numbers import Compared, EvaluationGolden, compare_rounding

FILE = Path(__file__).parents[1] / "golden" / "golden_eval.safetensors"
GOLDEN = EvaluationGolden(FILE)
CASES = [(part, case) for part in CHECKS for case in GOLDEN.cases(part)]


def compared_in(part: str, case: str, golden: EvaluationGolden = GOLDEN) -> list[Compared]:
    return list(compared_by_tool(golden, part, case))


@pytest.mark.parametrize(("part", "case"), CASES, ids=[case for _, case in CASES])
def test_a_case_matches_the_published_numbers(part: str, case: str) -> None:
    compared = compared_in(part, case)
    assert compared
    assert [one for one in compared if not one.good] == []


def changed_file(path: Path, tensors: dict[str, Tensor | None], header: dict[str, str] | None = None) -> Path:
    """Write the file with some tensors and header values replaced, or left out where None."""
    with safe_open(FILE, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
        metadata = file.metadata() | (header or {})
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata)
    return path


@pytest.mark.parametrize(("part", "case"), CASES, ids=[case for _, case in CASES])
def test_one_number_changed_by_a_thousandth_is_noticed(part: str, case: str, tmp_path: Path) -> None:
    """The number of largest size of each tensor that is compared, one tensor at a time; whole numbers change by 1."""
    names = [one.name for one in compared_in(part, case) if one.name in GOLDEN.names()]
    assert names
    for name in names:
        tensor = GOLDEN.tensor(name).clone()
        flat = tensor.view(-1)
        place = int(flat.float().nan_to_num(0.0).abs().argmax())
        flat[place] = flat[place] * 1.001 if tensor.is_floating_point() else flat[place] - 1
        golden = EvaluationGolden(changed_file(tmp_path / "changed.safetensors", {name: tensor}))
        past = [one.name for one in compared_in(part, case, golden) if not one.good]
        if name.endswith("_published"):  # of unequal ranks any is legitimate that lies between best and worst
            continue
        assert name in past, f"{name}: not noticed"


@pytest.mark.parametrize(("part", "case"), CASES, ids=[case for _, case in CASES])
def test_small_numbers_changed_by_a_thousandth_are_noticed(part: str, case: str, tmp_path: Path) -> None:
    """In all tensors together, the number that 6 % of the tensor's numbers are smaller than; zeros do not count."""
    compared = compared_in(part, case)
    names = sorted({one.name for one in compared if one.name in GOLDEN.names() and one.tolerance})
    changed: dict[str, Tensor | None] = {}
    for name in names:
        tensor = GOLDEN.tensor(name).clone()
        sizes = tensor.flatten().nan_to_num(0.0).abs()
        order = sizes.argsort()[int((sizes == 0).sum()) :]
        if len(order) and "weights" not in name:  # these have a test of their own
            tensor.view(-1)[order[-(-len(order) * 6 // 100)]] *= 1.001
            changed[name] = tensor
    golden = EvaluationGolden(changed_file(tmp_path / "changed.safetensors", changed))
    past = {one.name for one in compared_in(part, case, golden) if not one.good}
    assert past >= changed.keys()


def test_numbers_are_as_near_to_float64_as_float32_rounds(tmp_path: Path) -> None:
    """Another rounding of all numbers is within it; twenty times as much is not."""
    name = "dense.0.tokens"
    (single,) = (one for one in CHECKS["dense"](GOLDEN, "dense.0") if one.name == name)
    (exact,) = (one for one in CHECKS["dense"](GOLDEN.exact(), "dense.0") if one.name == name)
    assert single.ours is not None
    assert exact.ours is not None
    rounding = single.ours.double() - exact.ours
    for times, good in ((-1, True), (4, True), (-20 * 5, False)):
        numbers = (exact.ours + times * rounding).float()
        golden = EvaluationGolden(changed_file(tmp_path / "changed.safetensors", {name: numbers}))
        compared = compare_rounding(golden, single, exact)
        assert compared is not None
        assert compared.tolerance < single.tolerance
        assert compared.good is good


@pytest.mark.parametrize("part", ["attention", "seg"])
def test_small_weights_and_probabilities_changed_by_a_thousandth_are_noticed(part: str, tmp_path: Path) -> None:
    """The smallest number of each tensor, far below the absolute tolerance; of those above 2e-6."""
    case = GOLDEN.cases(part)[0]
    for name in (one.name for one in compared_in(part, case)):
        if not re.search("weights|probabilities", name):
            continue
        tensor = GOLDEN.tensor(name).clone()
        flat = tensor.view(-1)
        place = int(flat.masked_fill(flat < 2e-6, 1.0).argmin())
        flat[place] *= 1.001
        golden = EvaluationGolden(changed_file(tmp_path / "changed.safetensors", {name: tensor}))
        past = {one.name for one in compared_in(part, case, golden) if not one.good}
        assert {one for one in past if not one.endswith("map_unit")} == {name}  # maps are compared with the weights too


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("cls", ["top1", "top3"]),
        ("retrieval.random", ["published", "image_to_text_R@1"]),
        ("retrieval.random", ["published", "text_to_image_mean_rank"]),
        ("retrieval.ties", ["worst_tie", "image_to_text_median_rank"]),
    ],
)
def test_a_changed_number_of_the_header_is_noticed(case: str, keys: list[str], tmp_path: Path) -> None:
    said: dict[str, Any] = GOLDEN.parameters(case)
    for key in keys[-1:] if case != "cls" else keys:
        holder = said if case == "cls" else said[keys[0]]
        holder[key] *= 1.001
    golden = EvaluationGolden(changed_file(tmp_path / "changed.safetensors", {}, {case: json.dumps(said)}))
    past = [one.name for one in compared_in(case.split(".")[0], case, golden) if not one.good]
    assert past == ([f"cls: {key}" for key in keys] if case == "cls" else [f"{case}: {' '.join(keys)}"])


def test_the_tool_runs_as_a_program_and_says_what_is_past_its_tolerance(tmp_path: Path) -> None:
    scores = GOLDEN.tensor("retrieval.random.scores").clone()
    scores[3, 4] *= 1.001
    changed = changed_file(tmp_path / "changed.safetensors", {"retrieval.random.scores": scores})
    command = [sys.executable, "-m", "tools.check_golden", "--evaluation", str(FILE), str(changed)]
    result = subprocess.run(command, cwd=FILE.parents[2], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stderr == f"past tolerance: {changed}\n"
    assert next(line for line in result.stdout.splitlines() if "PAST" in line).split()[0] == "retrieval.random"
    assert all(result.stdout.count(f"  {case} ") == 2 for _, case in CASES)


@pytest.mark.parametrize(
    ("tensors", "header", "said"),
    [
        ({"cls.images": None}, {}, "tensor 'cls.images' is missing"),
        ({"cls.classifier": torch.zeros(2, 2)}, {}, r"cls.classifier: shape \(2, 2\) should be \(64, 5\)"),
        ({}, {"config": "[1]"}, "the header's config must be an object"),
        ({}, {"config": "{}"}, "cls: cannot be used: KeyError|config does not make a model"),
        ({"student.logit_scale": None}, {}, "Missing key.*logit_scale"),
        ({}, {"cls": "no json"}, "the header's cls is no JSON"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    tensors: dict[str, Tensor | None],
    header: dict[str, str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = changed_file(tmp_path / "changed.safetensors", tensors, header)
    assert main(["--evaluation", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: ")
    assert error.count("\n") == 1
    assert re.search(said, error)


def test_a_training_file_is_no_evaluation_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--evaluation", str(FILE.with_name("cosmos_tiny.safetensors"))]) == 2
    assert "not a file of evaluation numbers" in capsys.readouterr().err
