"""What a rank keeps of student, optimizer and teacher from step to step: its tensors, by part."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher


def tensors_by_part(student: Student, teacher: Teacher) -> dict[str, list[Tensor]]:
    """Return the tensors of each part of engine/memory.py but buffers; of parts that share memory the first counts."""
    wrapper = student.layout.engine.optimizer
    shards = [shard for group in student.optimizer.shards for shard in group]
    states = [student.optimizer.state[shard] for shard in shards]
    weights, teachers = list(student.model.parameters()), list(teacher.model.parameters())
    averaged = [gradient for group in _values(wrapper, "averaged_gradients") for gradient in group or ()]
    flat = getattr(wrapper, "grad_partitions_flat_buffer", None)
    parts: dict[str, Iterable[Tensor | None]] = {
        "average": [state["ema"] for state in states],
        "moments": [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")],
        "weights": [*weights, *_sharded(weights)],
        "masters": shards,
        "teacher": [*teachers, *_sharded(teachers)],
        "gradients": [*(tensor.grad for tensor in (*weights, *shards)), *averaged, flat],
    }
    return {part: [tensor for tensor in tensors if tensor is not None] for part, tensors in parts.items()}


def elements_of(model: nn.Module) -> int:
    """Return how many elements a model's whole parameters have, those of which a rank holds a part too."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def _values(wrapper: Any, name: str) -> Iterator[Any]:
    yield from getattr(wrapper, name, {}).values()


def _sharded(parameters: Iterable[Any]) -> Iterator[Tensor]:
    """Yield this rank's parts of parameters, which DeepSpeed keeps beside the parameters at stage 3."""
    return (parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor"))
