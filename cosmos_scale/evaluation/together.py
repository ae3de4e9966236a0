"""Evaluation on many ranks: where one of them fails, all of them stop measuring, and none of them waits for it.

Before each gather the ranks tell one another how far they have come, in a small gather. A rank that fails tells so
instead of coming to its next gather. The other ranks learn of it when they come to a gather or to the end.
"""

import logging
import zlib
from pathlib import Path

import torch
from torch import Tensor

from cosmos_scale.config.section import redact_urls
from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.evaluator import Encoder, Evaluator, Gather, Numbers, measure
from cosmos_scale.files import cause_in_the_machine, reason_of

# What a rank tells: that it failed, that it finished, or a number from 0 on: a checksum of the shape and dtype of its
# next gather.
_FAILED, _FINISHED = -2, -1
_REASON = 500  # bytes of a reason that the other ranks hear

_log = logging.getLogger(__name__)


class EvaluationFailed(Exception):
    """An evaluation has failed on one rank or more; its text, one line with a reason, is the same on all ranks."""


class _Stopped(Exception):
    """Another rank has failed, or does not do the same as this one."""


def measure_together(evaluator: Evaluator, encoder: Encoder, gather: Gather, folder: Path | None) -> Numbers:
    """Return the numbers of one model; collective.

    Raises EvaluationFailed on all ranks where the evaluator raises anything on any rank, and what `gather` itself
    raises: then there may be no other rank to go on with.
    """
    agreement = _Agreement(gather, encoder.setting.device)
    failure: Exception | None = None
    numbers: Numbers = {}
    try:
        numbers = measure(evaluator, encoder, agreement.gather, folder)
    except Exception as error:
        failure = error
    if agreement.lost is not None:
        raise agreement.lost
    reason = ""
    if not agreement.stopped:  # else this rank failed because another one did
        if agreement.reached(_FINISHED if failure is None else _FAILED):
            return numbers
        reason = "" if failure is None else _reason(failure, evaluator)
    raise EvaluationFailed(agreement.first_reason(reason))


def _reason(failure: Exception, evaluator: Evaluator) -> str:
    """The failure in one line; of an error that no user can mend the traceback is printed too."""
    text = str(failure)
    if cause := cause_in_the_machine(failure):
        text = f"{cause.filename}: {reason_of(cause)}" if cause.filename else reason_of(cause)
    elif not isinstance(failure, UserError):
        _log.error("evaluation %s failed", evaluator.name, exc_info=failure)
        text = f"{type(failure).__name__}: {text}"
    return redact_urls(" ".join(text.split()))


class _Agreement:
    """What the ranks of one evaluation tell one another."""

    def __init__(self, gather: Gather, device: torch.device) -> None:
        self._gather = gather
        self._device = device
        self.stopped = False  # the ranks know of a failure
        self.lost: Exception | None = None  # what the handed-in gather raised

    def gather(self, tensor: Tensor) -> Tensor:
        """The gather for the evaluator; raises on all ranks where one of them does not come to the same gather."""
        if not self.reached(zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode())):
            raise _Stopped
        return self._exchange(tensor)

    def reached(self, point: int) -> bool:
        """Tell the others how far this rank has come, and whether all ranks go on from the same point."""
        if not self.stopped:
            points = self._exchange(torch.tensor([point], device=self._device)).tolist()
            self.stopped = any(other != point for other in points) or point == _FAILED
        return not self.stopped

    def first_reason(self, reason: str) -> str:
        """Exchange reasons, empty on ranks that have none, and return that of the lowest rank that has one."""
        sent = torch.zeros(1, _REASON, dtype=torch.uint8)
        data = reason.encode()[:_REASON]
        sent[0, : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = self._exchange(sent.to(self._device)).tolist()
        reasons = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
        for rank, text in enumerate(reasons):
            if text:
                return f"{text} (rank {rank})" if len(reasons) > 1 else text
        return "the ranks do not gather the same, which is an error of this program"

    def _exchange(self, tensor: Tensor) -> Tensor:
        try:
            return self._gather(tensor)
        except Exception as error:
            self.lost = error
            raise
