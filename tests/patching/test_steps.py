"""`steps=`: operators in some denoising steps only."""

import copy
import types

import diffusers
import pytest
import torch
from probe_operators import Disc
from tiny_models import FLUX, SD3, WAN

import vision_attn as va
from vision_attn.patching.steps import StepTracker


def follow(tracker: StepTracker, values: list[float]) -> list[int]:
    steps = []
    for value in values:
        tracker.advance({"timestep": torch.tensor([value, value])})
        steps.append(tracker.step)
    return steps


class Pipe:
    def __init__(self, *timesteps: float):
        self.scheduler = types.SimpleNamespace(timesteps=torch.tensor(timesteps))


def scheduled(pipe: Pipe, tracker: StepTracker, dtype: torch.dtype = torch.float32, begin: int = 0) -> list[int]:
    """Steps counted in a run of the pipeline's scheduler, as FLUX gives timesteps to its model: twice per step."""
    steps = []
    for timestep in pipe.scheduler.timesteps[begin:]:
        first, second = follow(tracker, [float(timestep.to(dtype)) / 1000] * 2)
        assert first == second
        steps.append(first)
        pipe.scheduler.step(torch.zeros(1, 4), timestep, torch.zeros(1, 4))
    return steps


def test_a_bare_model_is_followed_by_its_timesteps():
    tracker = StepTracker(frozenset({0}))
    assert follow(tracker, [1.0, 0.7, 0.7, 0.3]) == [0, 1, 1, 2]
    assert follow(tracker, [1.0, 0.7, 0.3]) == [0, 1, 2]
    assert follow(StepTracker(frozenset({0})), [0.0, 0.2, 0.9, 0.0, 0.2]) == [0, 1, 2, 0, 1]


def test_a_run_begins_with_new_timesteps_of_the_scheduler():
    pipe = Pipe(9, 5, 1)
    tracker = StepTracker(range(1, 2), pipe)
    assert follow(tracker, [9, 9, 5, 5, 1]) == [0, 0, 1, 1, 2]
    pipe.scheduler.timesteps = torch.tensor([9.0, 5, 1])  # equal values, another run
    assert follow(tracker, [5, 1]) == [0, 1]
    assert tracker.active


def test_the_second_evaluation_of_a_step_is_no_new_step():
    """Heun and DPM2 schedulers come back to a timestep."""
    pipe = Pipe(9, 5, 1)
    assert follow(StepTracker(frozenset({0}), pipe), [9, 5, 5, 1, 1, 5]) == [0, 1, 1, 2, 2, 1]


def test_the_largest_of_per_token_timesteps_counts():
    tracker = StepTracker(frozenset({0}))
    tracker.advance({"timestep": torch.tensor([[0.0, 0.9], [0.0, 0.9]])})
    tracker.advance({"t": torch.tensor([[0.0, 0.5], [0.0, 0.5]])})
    assert tracker.step == 1


def test_a_call_without_timestep():
    with pytest.raises(va.PatchError, match="steps= needs a model that is called with a timestep, got a call without"):
        StepTracker(frozenset({0})).advance({"timestep": None})


def test_tracker_of_a_copied_pipeline_follows_the_copy():
    pipe = Pipe(9, 5)
    pipe.tracker = StepTracker(frozenset({0}), pipe)
    twin = copy.deepcopy(pipe)
    assert follow(pipe.tracker, [9, 5]) == [0, 1]
    assert follow(twin.tracker, [9, 5]) == [0, 1]
    twin.scheduler.timesteps = torch.tensor([9.0, 5.0])
    assert follow(twin.tracker, [5]) == [0]
    assert follow(pipe.tracker, [5]) == [1]


@pytest.mark.parametrize("steps", [range(1, 3), {1, 2}, [2, 1], frozenset({1, 2, 77})], ids=str)
def test_operators_are_active_in_their_steps(steps):
    model = SD3.model()
    dense = outputs(model, [900.0, 600.0, 300.0, 100.0])
    with va.patch(model, Disc(2)):
        local = outputs(model, [900.0, 600.0, 300.0, 100.0])
    with va.patch(model, Disc(2), steps=steps) as patch:
        for _ in range(2):
            mixed = outputs(model, [900.0, 600.0, 300.0, 100.0])
            assert [torch.equal(a, b) for a, b in zip(mixed, dense, strict=True)] == [True, False, False, True]
            assert [torch.equal(a, b) for a, b in zip(mixed, local, strict=True)] == [False, True, True, False]
    calls = patch.calls["transformer_blocks.0.attn"]
    assert [call.kind for call in calls] == ["dense", "operator", "dense"]
    assert calls[0].reason == "denoising step 0 is not in steps"


