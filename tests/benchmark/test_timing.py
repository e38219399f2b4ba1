import pytest

from vision_attn.benchmark import timing
from vision_attn.benchmark.timing import Timing, interleaved


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when told to."""

    class Clock:
        now = 0.0

        def advance(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_calls_take_turns_and_warmup_is_not_timed(clock):
    order = []
    durations = {"a": iter([100, 1, 5, 2]), "b": iter([100, 20, 10, 30])}

    def call(name):
        order.append(name)
        clock.advance(next(durations[name]))

    told = []
    timings = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, repeats=3, warmup=1, on_run=told.append)
    assert order == told == ["a", "b"] * 4
    assert timings["a"].samples == (1, 5, 2)
    assert timings["a"].median == 2
    assert timings["b"].median == 20
    assert list(timings) == ["a", "b"]


def test_spread_is_relative_to_the_median():
    assert Timing((2.0, 1.0, 4.0)).spread == 1.5


@pytest.mark.parametrize(
    ("options", "message"), [({"repeats": 0}, "repeats .* got 0"), ({"repeats": 1, "warmup": -1}, "warmup .* got -1")]
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"interleaved: {message}"):
        interleaved({"a": lambda: None}, **options)
