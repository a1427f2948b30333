"""What each stage takes of a cluster, and what a cluster lacks for it; nodes here are what Ray says of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.planning.nodes import DeviceTime, Node, Request, crowded, missing
from shard_embedder.pipeline.planning.resources import Resources, held_by_others, plan_stages
from tests.conftest import ROOT

HEAD: Node = {"memory": 8e9, "object_store_memory": 1e9}
DECODE: Node = {"CPU": 16.0, "memory": 48e9}
L4: Node = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
H100: Node = {"CPU": 32.0, "GPU": 8.0, "accelerator_type:H100": 1.0}


def divided(nodes: list[Node], **settings: Any) -> tuple[Resources, str | None]:
    return plan_stages(parse({"input": ["in"], "output": "out", **settings}), nodes)


def test_a_cluster_with_gpus_gets_an_actor_for_each_and_decodes_on_every_cpu() -> None:
    resources, lacking = divided([HEAD, DECODE, DECODE, L4, H100])
    assert lacking is None
    assert (resources.device, resources.num_actors, resources.actor_gpus) == ("cuda", (9, 9), 1.0)
    assert resources.slots["decode"] == 16 + 16 + 8 + 32


@pytest.mark.parametrize(
    ("nodes", "gib", "readers"),
    [
        # A reader for each core of 4 GB.
        ([{"CPU": 8.0, "memory": 22.4e9}], 2.5, 8),
        # What no CPU is beside runs no reader; of the others the smallest has two.
        ([HEAD, DECODE, {"CPU": 2.0, "memory": 4 * 2**30}], 2.0, 22 + 2),
        ([DECODE, {**DECODE, "memory": 0.0}], 2.5, 17),
        ([{"CPU": 1.0, "memory": 48e9}], 2.5, 4),
        ([L4], None, 32),
    ],
)
def test_readers_are_bound_by_the_memory_of_the_nodes_and_fit_on_each(
    nodes: list[Node], gib: float | None, readers: int
) -> None:
    resources, _ = divided(nodes)
    assert resources.read_memory == (None if gib is None else gib * 2**30)
    assert resources.slots["read"] == readers


@pytest.mark.parametrize(
    ("nodes", "max_pixels", "mib"),
    [
        # 20 bytes a pixel, and 448 MiB for what is there without one.
        ([{"CPU": 8.0, "memory": 22.4e9}], 2**26, 1280 + 448),
        ([{"CPU": 8.0, "memory": 22.4e9}], 2**20, 20 + 448),
        # With less a core, each core has its share of what a reader leaves.
        ([{"CPU": 8.0, "memory": 10.5 * 2**30}], 2**26, 1024),
        ([DECODE, {"CPU": 2.0, "memory": 4 * 2**30}, HEAD], 2**26, 1024),
        ([L4], 2**26, None),
    ],
)
def test_decoding_reserves_what_an_image_may_take_and_leaves_no_core_idle(
    nodes: list[Node], max_pixels: int, mib: int | None
) -> None:
    resources, _ = divided(nodes, max_pixels=max_pixels)
    assert resources.decode_memory == (None if mib is None else mib * 2**20)


def test_a_resource_keeps_the_actors_to_the_nodes_that_have_it() -> None:
    resources, lacking = divided([DECODE, L4, L4, H100], actor_resource="accelerator_type:L4")
    assert lacking is None
    assert resources.num_actors == (2, 2)
    embed, *others = resources.requests
    assert [embed.room(node) for node in (DECODE, L4, H100)] == [0, 1, 0]
    assert all(other.room(DECODE) and other.room(H100) for other in others)
    on_cpu, lacking = divided([DECODE, {**DECODE, "embedder": 1.0}], actor_resource="embedder")
    assert lacking is None
    assert (on_cpu.device, on_cpu.num_actors, on_cpu.num_threads) == ("cpu", (1, 1), 16)
    assert on_cpu.slots["decode"] == 32


@pytest.mark.parametrize(
    ("nodes", "settings", "told"),
    [
        ([], {}, "no node for embed, 0.3 CPU on one node: it has no nodes"),
        ([HEAD], {}, "no node for embed, 0.3 CPU on one node: of 1 node, the nearest to it has 0 CPU"),
        (
            [HEAD, DECODE],
            {"device": "cuda"},
            "no node for embed, 0.3 CPU and 1 GPU on one node: of 2 nodes, the nearest to it has 16 CPU, 0 GPU",
        ),
        (
            [DECODE, {"GPU": 4.0}],
            {"device": "cuda"},
            "no node for embed, 4 times 0.3 CPU and 1 GPU on one node: of 2 nodes, the nearest to it has",
        ),
        (
            [HEAD, DECODE],
            {"decode": "gpu"},
            "decode gpu needs device cuda, and the cluster has no node for embed, 0.3 CPU and 1 GPU on one node",
        ),
        (
            [HEAD, DECODE],
            {"compile": True},
            "compile needs device cuda, and the cluster has no node for embed, 0.3 CPU and 1 GPU on one node",
        ),
        (
            [DECODE, L4],
            {"device": "cuda", "actors": "3:8"},
            "no node for embed, 3 times 0.3 CPU and 1 GPU on one node: there is room for 1",
        ),
        (
            [DECODE, L4],
            {"actor_resource": "accelerator_type:H100"},
            "no node for embed, 0.3 CPU on a node with accelerator_type:H100: "
            "of 2 nodes, the nearest to it has 16 CPU, 0 accelerator_type:H100",
        ),
        (
            [{"CPU": 0.3}],
            {},
            "no node for decode, 0.33 CPU on one node: of 1 node, the nearest to it has 0.3 CPU",
        ),
        (
            [{"CPU": 2.0}],
            {"actors": "6"},
            "6 actors of 0.3 CPU may fill every node, which leaves none for decode, 0.33 CPU on one node: "
            "at most 5 actors fit",
        ),
    ],
)
def test_what_a_cluster_lacks_is_named_with_the_stage_and_what_there_is(
    nodes: list[Node], settings: dict[str, Any], told: str
) -> None:
    _, lacking = divided(nodes, **settings)
    assert lacking is not None
    assert told in lacking


_LACKING = """
from shard_embedder.pipeline.planning.nodes import Request, missing
print(missing([Request("embed", 0.3)], [{"memory": 8e9}]))
"""


def test_a_quota_below_one_core_is_named_where_ray_counts_none(tmp_path: Path) -> None:
    version2, version1 = Path("/sys/fs/cgroup/cpu.max"), "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"
    path, text = (version2, "50000 100000") if version2.exists() else (version1, "50000")
    (tmp_path / "quota").write_text(text)
    # Its own view of the control group, as in a container.
    mount = f"mount --bind {tmp_path}/quota {path} && exec {sys.executable} -c '{_LACKING}'"
    try:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", mount], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        pytest.skip(f"a quota cannot be shown to a process: {error}")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"a quota cannot be shown to a process: {done.stderr.strip()}")
    told = "has 0 CPU (Ray rounds the CPU quota of this container, 0.5, down to whole cores)"
    assert told in done.stdout, done.stderr


def test_fewer_actors_than_fill_the_nodes_are_not_refused() -> None:
    for nodes, settings in (
        ([{"CPU": 1.0}], {}),
        ([{"CPU": 2.0}], {"actors": "5"}),
        # They may grow as far as Ray Data finds room: it keeps some for decoding.
        ([{"CPU": 2.0}], {"actors": "1:64"}),
        # However many there are, no actor comes to the node without GPUs.
        ([DECODE, {"CPU": 2.0, "GPU": 6.0}], {}),
    ):
        assert divided(nodes, **settings)[1] is None, (nodes, settings)


def test_a_node_is_full_when_no_task_fits_beside_its_actors() -> None:
    task = Request("decode", 0.4)
    for count, expected in ((2, None), (3, 2)):
        assert crowded(Request("embed", 0.3, count=count), task, [{"CPU": 1.0}]) == expected
    # Ray may put them on either node first.
    for count, expected in ((5, None), (6, 5)):
        assert crowded(Request("embed", 0.3, count=count), task, [{"CPU": 1.0}, {"CPU": 1.0}]) == expected


def test_a_request_that_some_node_can_hold_is_not_missing() -> None:
    assert missing([Request("embed", 0.3, 1.0), Request("decode", 0.99)], [HEAD, DECODE, L4]) is None


def test_devices_count_for_as_long_as_the_nodes_are_there() -> None:
    actor, gpu = Request("embed", 0.3, 1.0), {"CPU": 8.0, "GPU": 1.0}
    devices = DeviceTime(actor, 3, 100.0, [gpu])
    assert devices.seconds(110.0) == 10.0
    devices.look([gpu, {"CPU": 8.0, "GPU": 4.0}], 110.0)
    devices.look([{"CPU": 8.0}], 120.0)
    # 10 s of one, 10 s of three, which is the most that were asked for, and then none.
    assert (devices.seconds(150.0), devices.peak) == (40.0, 3)


def test_what_other_jobs_hold_of_a_cluster_is_told_before_actors_fill_the_rest() -> None:
    config = parse({"input": ["in"], "output": "out", "actors": "4", "device": "cpu"})
    resources, lacking = plan_stages(config, [{"CPU": 2.0, "memory": 8 * 2**30}])
    assert lacking is None
    total = {"CPU": 2.0}
    assert held_by_others(resources, total, {"CPU": 2.0}) is None
    # Four actors of another job take 1.2: four more would leave nothing for a task.
    told = held_by_others(resources, total, {"CPU": 0.8})
    assert told is not None
    assert told.startswith("the cluster has 0.8 of 2 CPUs free, and 4 actors with one task of each other stage need")
    assert held_by_others(resources, total, {}) is not None


@pytest.mark.parametrize("num_actors", [1, 4, 5])
def test_the_actors_of_six_jobs_leave_room_for_a_task_of_each_stage(num_actors: int) -> None:
    for nodes in ([{"CPU": 2.0}], [L4, L4], [{"CPU": 64.0}]):
        resources, lacking = divided(nodes, actors=str(num_actors), device="cpu")
        assert lacking is None
        left = resources.total_cpus - 6 * num_actors * resources.reserved_cpus
        assert left >= max(task.cpus for task in resources.requests[1:])
        # Few actors of a large cluster reserve as much as they count for.
        assert resources.reserved_cpus <= resources.actor_cpus
    assert resources.reserved_cpus == resources.actor_cpus == 0.3


def test_a_gpu_that_another_job_holds_is_not_free() -> None:
    config = parse({"input": ["in"], "output": "out", "device": "cuda"})
    resources, lacking = plan_stages(config, [{"CPU": 8.0, "GPU": 2.0}])
    assert lacking is None
    assert held_by_others(resources, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}) is None
    told = held_by_others(resources, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0})
    assert told is not None
    assert "1 of 2 GPUs free" in told
