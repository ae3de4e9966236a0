"""The teacher: a copy in compute precision, refreshed from the sharded fp32 average in the student's optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cosmos_scale.batch import Batch, TeacherFeatures
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import join
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher_graph import GraphedEncoder
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.phases import phase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """The EMA teacher, without gradients; its weights are whole at stages 0 to 2 and sharded at stage 3."""

    def __init__(self, model: CosmosModel, student: Student, config: RunConfig) -> None:
        """Take over a model whose weights are replaced by the student's average."""
        self._model = model.to(student.ranks.device, DTYPES[config.precision]).requires_grad_(False).eval()
        self._micro_batches = student.micro_batches
        self._optimizer = student.optimizer
        on_gpu = student.ranks.device.type == "cuda"
        graphed = config.train.teacher_graph and on_gpu and student.layout.weights_stay
        encoder = GraphedEncoder(self._model.encode_image) if graphed else None
        forward = _GlobalViews(self._model, config.data.captions.global_count, encoder)
        if student.full_values.averages:
            self._model.read_norms(student.full_values.averages)
        self._weights = student.layout.teacher_weights(self._model, forward, student.fragments)
        self.refresh()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherFeatures:
        """Return normalised features of the global crops and captions of this rank's batch. Collective at stage 3."""
        with phase("refresh"):
            self._weights.wait()
        return join([self._weights.forward(part) for part in batch.split(self._micro_batches)])

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the average into the teacher's weights. Collective at stages 1 and 2.

        At stages 1 and 2 each group of the optimizer takes one all-gather, which runs in the background until the
        teacher's next use. At the other stages ranks exchange nothing. What its norms read in float32 comes with the
        student's update or `publish`.
        """
        self._weights.refresh(copied=self._optimizer.take_averages_copied())

    @property
    def model(self) -> CosmosModel:
        """The teacher's model; waits for a refresh under way. At stage 3 its weights are cut up: see `whole_model`."""
        self._weights.wait()
        return self._model

    @contextmanager
    def whole_model(self) -> Iterator[CosmosModel]:
        """Yield the model with whole weights; each rank may call it as often as it likes. Collective at stage 3."""
        model = self.model
        with self._weights.whole():
            yield model


class _GlobalViews(nn.Module):
    """A module whose forward is the teacher's work: DeepSpeed gathers sharded weights only in a module's forward."""

    def __init__(self, model: CosmosModel, global_captions: int, encoder: GraphedEncoder | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = model
        self.global_captions = global_captions

    def forward(self, batch: Batch) -> TeacherFeatures:
        """Features of the global crops and captions of a batch."""
        return self.model.teacher_features(batch, self.global_captions, self.encoder)
