"""What a run's model asks of this machine is checked first, in one line; and the keys reach the computation."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from cosmos_scale.config import ModelConfig
from cosmos_scale.engine.requirements import check_model
from cosmos_scale.errors import UserError
from cosmos_scale.kernels.attention import Backend
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.model.transformer import Attention
from tests.model.models import SMALL, small_batch

CPU = torch.device("cpu")
GPU_ONLY = ("flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_varlen", "xformers")


def changed(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate(SMALL.model_dump() | keys)


def test_the_key_names_every_back_end() -> None:
    annotation = ModelConfig.model_fields["attention"].annotation
    assert get_args(annotation) == get_args(Backend)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_everywhere_passes(name: str, dtype: torch.dtype) -> None:
    check_model(changed(attention=name), CPU, dtype)


@pytest.mark.parametrize("name", GPU_ONLY)
def test_a_back_end_that_cannot_run_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"^model.attention: '{name}' cannot run here: it needs a CUDA device, not cpu"):
        check_model(changed(attention=name), CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "pooler_heads", "installed", "reason"),
    [
        (torch.float32, 4, True, r"needs float16 or bfloat16, not torch\.float32; rule"),
        (torch.bfloat16, 8, True, r"multiple of 8 up to 256, not 4 \(model\.embed_dim / model\.pooler_heads\)"),
        (torch.bfloat16, 4, False, "cannot run here: not here; rule"),
    ],
)
def test_the_reason_on_a_gpu_is_told(
    dtype: torch.dtype, pooler_heads: int, installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))  # there is no GPU to ask
    monkeypatch.setattr(
        "cosmos_scale.kernels.attention.find_function", lambda backend: print if installed else "not here"
    )
    with pytest.raises(UserError, match=reason) as raised:
        check_model(changed(attention="flash_attn_2", pooler_heads=pooler_heads), torch.device("cuda"), dtype)
    assert len(str(raised.value).splitlines()) == 1


def test_a_compiler_is_asked_for_only_where_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_model(SMALL, CPU, torch.float32)
    with pytest.raises(UserError, match=r"^model\.compile: true, but there is no compiler \(no-such-compiler\)"):
        check_model(changed(compile=True), CPU, torch.float32)
    existing = shutil.which("true")
    assert existing is not None
    monkeypatch.setenv("CXX", existing)
    check_model(changed(compile=True), CPU, torch.float32)


def test_a_folder_of_compiled_code_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left by another user, or on a read-only mount: the first step would end in torch's traceback."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")
    check_model(SMALL, CPU, torch.float32)
    with pytest.raises(UserError, match=r"^TORCHINDUCTOR_CACHE_DIR: /proc cannot be written to: .*; rule: with model"):
        check_model(changed(compile=True), CPU, torch.float32)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    check_model(changed(compile=True), CPU, torch.float32)
    assert not list((tmp_path / "cache").iterdir())


def test_the_key_reaches_both_towers_and_both_poolers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CosmosModel(changed(attention="xformers"))
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == SMALL.vision.layers + SMALL.text.layers + 2
    asked = []

    def choose(backend: str, *_: object) -> str:
        asked.append(backend)
        return "sdpa"

    monkeypatch.setattr("cosmos_scale.kernels.attention.choose_backend", choose)
    model(small_batch(2))
    assert asked == ["xformers"] * len(layers)
