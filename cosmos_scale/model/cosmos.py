"""The COSMOS model: two towers, and two heads through which each modality's features attend to the other's tokens.

COSMOS: Cross-Modality Self-Distillation for Vision Language Pre-training (CVPR 2025). Student and teacher are two
models of this class; the teacher uses its towers only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cosmos_scale.batch import Batch, Features, TeacherFeatures, caption_lengths
from cosmos_scale.config import ModelConfig
from cosmos_scale.kernels.unit_length import normalise
from cosmos_scale.model.cross_modal import AttentionPooler
from cosmos_scale.model.text import TextTower
from cosmos_scale.model.transformer import Attention, Block, LayerNorm, Linear, Mlp, empty_parameter
from cosmos_scale.model.vision import VisionTower

LOG_SCALES = ("logit_scale", "distill_logit_scale")
INITIAL_LOG_SCALE = math.log(1 / 0.07)


class CosmosModel(TextTower):
    """Both towers, the cross-modality heads and the two log-scales; NaN until init_weights or load_state_dict.

    Log-scales are [1] parameters, since DeepSpeed cannot hold 0-dim parameters, and [] in state dicts, as in public
    checkpoints.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.text, config.embed_dim)
        self.attend_to_padding = config.text_padding == "attend"
        self.token_multiple = config.token_multiple
        self.visual = VisionTower(config.vision, config.embed_dim, config.pooler_heads)
        self.image_token_mapping = Linear(config.vision.width, config.embed_dim)
        self.text_token_mapping = Linear(config.text.width, config.embed_dim)
        self.text_attn_cross_pool = AttentionPooler(config.embed_dim, config.pooler_heads)
        self.logit_scale = empty_parameter(1)
        self.distill_logit_scale = empty_parameter(1)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = config.attention
            elif isinstance(module, Mlp):
                module.activation = config.activation
            elif isinstance(module, Block) and config.compile:
                module.compile_parts()
        # torch does not annotate the types of these two functions.
        self.register_state_dict_post_hook(_scales_to_scalars)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_scales_from_scalars)  # type: ignore[no-untyped-call]

    def init_weights(self, generator: torch.Generator) -> None:
        """Fill every parameter: a function of the generator's state alone, on any device and in any dtype."""
        self.init_text_tower(generator)
        self.visual.init_weights(generator)
        for mapping in (self.image_token_mapping, self.text_token_mapping):
            mapping.init_uniform(mapping.in_features**-0.5, generator)
        self.text_attn_cross_pool.init_weights(generator)
        for scale in (self.logit_scale, self.distill_logit_scale):
            nn.init.constant_(scale, INITIAL_LOG_SCALE)

    def recompute_blocks(self, every: int) -> None:
        """Let the backward compute every n-th block of both towers again, to keep no activations of it; 0: none."""
        self.transformer.recompute = self.visual.transformer.recompute = every

    def choose_kernels(self, kernels: Literal["auto", "torch"]) -> None:
        """Let the Triton kernels serve in both towers and heads, or not; kernels: as in the config."""
        self.visual.conv1.triton = kernels == "auto"
        for norm in self.norms().values():
            norm.triton = kernels == "auto"

    def image_tower_parameters(self) -> list[nn.Parameter]:
        """Return the image tower's parameters, without its head's, from its first layer on.

        The backward comes to this tower last, since the forward begins with it.
        """
        return [weight for name, weight in self.visual.named_parameters() if not name.startswith("attn_cross_pool")]

    def norms(self) -> dict[str, LayerNorm]:
        """Return the norms of towers and heads by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LayerNorm)}

    def read_norms(self, values: Mapping[str, Tensor]) -> None:
        """Let every norm read these gains and offsets, by parameter name; see `LayerNorm.values`."""
        for name, norm in self.norms().items():
            norm.values = values[f"{name}.weight"], values[f"{name}.bias"]

    def forward(self, batch: Batch) -> Features:
        """Return the student's features of every view, in the parameters' dtype.

        Image views attend to the first caption's tokens, captions to the first global crop's tokens. The pooled feature
        before normalisation is added to what a view has gathered.
        """
        samples = batch.captions.shape[1]
        image_BE, patches_TD = self.visual(_by_resolution(batch.global_crops, batch.local_crops), tokens_of=samples)
        text_BE, words_TD, word_counts = self.pool_text(
            batch.captions.flatten(0, 1),
            batch.caption_lengths.flatten(),
            tokens_of=samples,
            keep_padding=self.attend_to_padding,
        )
        image_VBE, text_KBE = image_BE.unflatten(0, (-1, samples)), text_BE.unflatten(0, (-1, samples))

        patch_counts = [patches_TD.shape[0] // samples] * samples
        from_text_VBE = self.text_attn_cross_pool(image_VBE, self.text_token_mapping(words_TD), word_counts)
        from_image_KBE = self.visual.attn_cross_pool(text_KBE, self.image_token_mapping(patches_TD), patch_counts)
        features = [image_VBE, text_KBE, image_VBE + from_text_VBE, text_KBE + from_image_KBE]
        image, text, image_crossmodal, text_crossmodal = normalise(torch.cat(features)).split(list(map(len, features)))
        return Features(image, text, image_crossmodal, text_crossmodal, self.logit_scale, self.distill_logit_scale)

    def teacher_features(
        self, batch: Batch, n_global: int, encode_image: Callable[[Tensor], Tensor] | None = None
    ) -> TeacherFeatures:
        """Return the teacher's features of the global crops and of the first `n_global` captions; forms no graph.

        encode_image: does what the method of that name does, in another way.
        """
        samples = batch.captions.shape[1]
        with torch.no_grad():
            image_BE = (encode_image or self.encode_image)(batch.global_crops.flatten(0, 1))
            captions_BL, lengths_B = batch.captions[:n_global].flatten(0, 1), batch.caption_lengths[:n_global].flatten()
            text_BE = self.encode_text(captions_BL, lengths_B)
        return TeacherFeatures(image_BE.unflatten(0, (-1, samples)), text_BE.unflatten(0, (-1, samples)))

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Return the normalised features [B, E] of images [B, 3, H, W] of one size, as in Batch.global_crops."""
        pooled_BE, _ = self.visual([images_BCHW])
        return normalise(pooled_BE)

    def encode_text(self, ids_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Return the normalised features [B, E] of captions, given as token ids [B, L].

        lengths: [B] int64 on the CPU, see `caption_lengths`. None: they are read from the ids, and the host waits.
        """
        if lengths_B is None:
            lengths_B = caption_lengths(ids_BL).cpu()
        pooled_BE, _, _ = self.pool_text(ids_BL, lengths_B)
        return normalise(pooled_BE)


def parameter_decays(name: str, parameter: Tensor) -> bool:
    """Tell whether weight decay applies: to matrices and tables, not to norms, biases, vectors and log-scales."""
    return parameter.ndim >= 2 and not any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


def _by_resolution(global_crops: Tensor, local_crops: Tensor) -> list[Tensor]:
    """Flatten views and samples into one batch for each resolution; there may be no local crops."""
    return [crops.flatten(0, 1) for crops in (global_crops, local_crops) if crops.shape[0]]


def _scales_to_scalars(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name in LOG_SCALES:
        state[prefix + name] = state[prefix + name].reshape(())


def _scales_from_scalars(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    for name in LOG_SCALES:
        scale = state.get(prefix + name)
        if isinstance(scale, Tensor) and scale.numel() == 1:
            state[prefix + name] = scale.reshape(1)
