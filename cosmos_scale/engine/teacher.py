"""The teacher: a copy in compute precision, refreshed from the sharded fp32 average in the student's optimizer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_scale.batch import Batch, TeacherFeatures
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.accumulate import join
from cosmos_scale.engine.deepspeed_config import teacher_deepspeed_config
from cosmos_scale.engine.placement import whole
from cosmos_scale.engine.ranks import all_gather_flat
from cosmos_scale.engine.student import Student
from cosmos_scale.model.cosmos import CosmosModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """The EMA teacher, without gradients; its weights are whole at stages 0 to 2 and sharded as the student's at 3."""

    def __init__(self, model: CosmosModel, student: Student, config: RunConfig) -> None:
        """Take over a model whose weights are replaced by the student's average."""
        dtype = DTYPES[config.precision]
        self._model = model.to(student.ranks.device, dtype).requires_grad_(False).eval()
        self.student = student
        # A rank that holds the whole average in the teacher's precision and place needs no second copy of it.
        whole_average = student.stage == 0 or (student.stage < 3 and student.ranks.world_size == 1)
        self._is_average = dtype == torch.float32 and whole_average and not student.offload
        self._gathering: list[Any] = []
        self._written: torch.cuda.Event | None = None  # at stage 3
        self._forward = _GlobalViews(self._model, config.data.captions.global_count)
        if student.stage == 3:
            import deepspeed  # here, since it takes seconds and --help should not

            # Without an optimizer: DeepSpeed only shards the weights, and gathers them module by module in the forward.
            self._engine, *_ = deepspeed.initialize(
                model=self._forward,
                config=teacher_deepspeed_config(config, student.ranks.world_size, student.elements),
            )
        elif student.stage > 0:
            self._flat_groups = self._flatten(dtype)
        elif self._is_average:
            own = dict(self.model.named_parameters())
            for fragment in student.fragments:
                own[fragment.name].data = fragment.ema.view(fragment.shape)
        self.refresh()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherFeatures:
        """Normalised features of the global crops and captions of this rank's batch. Collective at stage 3."""
        self._finish_refresh()
        forward: Callable[[Batch], TeacherFeatures] = self._engine if self.student.stage == 3 else self._forward
        return join([forward(part) for part in batch.split(self.student.micro_batches)])

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the average into the teacher's weights: at stages 1 and 2 one all-gather a group, else local.

        The all-gathers run beside what comes next, up to the teacher's next use.
        """
        if self._is_average:
            return
        self._finish_refresh()
        optimizer, fragments = self.student.optimizer, self.student.fragments
        if self.student.stage in (1, 2):
            for flat, (shard,) in zip(self._flat_groups, optimizer.shards, strict=True):
                average = optimizer.state[shard]["ema"].to(flat)
                self._gathering.append((all_gather_flat(flat, average, async_op=True), average))
            return
        own = dict(self._model.named_parameters())
        if self.student.stage == 3:  # written where DeepSpeed keeps this rank's part: the next gathering brings it
            parts: dict[str, Any] = dict(own)  # DeepSpeed adds the attribute
            weights = [parts[fragment.name].ds_tensor.narrow(0, 0, fragment.ema.numel()) for fragment in fragments]
        else:
            weights = [own[fragment.name].view(-1) for fragment in fragments]
        torch._foreach_copy_(weights, [fragment.ema for fragment in fragments])
        if self.student.stage == 3 and self.student.ranks.device.type == "cuda":
            # DeepSpeed (0.19) gathers in a stream of its own, which does not wait for what other streams write.
            self._written = torch.cuda.Event()
            self._written.record()

    @property
    def model(self) -> CosmosModel:
        """The teacher's model; waits for a refresh under way. At stage 3 its weights are cut up: see `whole_model`."""
        self._finish_refresh()
        return self._model

    def _finish_refresh(self) -> None:
        for work, _ in self._gathering:  # the tensors beside them are being read until now
            work.wait()
        self._gathering.clear()
        if self._written is not None:  # the host hardly waits: the student's forward lies between
            self._written.synchronize()
            self._written = None

    @contextmanager
    def whole_model(self) -> Iterator[CosmosModel]:
        """The model with whole weights, to be called by each rank as often as it likes. Collective at stage 3."""
        model = self.model
        with whole(self._engine if self.student.stage == 3 else None):
            yield model

    def _flatten(self, dtype: torch.dtype) -> list[Tensor]:
        """Lay the weights into one flat buffer a group, as DeepSpeed laid the student's, so that shards line up."""
        wrapper, optimizer = self.student.engine.optimizer, self.student.optimizer
        names = {id(parameter): name for name, parameter in self.student.model.named_parameters()}
        own = dict(self._model.named_parameters())
        buffers = []
        groups = zip(wrapper.bit16_groups_flat, wrapper.bit16_groups, optimizer.shards, strict=True)
        for student_flat, parameters, (shard,) in groups:
            flat = optimizer.state[shard]["ema"] if self._is_average else torch.zeros_like(student_flat, dtype=dtype)
            for parameter in parameters:
                # The student's parameter is a view into its flat buffer: the same place serves the teacher.
                offset = (parameter.data_ptr() - student_flat.data_ptr()) // parameter.element_size()
                view = flat.narrow(0, offset, parameter.numel()).view_as(parameter)
                own[names[id(parameter)]].data = view
            buffers.append(flat)
        return buffers


class _GlobalViews(nn.Module):
    """The teacher's work as a module's forward: there, and only there, DeepSpeed gathers sharded weights."""

    def __init__(self, model: CosmosModel, global_captions: int) -> None:
        super().__init__()
        self.model = model
        self.global_captions = global_captions

    def forward(self, batch: Batch) -> TeacherFeatures:
        """Features of the global crops and captions of a batch."""
        return self.model.teacher_features(batch, self.global_captions)
