"""The allocator's setting is changed unless the user has set another."""

import pytest
import torch

from cosmos_scale.engine.gpu_memory import VARIABLES, use_expandable_segments


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    given: list[str] = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    return given


def test_segments_may_grow_by_default(settings: list[str]) -> None:
    assert use_expandable_segments()
    assert settings == ["expandable_segments:True"]


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_users_setting_stays(variable: str, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:128")
    assert not use_expandable_segments()
    assert settings == []


def test_the_installed_torch_takes_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes nothing here: no process of the tests has memory on a GPU."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert use_expandable_segments()
    assert not torch.cuda.is_initialized()
