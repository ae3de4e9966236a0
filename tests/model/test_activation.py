"""The towers with QuickGELU: against open_clip's, with recompute, and beside the Triton kernels."""

import open_clip.model
import pytest
import torch
from torch import Tensor

from cosmos_scale.batch import Features
from cosmos_scale.config import ModelConfig
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.operators import META, DeviceCounter
from tests.model.models import SMALL, initialised, small_batch

QUICK = SMALL.model_copy(update={"activation": "quick_gelu"})


def of_open_clip(model: CosmosModel, config: ModelConfig) -> open_clip.model.CLIP:
    """Return open_clip's towers with a model's weights and activation."""
    vision, text = config.vision, config.text
    theirs = open_clip.model.CLIP(
        config.embed_dim,
        open_clip.model.CLIPVisionCfg(
            layers=vision.layers,
            width=vision.width,
            head_width=vision.head_width,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        open_clip.model.CLIPTextCfg(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
        ),
        quick_gelu=config.activation == "quick_gelu",
    ).double()
    weights = model.state_dict()
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    theirs.eval()
    return theirs


@pytest.mark.parametrize("config", [SMALL, QUICK], ids=["gelu", "quick_gelu"])
def test_both_towers_equal_open_clips_with_the_same_activation(config: ModelConfig) -> None:
    """In float64; only the order of sums differs."""
    model, batch = initialised(config).double().eval(), small_batch(3)
    theirs = of_open_clip(model, config)
    crops, ids = batch.global_crops[0].double(), batch.captions[0]
    with torch.no_grad():
        for mine, oracle in (
            (model.encode_image(crops), theirs.encode_image(crops, normalize=True)),
            (model.encode_text(ids), theirs.encode_text(ids, normalize=True)),
        ):
            torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-12)


def gradients(model: CosmosModel, recompute: int) -> dict[str, Tensor]:
    model.recompute_blocks(recompute)
    model.zero_grad()
    features: Features = model(small_batch(2))
    generator = torch.Generator().manual_seed(3)
    named = [features.image, features.text, features.image_crossmodal, features.text_crossmodal]
    torch.stack([(one * torch.randn(one.shape, generator=generator)).sum() for one in named]).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit() -> None:
    model = initialised(QUICK)
    kept = gradients(model, 0)
    assert len(kept) > 60
    for name, gradient in gradients(model, 1).items():
        assert torch.equal(gradient, kept[name]), name
    other = gradients(initialised(SMALL), 0)
    changed = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.allclose(other[changed], kept[changed], rtol=1e-3, atol=0), "the activation makes no difference"


def test_the_norms_keep_their_kernels_and_the_kernel_of_gelu_is_left_out() -> None:
    with META:
        model = CosmosModel(QUICK).to(torch.bfloat16)
    batch = small_batch(2)
    on_meta = batch._replace(
        **{name: getattr(batch, name).to(META) for name in ("global_crops", "local_crops", "captions")}
    )
    with DeviceCounter() as counter:
        features = model(on_meta)
        torch.stack([features.image.sum(), features.text_crossmodal.sum()]).sum().backward()
    names = {name for _, name in counter.counts}
    assert {"add_norm", "add_norm_backward", "stack_gradients", "silu_backward"} <= names
    assert "gelu_bias_backward" not in names
    unserved = {name for name, weight in model.named_parameters() if "mlp.c_fc" in name and weight.grad is None}
    assert not unserved
