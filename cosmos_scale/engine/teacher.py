"""The teacher: a copy in compute precision, refreshed from the sharded fp32 average in the student's optimizer."""

import torch
from torch import Tensor

from cosmos_scale.batch import Batch, TeacherFeatures
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.collectives import all_gather_flat
from cosmos_scale.engine.student import Student
from cosmos_scale.model.cosmos import CosmosModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher:
    """The EMA teacher; it never has a gradient."""

    def __init__(self, model: CosmosModel, student: Student, config: RunConfig) -> None:
        """Take over a model whose weights are replaced by the student's average."""
        dtype = DTYPES[config.precision]
        self.model = model.to(student.ranks.device, dtype).requires_grad_(False).eval()
        self.student = student
        self.global_captions = config.data.captions.global_count
        # A rank that holds the whole average in the teacher's precision needs no second copy of it.
        self._is_average = dtype == torch.float32 and (student.stage == 0 or student.ranks.world_size == 1)
        if student.stage > 0:
            self._flat_groups = self._flatten(dtype)
        elif self._is_average:
            own = dict(self.model.named_parameters())
            for fragment in student.fragments:
                own[fragment.name].data = fragment.ema.view(fragment.shape)
        self.refresh()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherFeatures:
        """Normalised features of the global crops and captions of this rank's batch."""
        return self.model.teacher_features(batch, self.global_captions)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the average into the teacher's weights: at stage 1 one all-gather a group, at stage 0 local."""
        if self._is_average:
            return
        optimizer = self.student.optimizer
        if self.student.stage > 0:
            for flat, group in zip(self._flat_groups, optimizer.param_groups, strict=True):
                shard = optimizer.state[group["params"][0]]["ema"]
                all_gather_flat(flat, shard.to(flat.dtype))
            return
        own = dict(self.model.named_parameters())
        torch._foreach_copy_(
            [own[fragment.name].view(-1) for fragment in self.student.fragments],
            [fragment.ema for fragment in self.student.fragments],
        )

    def _flatten(self, dtype: torch.dtype) -> list[Tensor]:
        """Lay the weights into one flat buffer a group, as DeepSpeed laid the student's, so that shards line up."""
        wrapper, optimizer = self.student.engine.optimizer, self.student.optimizer
        names = {id(parameter): name for name, parameter in self.student.model.named_parameters()}
        own = dict(self.model.named_parameters())
        buffers = []
        groups = zip(wrapper.bit16_groups_flat, wrapper.bit16_groups, optimizer.param_groups, strict=True)
        for student_flat, parameters, group in groups:
            if self._is_average:
                flat = optimizer.state[group["params"][0]]["ema"]
            else:
                flat = torch.zeros_like(student_flat, dtype=dtype)
            for parameter in parameters:
                # The student's parameter is a view into its flat buffer: the same place serves the teacher.
                offset = (parameter.data_ptr() - student_flat.data_ptr()) // parameter.element_size()
                view = flat.narrow(0, offset, parameter.numel()).view_as(parameter)
                own[names[id(parameter)]].data = view
            buffers.append(flat)
        return buffers
