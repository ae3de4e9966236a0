"""The COSMOS loss in one process: formulas, gradients, finiteness, precision, and no waiting for the host."""

import pytest
import torch

from cosmos_scale.batch import Features, TeacherFeatures
from cosmos_scale.loss import CosmosLoss
from tests.loss.reference import Counts, operations, plain_loss_and_gradients, random_features, relative_differences

# Float32 against float64: logits near 14 carry rounding of 1e-6, so losses of order 1 and softmaxes do too.
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 6e-6  # 3.1e-6 was seen, by CPU

COUNTS = {
    "published": Counts(V=8, K=8, V_global=2, K_global=2, E=32, G=6),
    "uneven": Counts(V=5, K=3, V_global=3, K_global=1, E=16, G=7),
    "one of each": Counts(V=1, K=1, V_global=1, K_global=1, E=8, G=5),
    "pairs large enough to be taken one by one": Counts(V=3, K=2, V_global=2, K_global=1, E=32, G=130),
    "captions as many as global": Counts(V=2, K=2, V_global=1, K_global=2, E=8, G=9),
}


@pytest.mark.parametrize("scales", [(1 / 0.07, 1 / 0.07), (3.0, 40.0)], ids=["start", "apart"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_matches_autograd_of_the_plain_formulas(counts: Counts, scales: tuple[float, float]) -> None:
    features, teacher = random_features(counts, scale=scales[0], distill_scale=scales[1])
    clip, distill, gradients = plain_loss_and_gradients(features, teacher)
    output = CosmosLoss("true")(features, teacher)
    assert abs(output.clip - clip) <= LOSS_TOLERANCE
    assert abs(output.distill - distill) <= LOSS_TOLERANCE
    assert abs(output.total - clip - distill) <= LOSS_TOLERANCE
    assert output.finite
    for name, actual, wanted in zip(Features._fields, output.gradients, features, strict=True):
        assert actual.shape == wanted.shape, name
        assert actual.dtype == torch.float32, name
    differences = relative_differences(output.gradients, gradients)
    # At scale 40 logits are three times as large as at the start, and so is their rounding.
    assert max(differences.values()) <= GRADIENT_TOLERANCE * max(1.0, scales[1] * 0.07), differences


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_columns_by_parts_match_too(counts: Counts) -> None:
    features, teacher = random_features(counts, seed=1)
    clip, distill, gradients = plain_loss_and_gradients(features, teacher)
    output = CosmosLoss("true", columns_at_once=3)(features, teacher)
    assert abs(output.clip - clip) <= LOSS_TOLERANCE
    assert abs(output.distill - distill) <= LOSS_TOLERANCE
    differences = relative_differences(output.gradients, gradients)
    assert max(differences.values()) <= GRADIENT_TOLERANCE, differences


def test_batch_of_one_has_neither_loss_nor_gradient() -> None:
    features, teacher = random_features(Counts(V=3, K=2, V_global=2, K_global=1, E=8, G=1))
    output = CosmosLoss("true")(features, teacher)
    # The softmax over a single logit is 1 up to the rounding of exp(logit - logsumexp).
    assert abs(output.total) <= LOSS_TOLERANCE
    assert output.finite
    for name, gradient in zip(Features._fields, output.gradients, strict=True):
        assert gradient.abs().max() <= GRADIENT_TOLERANCE * 14, name


def test_float64_features_match_to_float64() -> None:
    features, teacher = random_features(COUNTS["uneven"])
    features = Features(*(tensor.double() for tensor in features))
    teacher = TeacherFeatures(*(tensor.double() for tensor in teacher))
    _, _, gradients = plain_loss_and_gradients(features, teacher)
    differences = relative_differences(CosmosLoss("true")(features, teacher).gradients, gradients)
    assert max(differences.values()) <= 1e-12, differences  # the same sums in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_keep_float32_logits_and_gradients(dtype: torch.dtype) -> None:
    features, teacher = random_features(COUNTS["published"])
    features = Features(*(tensor.to(dtype) for tensor in features))
    teacher = TeacherFeatures(*(tensor.to(dtype) for tensor in teacher))
    # The oracle sees the same rounded features and scales: what remains is float32's rounding, not bfloat16's 4e-3.
    clip, distill, gradients = plain_loss_and_gradients(features, teacher)
    output = CosmosLoss("true")(features, teacher)
    assert abs(output.total - clip - distill) <= LOSS_TOLERANCE
    assert {gradient.dtype for gradient in output.gradients} == {torch.float32}
    differences = relative_differences(output.gradients, gradients)
    assert max(differences.values()) <= GRADIENT_TOLERANCE, differences


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [*Features._fields, *(f"teacher.{name}" for name in TeacherFeatures._fields)])
def test_any_non_finite_feature_is_flagged(name: str, value: float) -> None:
    features, teacher = random_features(COUNTS["uneven"])
    owner = teacher if name.startswith("teacher.") else features
    # The last view: of `image` it enters no pair, and is flagged nevertheless.
    getattr(owner, name.removeprefix("teacher.")).view(-1)[-1] = value
    output = CosmosLoss("true")(features, teacher)
    assert not output.finite


def test_inputs_keep_their_values_and_need_no_graph() -> None:
    features, teacher = random_features(COUNTS["published"])
    leaves = Features(*(tensor.clone().requires_grad_() for tensor in features))
    output = CosmosLoss("true")(leaves, teacher)
    assert not output.total.requires_grad
    assert not any(gradient.requires_grad for gradient in output.gradients)
    expected, expected_teacher = random_features(COUNTS["published"])
    for actual, wanted in zip((*leaves, *teacher), (*expected, *expected_teacher), strict=True):
        assert torch.equal(actual, wanted)


def test_fewer_views_than_the_teacher_are_refused() -> None:
    features, teacher = random_features(Counts(V=1, K=1, V_global=2, K_global=1, E=8, G=2))
    with pytest.raises(ValueError, match="1 image views, fewer than the teacher's 2"):
        CosmosLoss("true")(features, teacher)


def test_features_of_unequal_batches_are_refused() -> None:
    features, teacher = random_features(COUNTS["uneven"])
    with pytest.raises(ValueError, match=r"features \[3, 6, 16\] and \[5, 7, 16\] differ in samples or width"):
        CosmosLoss("true")(features._replace(text=features.text[:, 1:]), teacher)


# Operations by which a host waits for its device: values read, a shape that depends on values, and torch.tensor's copy.
HOST_READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::lift_fresh",
}


def test_nothing_waits_for_the_host() -> None:
    features, teacher = random_features(COUNTS["published"])
    loss = CosmosLoss("true")
    names = operations(lambda: loss(features, teacher))
    assert len(names) > 50
    assert HOST_READS.isdisjoint(names)
    # A read would be seen:
    assert not HOST_READS.isdisjoint(operations(lambda: loss(features, teacher).total.item()))


def test_runs_where_values_cannot_be_read() -> None:
    """Meta tensors have no values, so any look at one raises, whichever operation it comes from."""
    features, teacher = random_features(COUNTS["published"])
    meta = Features(*(tensor.to("meta") for tensor in features))
    output = CosmosLoss("true")(meta, TeacherFeatures(*(tensor.to("meta") for tensor in teacher)))
    assert output.finite.is_meta
    assert [gradient.shape for gradient in output.gradients] == [tensor.shape for tensor in features]
