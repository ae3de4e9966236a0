"""Names, shapes and what depends on what in the whole model; its numbers are compared in test_golden.py."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from cosmos_scale.batch import Batch
from cosmos_scale.config import ModelConfig, VisionConfig
from cosmos_scale.kernels.unit_length import normalise
from cosmos_scale.model.cosmos import CosmosModel, parameter_decays
from tests.model.models import SMALL, initialised, small_batch

# float64 throughout; only the order of summation differs.
TOLERANCE = 1e-12


def with_captions(batch: Batch, captions: Tensor) -> Batch:
    return batch._replace(captions=captions, caption_lengths=captions.argmax(-1) + 1)


def meta_model(patch_size: int) -> CosmosModel:
    with torch.device("meta"):
        return CosmosModel(ModelConfig(vision=VisionConfig(patch_size=patch_size)))


def expected_shapes(patch_size: int) -> dict[str, tuple[int, ...]]:
    """Write out the published state dict of ViT-B with a text tower of width 512."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "distill_logit_scale": (),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (1 + (224 // patch_size) ** 2, 768),
        "visual.proj": (768, 512),
        "visual.conv1.weight": (768, 3, patch_size, patch_size),
        "token_embedding.weight": (49408, 512),
        "positional_embedding": (77, 512),
        "text_projection": (512, 512),
        "image_token_mapping.weight": (512, 768),
        "image_token_mapping.bias": (512,),
        "text_token_mapping.weight": (512, 512),
        "text_token_mapping.bias": (512,),
    }

    def attention(prefix: str, width: int) -> None:
        shapes[f"{prefix}.in_proj_weight"], shapes[f"{prefix}.in_proj_bias"] = (3 * width, width), (3 * width,)
        shapes[f"{prefix}.out_proj.weight"], shapes[f"{prefix}.out_proj.bias"] = (width, width), (width,)

    norms = {"visual.ln_pre": 768, "visual.ln_post": 768, "ln_final": 512}
    for prefix in ("visual.attn_cross_pool", "text_attn_cross_pool"):
        norms |= {f"{prefix}.ln_q": 512, f"{prefix}.ln_k": 512}
        attention(f"{prefix}.attn", 512)
    for tower, width in (("visual.transformer", 768), ("transformer", 512)):
        for layer in range(12):
            block = f"{tower}.resblocks.{layer}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            attention(f"{block}.attn", width)
            shapes[f"{block}.mlp.c_fc.weight"], shapes[f"{block}.mlp.c_fc.bias"] = (4 * width, width), (4 * width,)
            shapes[f"{block}.mlp.c_proj.weight"], shapes[f"{block}.mlp.c_proj.bias"] = (width, 4 * width), (width,)
    for norm, width in norms.items():
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    return shapes


@pytest.mark.parametrize("patch_size", [16, 32])
def test_state_dict_has_the_published_names_and_shapes(patch_size: int) -> None:
    state = meta_model(patch_size).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(patch_size)


def test_published_counts() -> None:
    parameters = dict(meta_model(16).named_parameters())
    assert len(parameters) == 323
    assert sum(parameter.numel() for parameter in parameters.values()) == 152_382_466
    assert sum(parameter_decays(name, parameter) for name, parameter in parameters.items()) == 108


def test_weight_decay_spares_exactly_norms_biases_the_class_token_and_scales() -> None:
    tables = ("conv1.weight", "positional_embedding", "proj", "text_projection", "token_embedding.weight")
    matrices = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "token_mapping.weight")
    for name, parameter in meta_model(16).named_parameters():
        assert parameter_decays(name, parameter) == name.endswith(tables + matrices), name


@pytest.mark.parametrize("name", ["bn1.weight", "ln_post.weight", "attn.in_proj_bias", "logit_scale"])
def test_weight_decay_goes_by_name_too(name: str) -> None:
    assert not parameter_decays(name, torch.zeros(2, 2))


