"""View plans: the stream itself, torchvision's laws, probabilities per kind of view, and independence."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from cosmos_scale.config import BlurConfig, JitterConfig, ViewsConfig
from cosmos_scale.data.samples.sample import CAPTION_STREAM, VIEW_STREAM, SampleKey, sample_generator
from cosmos_scale.data.samples.view_plan import (
    NO_JITTER,
    NO_SOLARISE,
    Floats,
    ViewPlan,
    plan_views,
)

VIEWS = ViewsConfig()
DRAWS = 4000
# With fixed seeds these tests always give the same result. A right law gives a p-value below this limit in one of a
# thousand seeds; at 4,000 draws a law that is off by a few hundredths gives far smaller p-values.
P_VALUE = 1e-3
# In standard deviations: a right share exceeds the limit by chance in one of 15,000 seeds.
SIGMAS = 4.0


def plans(count: int = DRAWS, height: int = 416, width: int = 576, views: ViewsConfig = VIEWS) -> list[ViewPlan]:
    return [plan_views(views, 224, SampleKey(3, 1, sample), height, width) for sample in range(count)]


@pytest.fixture(scope="module")
def many() -> list[ViewPlan]:
    return plans()


def assert_same(first: ViewPlan, second: ViewPlan) -> None:
    for field in ViewPlan.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field), err_msg=field)


def assert_share(flags: object, probability: float) -> None:
    values = np.asarray(flags, dtype=np.float64).ravel()
    tolerance = SIGMAS * np.sqrt(probability * (1 - probability) / values.size)
    assert abs(values.mean() - probability) <= tolerance


def philox4x64(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox-4x64-10 in plain integers (Salmon et al. 2011, figure 2)."""
    mask = 2**64 - 1
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        product0, product1 = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (product1 >> 64) ^ c1 ^ k0, product1 & mask, (product0 >> 64) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (7, 3, 123_456_789, 2), (2**64 - 1, 2**40, 2**63, 2**32)])
@pytest.mark.parametrize("stream", [VIEW_STREAM, CAPTION_STREAM])
def test_stream_is_philox_of_key_and_counter(key: tuple[int, int, int, int], stream: int) -> None:
    seed, epoch, sample, repeat = key
    # NumPy advances the counter before it draws, hence 1 and 2.
    words = [w for block in (1, 2) for w in philox4x64((seed, epoch), (block, repeat, sample, stream))]
    expected = [(word >> 11) * 2.0**-53 for word in words]
    assert sample_generator(SampleKey(*key), stream).random(8).tolist() == expected


def test_plan_is_a_function_of_its_key() -> None:
    key = SampleKey(5, 2, 77)
    assert_same(plan_views(VIEWS, 224, key, 300, 400), plan_views(VIEWS, 224, key, 300, 400))
    for other in (SampleKey(6, 2, 77), SampleKey(5, 3, 77), SampleKey(5, 2, 78), SampleKey(5, 2, 77, 1)):
        changed = plan_views(VIEWS, 224, other, 300, 400)
        assert not np.array_equal(changed.jitter_factors, plan_views(VIEWS, 224, key, 300, 400).jitter_factors)


def test_decisions_do_not_lean_on_each_other() -> None:
    """A changed probability, or a view more or less, leaves everything else as it was."""
    key = SampleKey(5, 2, 77)
    plan = plan_views(VIEWS, 224, key, 300, 400)
    fewer = plan_views(ViewsConfig(local_crops=2), 224, key, 300, 400)
    plain = plan_views(
        ViewsConfig(flip=0, grey=0, solarise=0, jitter=JitterConfig(probability=0), blur=BlurConfig(local=0)),
        *(224, key, 300, 400),
    )
    np.testing.assert_array_equal(fewer.boxes, plan.boxes[:4])
    np.testing.assert_array_equal(fewer.jitter_factors, plan.jitter_factors[:4])
    np.testing.assert_array_equal(plain.boxes, plan.boxes)
    np.testing.assert_array_equal(plain.blur_radius[:2], plan.blur_radius[:2])


def test_neighbouring_samples_and_decisions_are_uncorrelated(many: list[ViewPlan]) -> None:
    features_NVF = np.array(
        [
            np.column_stack(
                [plan.boxes, plan.flip, plan.grey, plan.jitter_factors, plan.jitter_order, plan.blur_radius]
            )
            for plan in many
        ]
    )
    columns = features_NVF.reshape(DRAWS, -1)
    # Within a view the box's corner depends on its size by law, so decisions are compared between views.
    view = np.repeat(np.arange(features_NVF.shape[1]), features_NVF.shape[2])
    correlation = np.corrcoef(columns.T)[view[:, None] != view[None, :]]
    # 5 standard deviations, because some 6,000 pairs are compared.
    assert np.abs(correlation).max() < 5 / np.sqrt(DRAWS)
    following = [np.corrcoef(column[:-1], column[1:])[0, 1] for column in columns.T]
    assert np.abs(following).max() < 5 / np.sqrt(DRAWS)


