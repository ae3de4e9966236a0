"""Normalised features and their gradients against torch's own normalisation in float64."""

import pytest
import torch
from torch.nn import functional

from cosmos_scale.kernels.unit_length import normalise
from cosmos_scale.testing.tolerances import tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_and_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    limit = tolerance("unit length, of the largest", dtype)
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
    assert (ours - wanted).abs().max() <= limit
    finite = wanted_by_features.to(dtype).isfinite()  # 1 / LEAST_LENGTH is infinite in float16
    error = (by_features.double() - wanted_by_features).abs()
    largest = wanted_by_features.abs().amax(dim=-1, keepdim=True)
    assert (error <= 2 * limit * largest)[finite].all()
    assert torch.equal(by_features.isfinite(), finite)
