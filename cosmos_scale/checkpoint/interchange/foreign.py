"""What a file holds that is no CLIP model: its kind by the names of its tensors."""

import re
from collections.abc import Iterable

# The first pattern that is in a name counts.
_KINDS = (
    (r"lora_|\.lora\.|_lora\b", "a LoRA, which changes a model and is none: merge it into its model first"),
    (r"^logit_bias$|^vision_model\.head\.|^visual\.trunk\.attn_pool", "a SigLIP model (sigmoid loss)"),
    (r"^text_decoder\.", "a CoCa model (with a text decoder)"),
    (r"^visual\.layer1\.|^visual\.attnpool\.", "a CLIP model whose image tower is a ResNet"),
    (r"^visual\.trunk\.", "a CLIP model whose image tower is one of timm"),
    (r"^visual\.blocks\.|^visual\.patch_embed\.", "an EVA-CLIP model"),
    (r"^(text\.)?transformer\.(embeddings|encoder)\.", "a CLIP model whose text tower is one of Hugging Face"),
    (r"\.ls_1\.|\.ls_2\.", "a model with layer scale"),
    (r"^model\.diffusion_model\.|^unet\.", "a diffusion model"),
)
_WITHOUT_CONFIG = (
    r"^(vision_model|text_model)\.",
    "a model of Hugging Face without its config.json: name the folder that has both",
)


def foreign_model(names: Iterable[str], *, has_config: bool = False) -> str | None:
    """Return what kind of model has tensors of these names, None where that is not known.

    has_config: Hugging Face's config.json lies beside them.
    """
    known = list(names)
    for pattern, kind in _KINDS if has_config else (*_KINDS, _WITHOUT_CONFIG):
        if any(re.search(pattern, name) for name in known):
            return kind
    return None
