"""The benchmark's step is the trainer's step, and its time goes to the parts that took it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.step import Measured, Stopwatch, Trainer
from cosmos_scale.engine.ranks import start_ranks
from cosmos_scale.engine.student import Student
from cosmos_scale.engine.teacher import Teacher
from cosmos_scale.loss import CosmosLoss
from cosmos_scale.testing.tiny import build_tiny, tiny_batch, tiny_config


def test_timed_steps_are_the_trainers_bit_for_bit() -> None:
    config, ranks = tiny_config(), start_ranks("cpu")
    plain, trainer = build_tiny(config, ranks), Trainer(config, ranks)
    for step in range(2):  # the second step shows that the first updated student and teacher alike
        lr, momentum = config.optimizer.lr, config.ema.momentum
        expected = plain.step(step, lr=lr, momentum=momentum).total
        trainer.watch.start(cutting=True)
        assert torch.equal(trainer.step(tiny_batch(step)), expected)
    weights, teacher = plain.student.model.state_dict(), plain.teacher.model.state_dict()
    for name, weight in trainer.student.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    for name, weight in trainer.teacher.model.state_dict().items():
        assert torch.equal(weight, teacher[name]), name
    plain.close()
    trainer.pair.close()


def test_time_goes_to_the_part_that_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the trainer's own calls advance, each by another amount."""
    clock = 0

    def advance_after(owner: type, method: str, seconds: int) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def slow(*args: Any, **kwargs: Any) -> Any:
            nonlocal clock
            result = call(*args, **kwargs)
            clock += seconds
            return result

        monkeypatch.setattr(owner, method, slow)

    monkeypatch.setattr(Stopwatch, "_now", lambda watch: clock)
    trainer = Trainer(tiny_config(), start_ranks("cpu"))
    advance_after(Student, "__call__", 1)
    advance_after(Teacher, "__call__", 10)
    advance_after(CosmosLoss, "__call__", 100)
    advance_after(Student, "backward", 1_000)
    advance_after(Student, "update", 10_000)
    advance_after(Teacher, "refresh", 20_000)

    trainer.watch.start(cutting=True)
    trainer.step(tiny_batch(0))
    expected = {"data": 0, "student": 1, "teacher": 10, "loss": 100, "backward": 1_000, "update": 30_000}
    assert trainer.watch.parts == expected
    assert trainer.watch.stop() == sum(expected.values())

    trainer.watch.start(cutting=False)
    trainer.step(tiny_batch(1))
    assert trainer.watch.parts == dict.fromkeys(expected, 0)
    assert trainer.watch.stop() == sum(expected.values())
    trainer.pair.close()


def test_shares_come_from_medians_and_leave_no_time_out() -> None:
    # One slow step, as a busy machine has them, moves neither share.
    measured = Measured([4.0, 4.0, 19.0], {"data": [1.0, 1.0, 16.0], "student": [3.0, 3.0, 3.0]})
    assert measured.shares() == {"data": 0.25, "student": 0.75}