def outputs(model: torch.nn.Module, timesteps: list[float]) -> list[torch.Tensor]:
    with torch.no_grad():
        inputs = SD3.inputs(5, 7)
        return [model(**{**inputs, "timestep": torch.tensor([t, t])}).sample for t in timesteps]


def test_the_timestep_is_not_read_without_steps():
    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            assert function not in (torch.Tensor.max, torch.Tensor.__float__, torch.Tensor.item)
            return super().__torch_function__(function, kinds, args, kwargs or {})

    model, inputs = FLUX.model(), FLUX.inputs(5, 7)
    inputs["timestep"] = inputs["timestep"].as_subclass(Untouchable)
    with va.patch(model, Disc(2)), torch.no_grad():
        model(**inputs)
    with va.patch(model, Disc(2), steps={0}), pytest.raises(AssertionError), torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("direction", [-1, 1])
def test_a_run_of_one_step_at_the_clean_end(direction: int):
    """Where the direction is known, a timestep on the noisy side of it begins a run."""
    tracker = StepTracker(frozenset({0}), direction=direction)
    values = [1, 501, 1, 901, 601, 301, 301, 1, 1]
    assert follow(tracker, [-direction * value for value in values]) == [0, 0, 1, 0, 1, 2, 2, 3, 3]
    assert tracker.run == 3


def test_timesteps_from_clean_to_noisy_are_refused_without_a_scheduler():
    model = SD3.model()
    with va.patch(model, Disc(2), steps={0}):
        outputs(model, [900.0, 300.0, 600.0])
        with pytest.raises(
            va.PatchError, match=r"steps= needs timesteps that go from noisy to clean, got 600 and then 700"
        ):
            outputs(model, [700.0])


@pytest.mark.parametrize("begin", [0, 3])
def test_timesteps_that_the_model_rounds_to_one_are_two_steps(begin: int):
    pipe = Pipe()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=12)
    tracker = StepTracker(range(1), pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(50)
        pipe.scheduler.set_begin_index(begin)
        assert len(pipe.scheduler.timesteps[begin:].bfloat16().unique()) < 50 - begin
        assert scheduled(pipe, tracker, torch.bfloat16, begin) == list(range(50 - begin))


def test_both_evaluations_of_a_heun_step_are_one_step():
    pipe = Pipe()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    pipe.scheduler.set_timesteps(4)
    assert scheduled(pipe, StepTracker(range(1), pipe)) == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("scheduler", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.DDIMScheduler])
@pytest.mark.parametrize("own", [1, 2])
def test_runs_of_another_scheduler(scheduler, own: int):
    """Two pipelines share a model; the tracker knows the scheduler of one."""
    pipe, other = Pipe(), Pipe()
    pipe.scheduler, other.scheduler = scheduler(), scheduler()
    tracker = StepTracker(range(1), pipe, direction=-1)
    for number in (own, 3):
        pipe.scheduler.set_timesteps(number)
        assert scheduled(pipe, tracker) == list(range(number))
        for others in (3, 5, 2):
            other.scheduler.set_timesteps(others)
            assert scheduled(other, tracker) == list(range(others))


def test_calls_of_a_denoiser_end_with_their_run():
    """The second denoiser lists nothing of the last run before it is called in this one."""
    first, second = WAN.model(), WAN.model()
    pipe = Pipe(900, 100)
    pipe.components = {"transformer": first, "transformer_2": second}

    def run(models, *grid: int) -> None:
        with torch.no_grad():
            for model, timestep in models:
                model(**{**WAN.inputs(*grid), "timestep": torch.tensor([timestep, timestep])})

    with va.patch(pipe, Disc(2), steps={0, 1}) as patch:
        for grid in ((3, 4, 5), (2, 3, 4)):
            pipe.scheduler.timesteps = torch.tensor([900.0, 100.0])
            run([(first, 900)], *grid)
            assert {name.split(".")[0] for name in patch.calls} == {"transformer"}
            run([(second, 100)], *grid)
            assert {call.layout.grid for calls in patch.calls.values() for call in calls} == {grid}
            assert {name.split(".")[0] for name in patch.calls} == {"transformer", "transformer_2"}
