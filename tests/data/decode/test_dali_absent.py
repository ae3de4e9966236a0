"""The messages for a user who asks for DALI and lacks it, and the limits of its options."""

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from cosmos_scale.config import DaliConfig, ViewsConfig
from cosmos_scale.data.decode.dali import DaliDecoder, require_dali
from cosmos_scale.errors import UserError
from tests.conftest import REPOSITORY

# A Python in which DALI cannot be imported, with the torch of each version of CUDA. To check pictures needs no DALI.
WITHOUT_DALI = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "nvidia.dali":
            raise ModuleNotFoundError("No module named 'nvidia.dali'", name=name)
sys.meta_path.insert(0, Hidden())

import torch
from cosmos_scale.config import DaliConfig, ViewsConfig
from cosmos_scale.data.decode.dali import DaliDecoder, picture_for_dali, stack
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.errors import UserError

try:
    picture_for_dali(b"no picture", 100)
except DamagedSample:
    print("prepared")
for torch.version.cuda in (None, "11.8", "12.4", "13.0"):
    try:
        DaliDecoder(ViewsConfig(), 32, 1, torch.device("cpu"), DaliConfig())
    except UserError as error:
        print(error)
"""


def test_absent_dali_is_named_with_the_line_that_installs_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_DALI], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    begin = "data.decoder: dali needs NVIDIA DALI (No module named 'nvidia.dali'): "
    assert run.stdout.splitlines() == [
        "prepared",
        begin + 'pip install "nvidia-dali-cuda130>=2.3,<3", or take decoder: torch',
        begin + "there is none for this torch's CUDA 11.8; install a torch for CUDA 12 or 13, or take decoder: torch",
        begin + 'pip install "nvidia-dali-cuda120>=2.3,<3", or take decoder: torch',
        begin + 'pip install "nvidia-dali-cuda130>=2.3,<3", or take decoder: torch',
    ]


@pytest.mark.parametrize(
    ("version", "refused"), [("2.3.0", False), ("2.10.1", False), ("3.0.0", True), ("1.50.0", True)]
)
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    dali = pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(dali, "__version__", version)
    if not refused:
        require_dali()
        return
    with pytest.raises(UserError, match=rf"^data.decoder: dali needs NVIDIA DALI 2.3 .* not {version}: pip install"):
        DaliDecoder(ViewsConfig(), 32, 1, torch.device("cpu"), DaliConfig())


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"threads": 0}, "threads"),
        ({"prefetch": -1}, "prefetch"),
        ({"prefetch": 17}, "prefetch"),
        ({"hw_decoder_load": 1.1}, "hw_decoder_load"),
        ({"preallocate_width": 70_000, "preallocate_height": 1}, "preallocate_width"),
        ({"preallocate_width": 640}, "together with preallocate_height"),
        ({"hw_decoder": 1}, "hw_decoder"),
    ],
)
def test_options_have_limits(options: dict[str, float], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        DaliConfig.model_validate(options)