# The smallest size shows a range whose end is off by one.
@pytest.mark.parametrize(("height", "width"), [(416, 576), (480, 320), (150, 400), (12, 16)])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_crops_follow_random_resized_crop(kind: str, height: int, width: int) -> None:
    view, scale = (0, VIEWS.global_scale) if kind == "global" else (2, VIEWS.local_scale)
    ours = np.array([plan.boxes[view] for plan in plans(height=height, width=width)], dtype=np.float64)
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), list(VIEWS.ratio)) for _ in range(DRAWS)], dtype=np.float64
    )

    def measures(boxes: Floats) -> list[tuple[str, Floats]]:
        top, left, h, w = boxes.T
        margins = [("top", top), ("left", left), ("bottom", height - top - h), ("right", width - left - w)]
        return [("area", h * w), ("ratio", w / h), *margins]

    for (name, mine), (_, reference) in zip(measures(ours), measures(theirs), strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > P_VALUE, name


@pytest.mark.parametrize(("height", "width"), [(60, 1000), (1000, 60), (1, 90), (90, 1), (1, 1), (3, 1000)])
def test_a_picture_too_long_gets_the_centre_crop(height: int, width: int) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), list(VIEWS.global_scale), list(VIEWS.ratio))
    plan = plan_views(ViewsConfig(global_crops=5), 224, SampleKey(0, 0, 0), height, width)
    assert (plan.boxes[:5] == expected).all()


EXTREMES = (0.0011, 0.01, 1.0, 100.0, 1000.0)


@pytest.mark.parametrize("ratio", [(low, high) for low in EXTREMES for high in EXTREMES if low <= high])
@pytest.mark.parametrize("scale", [(1e-300, 1e-299), (1e-6, 1.0), (1.0, 1.0)])
def test_crops_of_extreme_ratios_and_scales_have_a_pixel(
    ratio: tuple[float, float], scale: tuple[float, float]
) -> None:
    views = ViewsConfig(ratio=ratio, global_scale=scale, local_scale=scale)
    for height, width in ((48, 48), (1, 1), (1, 3000), (3000, 1), (20, 24)):
        for sample in range(5):
            top, left, h, w = plan_views(views, 224, SampleKey(0, 0, sample), height, width).boxes.T
            assert min(*h, *w) >= 1
            assert min(*top, *left) >= 0
            assert (top + h <= height).all()
            assert (left + w <= width).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**62))
def test_boxes_lie_inside_the_picture(height: int, width: int, sample: int) -> None:
    top, left, h, w = plan_views(VIEWS, 224, SampleKey(0, 0, sample), height, width).boxes.T
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_jitter_follows_color_jitter(many: list[ViewPlan]) -> None:
    factors = np.concatenate([plan.jitter_factors for plan in many])
    jittered = (factors != NO_JITTER).any(axis=1)
    assert_share(jittered, 0.8)
    assert (factors[jittered] != NO_JITTER).all(), "either all four operations or none"

    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(0)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    params = [ColorJitter.get_params(*ranges)[1:] for _ in range(DRAWS)]
    for operation, (reference, ends) in enumerate(zip(np.array(params).T, ranges, strict=True)):
        drawn = factors[jittered][:, operation]
        assert stats.ks_2samp(drawn, reference).pvalue > P_VALUE
        # The range itself, of which KS misses two hundredths: all 25,000 draws fall short of an end by a thousandth
        # of the range in one choice of seed of 10^11.
        assert [drawn.min(), drawn.max()] == pytest.approx(ends, abs=1e-3 * (ends[1] - ends[0]))
        assert ends[0] <= drawn.min() <= drawn.max() <= ends[1]


def test_jitter_orders_are_uniform(many: list[ViewPlan]) -> None:
    orders = np.concatenate([plan.jitter_order for plan in many])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    _, counts = np.unique(orders @ [1000, 100, 10, 1], return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > P_VALUE


def test_probabilities_per_kind_of_view(many: list[ViewPlan]) -> None:
    assert_share([plan.flip for plan in many], 0.5)
    assert_share([plan.grey for plan in many], 0.2)
    radius = np.array([plan.blur_radius for plan in many])
    assert (radius[:, 0] > 0).all()
    assert_share(radius[:, 1] > 0, 0.1)
    assert_share(radius[:, 2:] > 0, 0.5)
    uniform = stats.uniform(0.1, 1.9)
    assert stats.kstest(radius[:, 0], uniform.cdf).pvalue > P_VALUE
    assert stats.kstest(radius[:, 2:][radius[:, 2:] > 0], uniform.cdf).pvalue > P_VALUE
    solarise = np.array([plan.solarise for plan in many])
    assert_share(solarise[:, 1] == 128, 0.2)
    assert set(np.unique(solarise[:, 1])) == {128, NO_SOLARISE}
    assert (np.delete(solarise, 1, axis=1) == NO_SOLARISE).all()


def test_view_kinds_and_sides() -> None:
    plan = plan_views(ViewsConfig(global_crops=3, local_crops=2, local_size=40), 100, SampleKey(0, 0, 0), 300, 300)
    assert plan.sides.tolist() == [100, 100, 100, 40, 40]
    always = ViewsConfig(
        global_crops=1, local_crops=3, solarise=1.0, blur=BlurConfig(first_global=0, other_globals=1, local=1)
    )
    plan = plan_views(always, 100, SampleKey(0, 0, 0), 300, 300)
    assert (plan.solarise == NO_SOLARISE).all(), "a local crop in second place is not the second global crop"
    assert (plan.blur_radius > 0).tolist() == [False, True, True, True]


def test_what_is_switched_off_stays_off() -> None:
    jitter = JitterConfig(probability=1.0, hue=0.0, saturation=0.0)
    for plan in plans(50, views=ViewsConfig(flip=0, grey=0, solarise=0, jitter=jitter)):
        assert not plan.flip.any()
        assert not plan.grey.any()
        assert (plan.solarise == NO_SOLARISE).all()
        assert (plan.jitter_factors[:, 2:] == NO_JITTER[2:]).all()
        assert (plan.jitter_factors[:, :2] != NO_JITTER[:2]).all()
