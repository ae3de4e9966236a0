"""The law of every tensor's initial values, against a table of the published initialisation."""

import math
import re
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from cosmos_scale.config import ModelConfig, TextConfig, VisionConfig
from cosmos_scale.model.cosmos import CosmosModel
from tests.model.models import SMALL, initialised

V, T, P, L = 192, 128, 8, 3  # vision width, text width (the embedding's too), patch size, text layers
CONFIG = ModelConfig(
    embed_dim=T,
    vision=VisionConfig(image_size=32, patch_size=P, width=V, layers=2),
    text=TextConfig(context_length=24, vocab_size=600, width=T, layers=L, heads=2),
)
SEEDS = 8  # drawn together, so that vectors too give enough values to judge by


class Law(NamedTuple):
    """constant: every value is `size`. normal: mean 0, standard deviation `size`. uniform: -size .. size."""

    kind: Literal["constant", "normal", "uniform"]
    size: float


LAWS = {
    r"(logit_scale|distill_logit_scale)": Law("constant", math.log(1 / 0.07)),
    r".*\bln_(pre|post|final|1|2|q|k)\.weight": Law("constant", 1.0),
    r".*\bln_(pre|post|final|1|2|q|k)\.bias": Law("constant", 0.0),
    r".*attn\.(in_proj_bias|out_proj\.bias)": Law("constant", 0.0),
    r"visual\.(class_embedding|positional_embedding|proj)": Law("normal", V**-0.5),
    r"visual\.conv1\.weight": Law("uniform", (3 * P * P) ** -0.5),
    r"visual\.transformer\.resblocks\.\d\.attn\.in_proj_weight": Law("uniform", math.sqrt(6 / (4 * V))),
    r"visual\.transformer\.resblocks\.\d\.attn\.out_proj\.weight": Law("uniform", V**-0.5),
    r"visual\.transformer\.resblocks\.\d\.mlp\.c_fc\.(weight|bias)": Law("uniform", V**-0.5),
    r"visual\.transformer\.resblocks\.\d\.mlp\.c_proj\.(weight|bias)": Law("uniform", (4 * V) ** -0.5),
    r"token_embedding\.weight": Law("normal", 0.02),
    r"positional_embedding": Law("normal", 0.01),
    r"text_projection": Law("normal", T**-0.5),
    r"transformer\.resblocks\.\d\.attn\.in_proj_weight": Law("normal", T**-0.5),
    r"transformer\.resblocks\.\d\.(attn\.out_proj|mlp\.c_proj)\.weight": Law("normal", T**-0.5 * (2 * L) ** -0.5),
    r"transformer\.resblocks\.\d\.mlp\.c_fc\.weight": Law("normal", (2 * T) ** -0.5),
    r"transformer\.resblocks\.\d\.mlp\.c_fc\.bias": Law("uniform", T**-0.5),
    r"transformer\.resblocks\.\d\.mlp\.c_proj\.bias": Law("uniform", (4 * T) ** -0.5),
    r"(visual\.attn_cross_pool|text_attn_cross_pool)\.attn\.in_proj_weight": Law("uniform", math.sqrt(6 / (4 * T))),
    r"(visual\.attn_cross_pool|text_attn_cross_pool)\.attn\.out_proj\.weight": Law("uniform", T**-0.5),
    r"image_token_mapping\.(weight|bias)": Law("uniform", V**-0.5),
    r"text_token_mapping\.(weight|bias)": Law("uniform", T**-0.5),
}


