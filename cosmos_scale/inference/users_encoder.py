"""The encoder of a loaded model, which a user's own code calls with pictures that it has prepared, or for gradients."""

from collections.abc import Iterable
from dataclasses import fields

from torch import Tensor

from cosmos_scale.evaluation.evaluator import Encoder
from cosmos_scale.inference.inputs import checked_texts, require_prepared
from cosmos_scale.inference.torch_state import usual_torch


class UsersEncoder(Encoder):
    """An encoder that looks at what it is given, and computes the same whatever the caller has set in torch."""

    @classmethod
    def of(cls, encoder: Encoder) -> "UsersEncoder":
        """The same model in the same setting."""
        return cls(**{field.name: getattr(encoder, field.name) for field in fields(encoder)})

    @usual_torch()
    def images(self, images: Tensor) -> Tensor:
        """Normalised features [N, E] of prepared pictures; raises UserError for what is no batch of whole patches."""
        require_prepared(images, self.model.visual.conv1.patch_size)
        return super().images(images)

    @usual_torch()
    def texts(self, texts: Iterable[str]) -> Tensor:
        """Normalised features [N, E] of N texts; raises UserError for what is none, such as one text alone."""
        return super().texts(checked_texts("texts", texts))
