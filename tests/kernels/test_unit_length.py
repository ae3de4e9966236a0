"""Normalised features and their gradients against torch's own normalisation in float64."""

import pytest
import torch
from torch.nn import functional

from cosmos_scale.kernels.unit_length import normalise


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 4e-7), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
)
def test_features_and_gradients_are_those_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Tolerance: an error of the dtype's rounding, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    features, by_unit = (torch.randn(3, 5, 48, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    features[0, 0] = 0.0  # has no direction
    if dtype in (torch.float32, torch.float64):
        features[0, 1] *= 1e-14  # shorter than what torch's normalisation divides by at least
    features.requires_grad_()
    exact = features.detach().double().requires_grad_()
    ours, wanted = normalise(features), functional.normalize(exact, dim=-1)
    (by_features,) = torch.autograd.grad(ours, features, by_unit)
    (wanted_by_features,) = torch.autograd.grad(wanted, exact, by_unit.double())
    assert ours.dtype == by_features.dtype == dtype
    assert (ours - wanted).abs().max() <= tolerance
    finite = wanted_by_features.to(dtype).isfinite()  # 1 / LEAST_LENGTH is infinite in float16
    error = (by_features.double() - wanted_by_features).abs()
    largest = wanted_by_features.abs().amax(dim=-1, keepdim=True)
    assert (error <= 2 * tolerance * largest)[finite].all()
    assert torch.equal(by_features.isfinite(), finite)
