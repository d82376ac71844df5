"""The clock of regions: all of a step's time, each moment once, and in the trace."""

import json
import time
from pathlib import Path
from threading import Thread

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.regions import REGIONS, SPAN, Region, RegionClock

DEVICE = torch.device("cpu")


@settings(max_examples=30)
@given(st.lists(st.lists(st.tuples(st.sampled_from(REGIONS), st.booleans())), min_size=1, max_size=4))
def test_regions_add_up_to_each_step(told: list[list[tuple[Region, bool]]]) -> None:
    """Whatever is told: (region, whether it is left again)."""
    clock = RegionClock(DEVICE)
    before = time.perf_counter_ns()
    for number, regions in enumerate(told):
        clock.begin(number)
        for region, left in regions:
            if left:
                with clock.inside(region), clock.inside("other"):
                    pass
            else:
                clock.at(region)
    clock.end()
    after = time.perf_counter_ns()
    assert [step.step for step in clock.steps] == list(range(len(told)))
    for step, regions in zip(clock.steps, told, strict=True):
        assert sum(step.host_ns.values()) == step.wall_ns
        touched = {region for region, _ in regions} | {"other"}
        assert {region for region in REGIONS if step.host_ns[region]} <= touched
        assert not step.device_ns
    assert sum(step.wall_ns for step in clock.steps) <= after - before  # steps follow one another without a gap


def test_a_region_inside_another_is_not_counted_twice() -> None:
    """Nor if another thread is in it, as autograd's is on a GPU while the first one waits."""
    clock = RegionClock(DEVICE)
    clock.begin(1)
    clock.at("backward")

    def reduce() -> None:
        with clock.inside("reduction"):
            time.sleep(0.02)

    reduce()
    thread = Thread(target=reduce)
    thread.start()
    thread.join()
    time.sleep(0.02)  # backward again
    clock.at("optimizer")
    clock.end()
    (step,) = clock.steps
    assert step.host_ns["reduction"] >= 0.04e9
    assert step.host_ns["backward"] >= 0.02e9
    assert step.wall_ns - step.host_ns["reduction"] >= step.host_ns["backward"] + step.host_ns["optimizer"]


def test_spans_nest_in_the_trace(tmp_path: Path) -> None:
    clock = RegionClock(DEVICE)
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as trace:
        for number in (1, 2):
            clock.begin(number)
            clock.at("backward")
            with clock.inside("reduction"):
                torch.ones(8).sum()
            clock.at("optimizer")
        clock.end()
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [
        (event["name"].removeprefix(SPAN), event["ts"], event["ts"] + event["dur"])
        for event in events
        if str(event.get("name")).startswith(SPAN)
    ]
    spans.sort(key=lambda span: (span[1], -span[2]))
    expected = ("other", "backward", "reduction", "optimizer")
    assert [name for name, *_ in spans] == ["step 1", *expected, "step 2", *expected]
    for inner, outer in ((3, 2), (8, 7), (4, 0), (9, 5)):
        assert spans[outer][1] <= spans[inner][1] <= spans[inner][2] <= spans[outer][2]
