"""Measured rates are read as they were measured, and a tiny machine's measurement holds all that a plan asks for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.errors import UserError
from cosmos_scale.profiling import calibrate as calibrate_module
from cosmos_scale.profiling.calibrate import calibrate
from cosmos_scale.profiling.calibration import (
    Calibration,
    ExchangeTime,
    MeasuredRates,
    OperatorFit,
    ProductRate,
    fit_operators,
    grid_rate,
)
from cosmos_scale.profiling.counts import OperatorCount
from cosmos_scale.profiling.machine import calibrated_machine, read_machine
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.tiny import tiny_config

GRID = tuple(ProductRate("mm", m, k, n, m * k * n * 1e3) for m in (10, 1000) for k in (10, 1000) for n in (10, 1000))
CALIBRATION = Calibration(
    device="cpu",
    threads=1,
    precision="fp32",
    fitted_on="a made-up step",
    products=GRID,
    fits={
        "mm": OperatorFit(2.0, 1e-9),
        "flash": OperatorFit(1e-9, 1e-9),
        "add": OperatorFit(1e-3, 0.5e-9),
    },
    copied=4e9,
    host=1e-5,
    factor=1.1,
    exchanges=(ExchangeTime("all_gather", 4, 1000, 1e-3), ExchangeTime("all_gather", 4, 3000, 2e-3)),
)
RATES = MeasuredRates(CALIBRATION, link=100.0, network=10.0)
SECONDS = 300.0


def test_rates_between_the_grid_lie_on_a_line_in_logarithms() -> None:
    assert grid_rate(GRID, "mm", 10, 1000, 10) == pytest.approx(1e8)
    assert grid_rate(GRID, "mm", 100, 1000, 10) == pytest.approx(1e9)
    assert grid_rate(GRID, "mm", 100, 100, 100) == pytest.approx(1e9)
    assert grid_rate(GRID, "addmm", 1, 1000, 99_999) == pytest.approx(grid_rate(GRID, "mm", 10, 1000, 1000))


def test_a_fit_finds_what_rows_were_made_of() -> None:
    rows = [
        OperatorCount("", "copies", "cat", (), "", launches, nbytes, 0, 0) for launches, nbytes in ((3, 10), (5, 90))
    ]
    fit = fit_operators([(row, 0.1 * row.launches + 0.01 * row.nbytes) for row in rows], GRID)["cat"]
    assert (fit.first, fit.second) == pytest.approx((0.1, 0.01))
    less = fit_operators([(row, 0.1 * row.launches - 0.001 * row.nbytes) for row in rows], GRID)["cat"]
    assert less.second == 0.0  # no negative shares
    assert less.first > 0.0


@pytest.mark.parametrize(
    ("count", "seconds"),
    [
        (OperatorCount("", "products", "mm", (1, 10, 1000, 10), "float32", 1, 0, 10**9, 10**8), 3.0),
        (OperatorCount("", "attention", "flash", (1, 5, 5, 1, 8, 0), "float32", 1, 10**9, 0, 10**9), 2.0),
        (OperatorCount("", "norms and pointwise", "add", (), "float32", 1000, 10**9, 10**9, 0), 2.0),
        # None in the step: as the fastest product, or as a copy.
        (OperatorCount("", "products", "addmm", (1, 10, 1000, 10), "float32", 1, 0, 0, 10**12), 1.0),
        (OperatorCount("", "copies", "cat", (), "float32", 1, 10**9, 10**9, 0), 0.5),
    ],
)
def test_operators_take_what_they_took_in_the_step(count: OperatorCount, seconds: float) -> None:
    assert RATES.operator_seconds(count, "fp32") == pytest.approx(1.1 * seconds)


def test_collectives_lie_on_the_measured_curve() -> None:
    assert RATES.exchange_seconds("all_gather", 2000, 1, 4) == pytest.approx(1.5e-3)
    assert RATES.exchange_seconds("all_gather", 6000, 1, 4) == pytest.approx(4e-3)
    assert RATES.exchange_seconds("all_gather", 2000, 1, 2) == pytest.approx(1.5e-3 * 0.5 / 0.75)
    eight = 1.5e-3 * (7 / 8) / 0.75 + 2000 / 4 * 0.5 / 10e9 + 0.5e-3
    assert RATES.exchange_seconds("all_gather", 2000, 2, 4) == pytest.approx(eight)
    assert RATES.exchange_seconds("all_reduce", 4 * 10**11, 1, 4) == pytest.approx(6.0)  # not measured: by the link
    assert RATES.exchange_seconds("all_reduce", 100, 1, 1) == 0.0


def test_a_machine_without_its_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = calibrated_machine(CALIBRATION)
    path.write_text(machine.to_json())
    assert read_machine(path) == machine
    path.write_text(machine.to_json().replace('"m": 1000', '"m": 999', 1))
    with pytest.raises(UserError, match="must hold each combination"):
        read_machine(path)


def measured(rank: int, world_size: int) -> Calibration:
    torch.set_num_threads(1)
    vars(calibrate_module).update(GRID_CPU=(16, 64), NARROW_STEPS=2)  # in this process, which ends with the test
    return calibrate(tiny_config(train={"global_batch": 4, "schedule_steps": 100}), 2, start_ranks("cpu"))


def test_a_machine_is_measured(tmp_path: Path) -> None:
    """Two ranks measure all that a plan asks for, and the file holds it."""
    found, _ = run_ranks(measured, 2, timeout=SECONDS)
    assert len(found.products) == 8
    assert {point.kind for point in found.exchanges} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert {point.world_size for point in found.exchanges} == {2}
    assert {"native_layer_norm", "mm", "addmm", "_fused_adamw_"} <= set(found.fits)
    assert any("attention" in name for name in found.fits)
    assert found.factor == 1.0  # of several ranks, which wait for each other
    path = tmp_path / "machine.json"
    path.write_text(calibrated_machine(found).to_json())
    assert read_machine(path).calibration == replace(found)


@pytest.mark.parametrize("heads", [1, 2, 8, 12])
def test_the_narrow_step_is_of_a_model_with_any_number_of_heads(heads: int) -> None:
    """Its text tower is as wide as its features, which all heads share."""
    model = tiny_config().model.model_copy(update={"embed_dim": 96, "pooler_heads": heads})
    narrow = calibrate_module._narrow(tiny_config().model_copy(update={"model": model})).model
    assert narrow.embed_dim == narrow.text.width == 8 * heads
