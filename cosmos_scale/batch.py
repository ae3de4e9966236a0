"""What travels between data, towers and loss. Shape letters are explained in CONTRIBUTING.md."""

from typing import NamedTuple

import torch
from torch import Tensor

# CLIP's statistics of RGB values in 0..1 (Radford et al. 2021, released code).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Batch(NamedTuple):
    """One rank's share of a training batch; the first global crop and caption feed the cross-modality poolers.

    global_crops: [V_global, B, 3, H, W] uint8, levels of 8-bit pixels, which the image tower normalises by MEAN and
    STD; or of a floating dtype, normalised already.
    local_crops: [V_local, B, 3, h, w] of the same dtype; V_local may be 0.
    captions: [K, B, L] int32 token ids, 0 is padding, the largest id of a row is EOT; global captions first.
    caption_lengths: [K, B] int64, the tokens of each caption up to and including EOT.
    sample_ids: [B] int64, the position of each sample in the merged index of all sources.
    substituted: [] int64, how many samples of this share replace a damaged one.
    Lengths, ids and the count stay on the CPU: the towers cut captions by the lengths without waiting for the device,
    and no device needs the others.
    """

    global_crops: Tensor
    local_crops: Tensor
    captions: Tensor
    caption_lengths: Tensor
    sample_ids: Tensor
    substituted: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device what the towers need there; asynchronous where the tensors are pinned."""
        needed = ("global_crops", "local_crops", "captions")
        return self._replace(**{name: getattr(self, name).to(device, non_blocking=True) for name in needed})

    def split(self, parts: int) -> "list[Batch]":
        """Cut into batches of equally many samples, views of this batch; each keeps this batch's `substituted`."""
        cut = zip(
            self.global_crops.chunk(parts, dim=1),
            self.local_crops.chunk(parts, dim=1),
            self.captions.chunk(parts, dim=1),
            self.caption_lengths.chunk(parts, dim=1),
            self.sample_ids.chunk(parts),
            strict=True,
        )
        return [Batch(*tensors, self.substituted) for tensors in cut]


class Features(NamedTuple):
    """What the student hands to the loss: normalised features of every view and the two log-scales.

    image, image_crossmodal: [V, B, E], global crops first. text, text_crossmodal: [K, B, E], global captions first.
    logit_scale, distill_logit_scale: [1], natural logarithms.
    """

    image: Tensor
    text: Tensor
    image_crossmodal: Tensor
    text_crossmodal: Tensor
    logit_scale: Tensor
    distill_logit_scale: Tensor


class TeacherFeatures(NamedTuple):
    """What the teacher hands to the loss: image [V_global, B, E] and text [K_global, B, E], normalised, detached."""

    image: Tensor
    text: Tensor


def caption_lengths(ids: Tensor) -> Tensor:
    """Return how many tokens each row of ids has up to EOT, its largest id, EOT included: [..., L] to [...] int64."""
    return ids.argmax(dim=-1) + 1