def test_scales_are_vectors_inside_and_scalars_in_state_dicts() -> None:
    model = initialised(SMALL)
    assert [model.logit_scale.shape, model.distill_logit_scale.shape] == [(1,), (1,)]
    wrapped = nn.Sequential(model)
    wrapped_state = wrapped.state_dict()
    assert wrapped_state["0.logit_scale"].shape == wrapped_state["0.distill_logit_scale"].shape == ()
    state = model.state_dict()
    state["logit_scale"], state["distill_logit_scale"] = torch.tensor(1.5), torch.tensor([2.5])  # both forms load
    for assign in (False, True):
        other = CosmosModel(SMALL)
        other.load_state_dict(state, strict=True, assign=assign)
        assert (other.logit_scale.tolist(), other.distill_logit_scale.tolist()) == ([1.5], [2.5])
        assert state["logit_scale"].shape == (), "the caller's state dict was changed"
        other.load_state_dict(other.state_dict(), strict=True)
    wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=True)
    assert model.logit_scale.tolist() == [1.5]


def test_state_dict_shares_memory_with_the_parameters() -> None:
    model = initialised(SMALL)
    state = model.state_dict()
    with torch.no_grad():
        model.logit_scale.fill_(0.25)
    assert state["logit_scale"].item() == 0.25


def test_a_wrong_scale_is_refused() -> None:
    model = initialised(SMALL)
    with pytest.raises(RuntimeError, match="logit_scale"):
        model.load_state_dict(model.state_dict() | {"logit_scale": torch.zeros(2)})
    state = model.state_dict()
    del state["distill_logit_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*distill_logit_scale"):
        model.load_state_dict(state)


def test_copies_and_files_round_trip() -> None:
    model, batch = initialised(SMALL), small_batch(2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = CosmosModel(SMALL)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    with torch.no_grad():
        expected = model(batch)
        nn.init.zeros_(model.visual.proj)  # copies must not depend on the original
        for other in copies:
            assert other.state_dict()["logit_scale"].shape == ()
            for field, ours, theirs in zip(expected._fields, other(batch), expected, strict=True):
                assert torch.equal(ours, theirs), field


@pytest.mark.parametrize(("views", "captions"), [((2, 3), 4), ((1, 0), 1), ((3, 1), 2)])
def test_any_number_of_views_and_captions(views: tuple[int, int], captions: int) -> None:
    model = initialised(SMALL)
    features = model(small_batch(2, views=views, captions=captions))
    assert features.image.shape == features.image_crossmodal.shape == (sum(views), 2, 32)
    assert features.text.shape == features.text_crossmodal.shape == (captions, 2, 32)
    for tensor in features[:4]:
        # Unit length within float32's rounding of a sum of 32 squares.
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:2]), rtol=0, atol=1e-6)
    sum(tensor.sum() for tensor in features).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "a parameter gets no gradient"


def test_samples_do_not_see_each_other() -> None:
    model, batch = initialised(SMALL).double(), small_batch(3)
    together = model(batch)
    one = batch._replace(
        global_crops=batch.global_crops[:, 1:2],
        local_crops=batch.local_crops[:, 1:2],
        captions=batch.captions[:, 1:2],
        caption_lengths=batch.caption_lengths[:, 1:2],
    )
    for ours, alone in zip(together[:4], model(one)[:4], strict=True):
        torch.testing.assert_close(ours[:, 1:2], alone, rtol=0, atol=TOLERANCE)


