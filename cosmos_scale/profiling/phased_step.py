"""The project's step, which says as each of its phases begins."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cosmos_scale.batch import Batch, Features, TeacherFeatures
from cosmos_scale.engine.student import Student, Update
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.loss import CosmosLoss, LossOutput
from cosmos_scale.step import train_step


def step_in_phases(
    student: Student, teacher: Teacher, loss: CosmosLoss, batch: Batch, enter_phase: Callable[[str], None]
) -> None:
    """Do train_step; say as each of the phases of `counts.PHASES` begins. Collective."""
    phased_student: Any = _PhasedStudent(student, enter_phase)
    phased_teacher: Any = _PhasedTeacher(teacher, enter_phase)
    phased_loss: Any = _PhasedLoss(loss, enter_phase)
    train_step(phased_student, phased_teacher, phased_loss, batch, lr=1e-4, momentum=0.99)


class _PhasedStudent:
    """A student that says as a phase of its begins."""

    def __init__(self, student: Student, enter_phase: Callable[[str], None]) -> None:
        self._student, self._enter_phase = student, enter_phase
        self.with_full_scales = student.with_full_scales

    def __call__(self, batch: Batch) -> Features:
        self._enter_phase("student")
        return self._student(batch)

    def backward(self, batch: Batch, features: Features, gradients: Features) -> None:
        self._enter_phase("backward")
        self._student.backward(batch, features, gradients)

    def update(self, *, lr: float, momentum: float, finite: Tensor) -> Update:
        self._enter_phase("update")
        return self._student.update(lr=lr, momentum=momentum, finite=finite)


class _PhasedTeacher:
    """A teacher that says as a phase of its begins."""

    def __init__(self, teacher: Teacher, enter_phase: Callable[[str], None]) -> None:
        self._teacher, self._enter_phase = teacher, enter_phase

    def __call__(self, batch: Batch) -> TeacherFeatures:
        self._enter_phase("teacher")
        return self._teacher(batch)

    def refresh(self) -> None:
        self._enter_phase("refresh")
        self._teacher.refresh()


class _PhasedLoss:
    """A loss that says as its phase begins."""

    def __init__(self, loss: CosmosLoss, enter_phase: Callable[[str], None]) -> None:
        self._loss, self._enter_phase = loss, enter_phase

    def __call__(self, features: Features, teacher: TeacherFeatures) -> LossOutput:
        self._enter_phase("loss")
        return self._loss(features, teacher)
