"""The formats of exports: what each can hold, and its files."""

from collections.abc import Sequence
from typing import Literal

from cosmos_scale.checkpoint.interchange.export_files import ExportedFile
from cosmos_scale.checkpoint.interchange.source import Source, Weights
from cosmos_scale.checkpoint.interchange.to_cosmos import check_cosmos_sizes, to_cosmos
from cosmos_scale.checkpoint.interchange.to_hf import BytePairs, to_hf
from cosmos_scale.checkpoint.interchange.to_openclip import to_openclip
from cosmos_scale.config import TOKENIZER_VOCABULARY
from cosmos_scale.errors import UserError

Format = Literal["openclip", "hf", "cosmos"]

FORMAT_NAMES: dict[Format, str] = {
    "openclip": "OpenCLIP",
    "hf": "Hugging Face CLIPModel",
    "cosmos": "COSMOS .pt",
}


def check_format(to: Format, source: Source) -> None:
    """Raise UserError where a format cannot hold a model: its sizes, its vocabulary, or what it lacks."""
    vocabulary = source.model.text.vocab_size
    if vocabulary < TOKENIZER_VOCABULARY:
        raise UserError(
            f"model.text.vocab_size: {vocabulary}; rule: must be at least {TOKENIZER_VOCABULARY}, as many words as the "
            "tokenizer of other programs has"
        )
    if to == "cosmos":
        if not source.has_heads or source.models != ("student", "teacher"):
            lacks = "no cross-modality heads" if not source.has_heads else "not both a student and a teacher"
            raise UserError(
                f"{source.path}: has {lacks}, which a COSMOS file holds; rule: convert it to openclip or hf, or train "
                "from it first (init_from)"
            )
        check_cosmos_sizes(source.model)


def exported_files(to: Format, source: Source, weights: Sequence[Weights], pairs: BytePairs) -> list[ExportedFile]:
    """Return the files of an export. weights: of its one model; for the COSMOS layout of student and teacher."""
    if to == "openclip":
        return to_openclip(source.model, weights[0])
    if to == "hf":
        return to_hf(source.model, weights[0], pairs)
    student, teacher = weights
    epoch = 0
    if source.training is not None:
        state = source.training.manifest.state
        epoch = state.step // (state.steps_per_epoch or state.step + 1)
    return to_cosmos(student, teacher, epoch=epoch, name=source.name)