def test_teacher_features_are_the_towers_of_the_global_views() -> None:
    model, batch = initialised(SMALL).double(), small_batch(3)
    student, teacher = model(batch), model.teacher_features(batch, 2)
    torch.testing.assert_close(teacher.image, student.image[:2].detach(), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(teacher.text, student.text[:2].detach(), rtol=0, atol=TOLERANCE)
    assert not teacher.image.requires_grad
    assert not teacher.text.requires_grad
    torch.testing.assert_close(model.encode_image(batch.local_crops[1]), student.image[3], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.encode_text(batch.captions[3]), student.text[3], rtol=0, atol=TOLERANCE)


def test_poolers_read_the_first_global_crop_and_the_first_caption_only() -> None:
    model, batch = initialised(SMALL).double(), small_batch(2)
    before = model(batch)
    later_text = model(with_captions(batch, torch.cat([batch.captions[:1], batch.captions[1:].flip(1)])))
    torch.testing.assert_close(later_text.image_crossmodal, before.image_crossmodal, rtol=0, atol=TOLERANCE)
    first_text = model(with_captions(batch, torch.cat([batch.captions[:1].flip(1), batch.captions[1:]])))
    assert (first_text.image_crossmodal - before.image_crossmodal).abs().amax(-1).min() > 1e-6
    later_image = model(batch._replace(global_crops=torch.stack([batch.global_crops[0], -batch.global_crops[1]])))
    torch.testing.assert_close(later_image.text_crossmodal, before.text_crossmodal, rtol=0, atol=TOLERANCE)
    first_image = model(batch._replace(global_crops=torch.stack([-batch.global_crops[0], batch.global_crops[1]])))
    assert (first_image.text_crossmodal - before.text_crossmodal).abs().amax(-1).min() > 1e-6


def test_masked_padding_equals_each_sample_cut_at_its_own_end() -> None:
    masked = initialised(SMALL.model_copy(update={"text_padding": "mask"})).double()
    attending = initialised(SMALL).double()
    batch = small_batch(5)
    features, published = masked(batch), attending(batch)
    for sample in range(5):
        end = batch.captions[0, sample].tolist().index(SMALL.text.vocab_size - 1)
        assert end < SMALL.text.context_length - 1, "no padding to mask"
        cut = batch._replace(
            global_crops=batch.global_crops[:, sample : sample + 1],
            local_crops=batch.local_crops[:, sample : sample + 1],
            captions=batch.captions[:1, sample : sample + 1, : end + 1],
            caption_lengths=batch.caption_lengths[:1, sample : sample + 1],
        )
        expected = attending(cut).image_crossmodal[:, 0]
        torch.testing.assert_close(features.image_crossmodal[:, sample], expected, rtol=0, atol=TOLERANCE)
        assert (published.image_crossmodal[:, sample] - expected).abs().max() > 1e-6, "the mask makes no difference"
    for field in ("image", "text", "text_crossmodal"):
        torch.testing.assert_close(getattr(features, field), getattr(published, field), rtol=0, atol=TOLERANCE)


def test_nothing_behind_the_end_of_a_text_reaches_its_feature() -> None:
    model, ids = initialised(SMALL).double(), small_batch(4).captions[0]
    noise = torch.randint(1, SMALL.text.vocab_size - 1, ids.shape, generator=torch.Generator().manual_seed(3))
    behind = torch.arange(ids.shape[1]) > ids.argmax(-1, keepdim=True)
    assert behind.any(1).all()
    replaced = torch.where(behind, noise.to(ids.dtype), ids)
    torch.testing.assert_close(model.encode_text(replaced), model.encode_text(ids), rtol=0, atol=TOLERANCE)


def test_low_precision_models_take_float32_images_and_keep_their_dtype() -> None:
    batch = small_batch(2)
    exact = initialised(SMALL)(batch)
    features = initialised(SMALL).bfloat16()(batch)
    for field, ours, theirs in zip(exact._fields[:4], features[:4], exact[:4], strict=True):
        assert ours.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits (4e-3) of values up to 1; through three blocks 0.02 was seen.
        assert (ours.float() - theirs).abs().max() < 0.06, field


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_float16_features_of_any_size_normalise(size: float) -> None:
    direction = torch.tensor([[3.0, -4.0]])
    ours = normalise((direction * size).half())
    torch.testing.assert_close(ours.float(), direction / 5, rtol=0.1 if size < 1e-4 else 2**-10, atol=0)
