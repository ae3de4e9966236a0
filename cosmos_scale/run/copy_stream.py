"""Batches on their way to the device, beside the work that the device has."""

import torch

from cosmos_scale.batch import Batch


class CopyStream:
    """Copies batches to a device: on a GPU in a stream of its own, so that a copy runs beside the step before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def bring(self, batch: Batch) -> Batch:
        """Return the batch with what the towers need on the device; the host waits for no GPU.

        On a GPU the current stream will wait for the copy, and the copied tensors keep their memory until the current
        stream has done what it was asked while they lived. Pinned memory is free again after the copy. torch sees to
        both.
        """
        if self._stream is None:
            return batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            brought = batch.to(self._device)
        current.wait_stream(self._stream)  # by an event, after these copies
        for tensor, source in zip(brought, batch, strict=True):
            if tensor is not source:
                tensor.record_stream(current)
        return brought
