"""Student and teacher, built in one place: drawn, from given models, or from a checkpoint's weights."""

from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.checkpoint.files import BrokenCheckpoint
from cosmos_scale.checkpoint.state import RunState, find_checkpoint, load_checkpoint, load_model
from cosmos_scale.config import RunConfig
from cosmos_scale.engine.ranks import Ranks, from_all, raise_together
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel


class Pair(NamedTuple):
    """A student and its teacher."""

    student: Student
    teacher: Teacher

    def restore(self, folder: Path) -> RunState:
        """Go on from a checkpoint of any world size and stage; collective.

        Raises, on all ranks alike: BrokenCheckpoint where any rank finds a file that is not what was written; then
        another checkpoint may be restored. UserError where the checkpoint holds another model.
        """
        ranks = self.student.ranks
        state, broken, error = None, None, None
        try:
            state = load_checkpoint(folder, self.student.fragments)
        except BrokenCheckpoint as failure:
            broken = str(failure)
        except UserError as failure:
            error = failure
        raise_together(ranks, error)
        broken = next((text for text in from_all(broken, ranks) if text is not None), None)
        if broken is not None:
            raise BrokenCheckpoint(broken)
        assert state is not None
        self.student.go_on(updates=state.updates, loss_scaler=state.loss_scaler)
        self.teacher.refresh()
        return state

    def close(self) -> None:
        """Free the student's engine, which otherwise keeps itself alive."""
        self.student.layout.close()


def pair_of_models(config: RunConfig, ranks: Ranks, student: CosmosModel, teacher: CosmosModel) -> Pair:
    """Take over two float32 models with whole weights, the same on every rank. Collective."""
    for model in (student, teacher):
        model.choose_kernels(config.kernels)
    wrapped = Student(student, dict(teacher.named_parameters()), config, ranks)
    return Pair(wrapped, Teacher(teacher, wrapped, config))


def drawn_pair(config: RunConfig, ranks: Ranks, *, teacher_seed: int | None = None) -> Pair:
    """Draw the student's weights from the run's seed; the teacher is a copy, or has a seed of its own. Collective."""
    student, teacher = CosmosModel(config.model), CosmosModel(config.model)
    student.init_weights(torch.Generator().manual_seed(config.seed))
    if teacher_seed is None:
        teacher.load_state_dict(student.state_dict())
    else:
        teacher.init_weights(torch.Generator().manual_seed(teacher_seed))
    return pair_of_models(config, ranks, student, teacher)


def pair_of_checkpoint(config: RunConfig, ranks: Ranks, folder: Path) -> Pair:
    """Start from the weights of a checkpoint, or of the newest in a folder; the moments are zero. Collective.

    Raises UserError on all ranks alike.
    """
    student, teacher, error = CosmosModel(config.model), CosmosModel(config.model), None
    try:
        origin = find_checkpoint(folder)
        load_model(student, origin, "student")
        load_model(teacher, origin, "teacher")
    except UserError as failure:
        error = UserError(f"init_from: {failure}")
    raise_together(ranks, error)
    return pair_of_models(config, ranks, student, teacher)
