"""Student and teacher, built in one place: drawn, from given models, or from a checkpoint's weights."""

from pathlib import Path
from typing import NamedTuple

import torch

from cosmos_scale.checkpoint.files import BrokenCheckpoint, GoneCheckpoint
from cosmos_scale.checkpoint.initial import InitialWeights, open_initial
from cosmos_scale.checkpoint.state import RunState, load_checkpoint
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

        Raises, on all ranks alike: BrokenCheckpoint where any rank finds a file that is not what was written, or
        GoneCheckpoint; then another checkpoint may be restored. UserError where the checkpoint holds another model.
        """
        ranks = self.student.ranks
        state, broken, gone, error = None, None, False, None
        try:
            state = load_checkpoint(folder, self.student.fragments)
        except BrokenCheckpoint as failure:
            broken, gone = str(failure), isinstance(failure, GoneCheckpoint)
        except UserError as failure:
            error = failure
        raise_together(ranks, error)
        broken = next((text for text in from_all(broken, ranks) if text is not None), None)
        if any(from_all(gone, ranks)):
            raise GoneCheckpoint(folder)
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


def initial_pair(config: RunConfig, ranks: Ranks, initial: InitialWeights | None = None) -> tuple[Pair, str]:
    """Start from the weights that `init_from` names; the moments are zero. Collective.

    initial: those weights, where they have been looked for: a run that goes on may have newer ones by now.

    Heads that are not taken from there are drawn from the run's seed, the same for student and teacher: those that a
    run without init_from would draw. Returns the pair, and on one line where its weights came from and what was done to
    them. Raises UserError on all ranks alike, GoneCheckpoint where a run has deleted its checkpoint meanwhile.
    """
    student, teacher, origin, error = CosmosModel(config.model), CosmosModel(config.model), "", None
    gone = None
    try:
        initial = initial or open_initial(config)
        if not initial.has_heads:
            student.init_weights(torch.Generator().manual_seed(config.seed))
        student.load_state_dict(student.state_dict() | initial.read("student"))
        teacher.load_state_dict(student.state_dict() | initial.read("teacher"))
        origin = initial.describe()
    except GoneCheckpoint as failure:
        gone = failure.folder
    except UserError as failure:
        error = failure
    raise_together(ranks, error)
    gone = next((folder for folder in from_all(gone, ranks) if folder is not None), None)
    if gone is not None:
        raise GoneCheckpoint(gone, "init_from: ")
    return pair_of_models(config, ranks, student, teacher), origin