def broken_rule(values: Tensor, law: Law) -> str | None:
    """Name the first way in which values do not follow a law.

    A right sample passes each bound but for a chance below 1e-5: 5 standard errors of mean and standard deviation, 6 of
    the kurtosis (3 or 1.8, which tells the two laws apart), Kolmogorov's sqrt(n) D at most 2.8, the ends of a uniform
    reached, and 3.3 sigma of a normal where n suffices.
    """
    values = values.double().flatten()
    n = len(values)
    if law.kind == "constant":
        return None if bool((values.float() == torch.tensor(law.size)).all()) else "constant"
    sigma, kurtosis = (law.size, 3.0) if law.kind == "normal" else (law.size / math.sqrt(3), 1.8)
    if abs(values.mean()) > 5 * sigma / n**0.5:
        return "mean"
    if abs(values.square().mean().sqrt() / sigma - 1) > 5 * ((kurtosis - 1) / (4 * n)) ** 0.5:
        return "standard deviation"
    if abs(values.pow(4).mean() / values.square().mean() ** 2 - kurtosis) > 6 * (24 / n) ** 0.5:
        return "kurtosis"
    largest = values.abs().max()
    if law.kind == "uniform" and not law.size * (1 - 25 / n) <= largest <= law.size * (1 + 1e-6):  # float32's rounding
        return "ends"
    if law.kind == "normal" and n >= 20_000 and largest < 3.3 * sigma:
        return "tails"
    expected = torch.special.ndtr(values / sigma) if law.kind == "normal" else (values / law.size + 1) / 2
    ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = (expected.sort().values - ranks).abs().max() + 1 / n
    return "distribution" if n**0.5 * distance > 2.8 else None


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    models = [dict(initialised(CONFIG, seed).named_parameters()) for seed in range(SEEDS)]
    return {name: torch.stack([model[name].detach() for model in models]) for name in models[0]}


def test_every_tensor_follows_its_law(values: dict[str, Tensor]) -> None:
    used = set()
    for name, drawn in values.items():
        matching = [pattern for pattern in LAWS if re.fullmatch(pattern, name)]
        assert len(matching) == 1, f"{name} is ruled by {matching}"
        used |= set(matching)
        rule = broken_rule(drawn, LAWS[matching[0]])
        assert rule is None, f"{name} breaks {LAWS[matching[0]]}: {rule}"
    assert used == set(LAWS)


@pytest.mark.parametrize("n", [SEEDS * T, SEEDS * T * T])
def test_the_check_refuses_near_misses(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    normal, uniform = torch.randn(n, generator=generator), 2 * torch.rand(n, generator=generator) - 1
    assert broken_rule(normal, Law("normal", 1.0)) is None
    assert broken_rule(uniform, Law("uniform", 1.0)) is None
    assert broken_rule(normal, Law("uniform", math.sqrt(3))) == "kurtosis"
    assert broken_rule(uniform, Law("normal", 1 / math.sqrt(3))) == "kurtosis"
    assert broken_rule(normal * 1.2, Law("normal", 1.0)) == "standard deviation"
    assert broken_rule(normal + 0.2, Law("normal", 1.0)) == "mean"
    assert broken_rule(uniform * 0.9, Law("uniform", 1.0)) is not None
    assert broken_rule(torch.zeros(n), Law("normal", 1.0)) is not None
    truncated = normal[normal.abs() < 2]
    assert broken_rule(truncated, Law("normal", 1.0)) == "standard deviation"


def test_draws_are_independent(values: dict[str, Tensor]) -> None:
    # A correlation of n right pairs stays within 6 / sqrt(n); a shared or repeated draw gives 1.
    drawn = {name: tensor for name, tensor in values.items() if tensor.float().std() > 0}
    for name, tensor in drawn.items():
        flat = tensor.double().flatten(1)
        between_seeds = torch.corrcoef(flat) - torch.eye(SEEDS)
        assert between_seeds.abs().max() <= 6 / flat.shape[1] ** 0.5, f"{name}: seeds repeat"
    starts = {name: tuple((tensor[0].flatten()[:8] / tensor[0].std()).tolist()) for name, tensor in drawn.items()}
    rounded = {tuple(round(value, 3) for value in start) for start in starts.values()}
    assert len(rounded) == len(drawn), "two tensors hold the same draws"


def test_parameters_are_nan_before() -> None:
    assert all(parameter.isnan().all() for parameter in CosmosModel(SMALL).parameters())


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initialised(SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    half = CosmosModel(SMALL).bfloat16()
    half.init_weights(torch.Generator().manual_seed(5))
    global_state = torch.get_rng_state()
    second = initialised(SMALL, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), global_state), "drew from the global generator"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor.bfloat16(), half.state_dict()[name]), f"{name} depends on the dtype"
    other = initialised(SMALL, seed=6).state_dict()
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
