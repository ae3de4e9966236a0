"""The benchmark of DALI measures both decoders, or says why it cannot."""

import json
from pathlib import Path

import pytest

from benchmarks import dali
from cosmos_scale.errors import UserError


def test_figures_of_both_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI, which has no wheel for this machine")
    monkeypatch.setattr(dali, "BATCH", 2)
    assert dali.main(["--photos", "3", "--rounds", "1", "--json", str(tmp_path / "dali.json")]) == 0
    figures = {row["name"]: row["value"] for row in json.loads((tmp_path / "dali.json").read_text())}
    assert set(figures) == {
        "dali_worker_speedup",
        "dali_worker_ms",
        "dali_torch_worker_ms",
        "dali_decoder_ms",
        "dali_colour_ms",
    }
    assert min(figures.values()) > 0


def test_without_dali_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise UserError("data.decoder: dali needs NVIDIA DALI")

    monkeypatch.setattr(dali, "require_dali", absent)
    assert dali.main([]) == 0
    assert capsys.readouterr().out == "nothing to measure: data.decoder: dali needs NVIDIA DALI\n"
