"""The section `model`: both towers and the cross-modality heads."""

from typing import Literal

from pydantic import Field

from cosmos_scale.config.section import RESUME_MAY_CHANGE, Section, refuse

TOKENIZER_VOCABULARY = 49408  # CLIP's byte-pair vocabulary, start and end tokens included


class VisionConfig(Section):
    """The image tower (ViT)."""

    image_size: int = Field(224, gt=0, le=8_192, description="side of the global crops in pixels")
    patch_size: int = Field(16, gt=0, le=8_192, description="side of a patch in pixels")
    width: int = Field(768, gt=0, le=65_536, description="numbers per token")
    layers: int = Field(12, gt=0, le=1_000, description="transformer blocks")
    head_width: int = Field(64, gt=0, le=65_536, description="numbers per attention head; width / head_width heads")

    def _check_rules(self) -> None:
        if self.width % self.head_width:
            refuse("width", self.width, f"must be a multiple of head_width ({self.head_width})", ["head_width"])
        if self.image_size % self.patch_size:
            refuse(
                "image_size", self.image_size, f"must be a multiple of patch_size ({self.patch_size})", ["patch_size"]
            )


class TextConfig(Section):
    """The causal text tower."""

    context_length: int = Field(
        77, gt=2, le=65_536, description="most tokens of a caption, start and end included; longer captions are cut"
    )
    vocab_size: int = Field(TOKENIZER_VOCABULARY, gt=2, le=10_000_000, description="rows of the token embedding")
    width: int = Field(512, gt=0, le=65_536, description="numbers per token")
    layers: int = Field(12, gt=0, le=1_000, description="transformer blocks")
    heads: int = Field(8, gt=0, le=65_536, description="attention heads of a block")

    def _check_rules(self) -> None:
        if self.width % self.heads:
            refuse("width", self.width, f"must be a multiple of heads ({self.heads})", ["heads"])


class ModelConfig(Section):
    """Both towers and the cross-modality heads."""

    embed_dim: int = Field(512, gt=0, le=65_536, description="numbers per feature, of pictures and captions alike")
    pooler_heads: int = Field(8, gt=0, le=65_536, description="attention heads of the cross-modality poolers")
    text_padding: Literal["attend", "mask"] = Field(
        "attend", description="attend: the text pooler also reads a caption's padding (published); mask: it does not"
    )
    activation: Literal["gelu", "quick_gelu"] = Field(
        "gelu",
        description="activation of both towers' blocks; gelu: exact; quick_gelu: x * sigmoid(1.702 x), which OpenAI's "
        "weights and some others need. Files of weights do not tell it",
    )
    attention: Literal[
        "auto", "flash_attn_3", "dense", "flash_attn_2", "torch_varlen", "xformers", "flash_attn_4", "sdpa"
    ] = Field(
        "auto",
        description="back end of attention; auto: the first that runs on this device, in this precision; dense: cuDNN "
        "or flash without segments, for the equally long crops alone",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    compile: bool = Field(
        False,
        description="whether torch.compile compiles the towers' blocks, in place of the project's kernels there: "
        "meant for GPUs",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    token_multiple: int | None = Field(
        None,
        gt=0,
        le=65_536,
        description="a step's text tokens are filled up to a multiple of it, so that a GPU uses its memory again at "
        "the next step; null: 256 on a GPU, 1 on a CPU",
        json_schema_extra=RESUME_MAY_CHANGE,
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()

    def _check_rules(self) -> None:
        if self.text.width != self.embed_dim:
            rule = f"must equal model.embed_dim ({self.embed_dim}): the text pooler's queries and keys share one width"
            refuse("text.width", self.text.width, rule, ["embed_dim"])
        if self.embed_dim % self.pooler_heads:
            rule = f"must be a multiple of pooler_heads ({self.pooler_heads})"
            refuse("embed_dim", self.embed_dim, rule, ["pooler_heads"])
