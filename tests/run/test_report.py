"""What a run counts while it goes on."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.schema import END_LAST, END_NONE, STAGES
from shard_embedder.pipeline.planning.nodes import DeviceTime
from shard_embedder.pipeline.planning.resources import plan_stages
from shard_embedder.pipeline.run.tally import Tally, slowest_stage
from shard_embedder.pipeline.run.timeline import MAX_STEPS, Timeline


def receipt(**changes: Any) -> dict[str, Any]:
    names = ("read_bytes", "written_bytes", "kept_nulls", "ignored_members", "apart_samples")
    counts = dict.fromkeys(names, 0)
    times = {f"{stage}_s": 0.25 for stage in STAGES}
    part = {
        "name": "a",
        "end": END_NONE,
        "num_samples": 4,
        "num_embedded": 4,
        "batch_size": 128,
        "device_refused": 0,
        "device_refusal": None,
        "store_fault": None,
        "reasons": [],
        "error_ids": [],
        "fault": None,
        "kept": [],
    }
    return {**counts, **times, **part, **changes}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e7), st.integers(0, 2000), st.floats(0, 100)),
        min_size=1,
        max_size=60,
    )
)
def test_a_timeline_loses_nothing_and_stays_small_however_long_a_run_is(
    parts: list[tuple[float, int, float]],
) -> None:
    timeline = Timeline()
    for at_s, images, busy_s in sorted(parts):
        timeline.add(at_s, images, dict.fromkeys(STAGES, busy_s))
    told = timeline.as_dict()
    assert sum(told["images"]) == sum(images for _, images, _ in parts)
    assert len(told["images"]) <= MAX_STEPS
    for stage in STAGES:
        assert len(told["busy_s"][stage]) == len(told["images"])
        assert sum(told["busy_s"][stage]) == pytest.approx(sum(busy_s for _, _, busy_s in parts), abs=0.15)
    # The last step is that of the last part.
    assert int(max(at_s for at_s, _, _ in parts) / told["step_s"]) == len(told["images"]) - 1
    assert json.loads(json.dumps(told)) == told


def test_a_part_stays_in_its_own_time_when_steps_are_put_together() -> None:
    timeline = Timeline()
    timeline.add(0.1, 5, dict.fromkeys(STAGES, 0.0))
    timeline.add(119.9, 7, dict.fromkeys(STAGES, 0.0))
    assert timeline.step_s == 0.5
    timeline.add(120.1, 11, dict.fromkeys(STAGES, 0.0))
    told = timeline.as_dict()
    assert told["step_s"] == 1.0
    assert {step: images for step, images in enumerate(told["images"]) if images} == {0: 5, 119: 7, 120: 11}


def test_the_timeline_has_what_the_sums_have() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add(receipt())
    tally.add(
        receipt(
            num_embedded=1,
            reasons=["broken image: a", "broken image: b", "empty: 0 bytes"],
            error_ids=["x", "y", "z"],
            end=END_LAST,
        )
    )
    told = tally.timeline.as_dict()
    assert sum(told["images"]) == tally.num_embedded == 13
    assert {stage: sum(steps) for stage, steps in told["busy_s"].items()} == tally.stage_s
    assert tally.reasons == {"broken image": 2, "empty": 1}
    assert tally.examples["broken image"] == "a, x: broken image: a"


def test_images_that_a_device_refused_are_counted_with_what_it_said_of_the_first() -> None:
    tally = Tally()
    for number, said in ((0, None), (2, "RuntimeError: nvjpegDecode failed: 6"), (1, "another")):
        tally.add(receipt(device_refused=number, device_refusal=said))
    assert (tally.device_refused, tally.device_refusal) == (3, "a: RuntimeError: nvjpegDecode failed: 6")


def test_devices_are_busy_by_those_that_were_there_and_not_by_the_most_that_were_asked_for() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0}]
    resources, _ = plan_stages(parse({"input": ["in"], "output": "out", "device": "cuda", "actors": "1:4"}), nodes)
    tally = Tally(started=time.monotonic(), resources=resources)
    tally.add(receipt(embed_s=0.0))
    tally.started -= 100
    tally.add(receipt(embed_s=50.0))
    assert tally.busy["embed"] == pytest.approx(50 / 400, rel=0.05)
    tally.devices = DeviceTime(resources.requests[0], 4, tally.started, nodes)
    assert tally.busy["embed"] == pytest.approx(50 / 100, rel=0.05)


def worked(after_s: float, **took: float) -> Tally:
    """A run of one device and a part of 40 images, stored so many seconds after the begin."""
    resources, _ = plan_stages(parse({"input": ["in"], "output": "out"}), [{"CPU": 2.0}])
    tally = Tally(started=time.monotonic() - after_s)
    tally.resources = resources
    tally.devices = DeviceTime(resources.requests[0], 1, tally.started, [{"CPU": 64.0}])
    tally.add(receipt(num_embedded=40, **{**{f"{stage}_s": 0.0 for stage in STAGES}, **took}))
    return tally


def test_rates_are_of_the_work_and_not_of_the_start() -> None:
    tally = worked(30, read_s=1.0, embed_s=9.0)
    assert (tally.start_s, tally.first_part_s) == (pytest.approx(20, abs=0.5), pytest.approx(30, abs=0.5))
    assert tally.images_per_s == pytest.approx(40 / 10, rel=0.05)
    tally.started -= 10
    tally.add(receipt(num_embedded=40))
    assert tally.images_per_s == pytest.approx(80 / 20, rel=0.05)
    # Parts that are told of at once did not take no time.
    tally = worked(30, embed_s=9.0)
    tally.add(receipt(num_embedded=40, embed_s=9.0))
    assert tally.images_per_s == pytest.approx(80 / 18, rel=0.05)
    assert (Tally().images_per_s, Tally().start_s) == (0.0, None)


def test_stages_are_busy_in_the_time_after_the_start() -> None:
    # 100 s of start, then 10 s in which the device computed for 9.
    tally = worked(110, read_s=1.0, embed_s=9.0)
    assert tally.busy["embed"] == pytest.approx(0.9, rel=0.05)
    # A stage that waits is idle from the first part on; its device was there all the time.
    tally.started, tally.devices = tally.started - 10, None
    tally.add(receipt(embed_s=0.0))
    assert tally.busy["embed"] == pytest.approx(0.45, rel=0.05)
    # Workers may report more time than the run took, as their clocks differ. The share is still at most 1.
    tally = worked(5, embed_s=9.0, decode_s=1.0)
    assert (tally.busy["embed"], slowest_stage(tally.stage_s, tally.slots, tally.work_s)[0]) == (1.0, "embed")


def test_a_million_images_are_not_told_of_less_than_a_minute_of_work() -> None:
    assert worked(100, embed_s=50.0).device_hours_per_million_images is None
    # 40 images took 80 s of one device; the 20 s before are no work.
    assert worked(100, embed_s=80.0).device_hours_per_million_images == pytest.approx(80 / 3600 / 40e-6, rel=0.02)


def test_the_smallest_batch_that_was_used_is_told() -> None:
    tally = Tally()
    for size in (128, 64, 128):
        tally.add(receipt(batch_size=size))
    assert tally.batch_size == 64
