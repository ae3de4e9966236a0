"""The clock of phases: intervals that cover a step without gap or overlap, and nothing where nobody listens."""

import itertools

import pytest

from cosmos_scale.phases import listening, phase, stop_listening
from cosmos_scale.profiling.step_clock import StepClock


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look at the clock be a second after the last."""
    counter = itertools.count()
    monkeypatch.setattr("cosmos_scale.profiling.step_clock.time.perf_counter", lambda: float(next(counter)))


def step() -> None:
    with phase("data"), phase("decode"):  # a part: the training process loads
        pass
    with phase("teacher"), phase("refresh"):
        pass
    with phase("backward"):
        for _ in range(2):
            with phase("reduction"):
                pass


@pytest.mark.usefixtures("ticks")
def test_the_intervals_of_a_step_cover_it() -> None:
    clock = StepClock(on_gpu=False)
    clock.measure(step)
    clock.measure(step)
    first, second = clock.steps()
    assert first == second
    # 14 marks of phases, one at each end: 15 intervals of a second.
    assert first.host_ms == first.device_ms == 15e3
    expected = {"rest": 4, "data": 3, "data/decode": 1, "teacher": 2, "refresh": 1, "backward": 5}
    assert first.host == {key: 1e3 * seconds for key, seconds in (expected | {"backward/reduction": 2}).items()}
    assert first.device == first.host
    # 16 marks a step. Two looks at the clock around 100 phases: 201 s for 200 marks.
    assert clock.marks_ms() == pytest.approx(16e3 * 201 / 200)


@pytest.mark.usefixtures("ticks")
def test_a_step_that_fails_is_not_counted() -> None:
    clock = StepClock(on_gpu=False)

    def fails() -> None:
        with phase("student"):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.measure(fails)
    clock.measure(step)
    assert len(clock.steps()) == 1


def test_phases_are_told_to_the_last_listener_alone() -> None:
    clock, other = StepClock(on_gpu=False), StepClock(on_gpu=False)
    with listening(other):
        clock.measure(step)
    assert (len(clock.steps()), len(other.steps())) == (1, 0)
    assert phase("student") is phase("teacher"), "one empty context serves all phases that nobody listens to"


def test_a_forked_process_listens_to_nothing() -> None:
    with listening(StepClock(on_gpu=False)):
        stop_listening()
        assert phase("student") is phase("teacher")
    assert phase("student") is phase("teacher")
