"""The cluster of `ray up` is what Ray and EC2 accept."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.infra.files import (
    INFRA,
    RAY,
    documents,
    locked,
    misspelt,
    on_demand,
    options_of,
    options_of_ray,
    passes,
    walk,
)


def chosen(value: Any, shape: Any) -> Iterator[tuple[str, list[str]]]:
    """Every text of a request to AWS that is one of a choice, with the choice."""
    if shape.type_name == "structure":
        for name, below in value.items():
            yield from chosen(below, shape.members[name])
    elif shape.type_name == "list":
        for below in value:
            yield from chosen(below, shape.member)
    elif getattr(shape, "enum", None):
        yield value, shape.enum


@pytest.fixture(scope="module")
def check_cluster() -> Callable[[dict[str, Any]], None]:
    """Raise where Ray or EC2 would not take a cluster."""
    import botocore.validate
    from ray.autoscaler._private import providers, util

    aws = botocore.session.Session()
    run_instances = aws.get_service_model("ec2").operation_model("RunInstances").input_shape
    schema = json.loads((RAY / "autoscaler/ray-schema.json").read_text())
    of_provider = set(schema["properties"]["provider"]["properties"])

    def check(cluster: dict[str, Any]) -> None:
        util.validate_config(util.prepare_config(copy.deepcopy(cluster)))
        unknown = set(cluster["provider"]) - of_provider
        assert not unknown, unknown
        assert cluster["provider"]["type"] in providers._NODE_PROVIDERS
        assert cluster["provider"]["region"] in aws.get_available_regions("ec2")
        for node in cluster["available_node_types"].values():
            request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
            report = botocore.validate.ParamValidator().validate(request, run_instances)
            assert not report.has_errors(), report.generate_report()
            assert [text for text, choice in chosen(request, run_instances) if text not in choice] == []
            assert f"-{cluster['auth']['ssh_user']}-" in request["ImageId"]
            assert re.fullmatch(r"resolve:ssm:/aws/service/[\w./-]+/latest/ami-id", request["ImageId"])
            assert [one["DeviceName"] for one in request["BlockDeviceMappings"]] == ["/dev/sda1"]
            assert set(node["resources"]) <= {"CPU", "GPU"}

    return check


@pytest.mark.slow
def test_ray_and_ec2_know_every_field_of_the_cluster_and_a_misspelt_one_is_seen(check_cluster):
    (cluster,) = documents(INFRA / "aws.yaml")
    check_cluster(cluster)
    unseen = [path for path, wrong in misspelt(cluster) if passes(check_cluster, wrong)]
    # The names of the node types are the user's.
    users = re.compile(r"available_node_types\.(?!\w*head$)\w+")
    assert [path for path in unseen if not users.fullmatch(path)] == []


def test_a_misspelt_value_of_the_cluster_is_seen_as_well(check_cluster):
    (cluster,) = documents(INFRA / "aws.yaml")
    unseen = set()
    for path, value in walk(cluster):
        if isinstance(value, str):
            wrong = copy.deepcopy(cluster)
            parent = functools.reduce(lambda one, key: one[key], path[:-1], wrong)
            parent[path[-1]] = f"{value}z"
            if passes(check_cluster, wrong):
                unseen.add(next(name for name in reversed(path) if isinstance(name, str)))
    # Names that are the user's, and what other tests look at.
    names = {"cluster_name", "image", "container_name", "Name"}
    commands = {"head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"}
    assert unseen == names | commands | {"run_options", "worker_run_options"}


def test_the_cluster_has_spot_workers_of_both_kinds_and_a_head_that_runs_nothing():
    (cluster,) = documents(INFRA / "aws.yaml")
    nodes = cluster["available_node_types"]
    assert set(nodes) == {"head", "decode", "gpu"}
    assert cluster["head_node_type"] == "head"
    assert nodes["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    for name in ("decode", "gpu"):
        assert nodes[name]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 1 <= nodes[name]["min_workers"] < nodes[name]["max_workers"]
    assert cluster["max_workers"] == nodes["decode"]["max_workers"] + nodes["gpu"]["max_workers"]
    # Ray's own default would install a nightly build of Ray.
    assert cluster["setup_commands"] == []


def test_without_spot_as_the_comments_say_a_cluster_only_lacks_spot(check_cluster):
    (expected,) = documents(INFRA / "aws.yaml")
    for name in ("decode", "gpu"):
        del expected["available_node_types"][name]["node_config"]["InstanceMarketOptions"]
    cluster = on_demand((INFRA / "aws.yaml").read_text(), 2)
    check_cluster(cluster)
    assert cluster == expected


def test_gpus_are_handed_to_containers_of_gpu_machines_and_the_image_asks_for_none(dockerfile):
    (cluster,) = documents(INFRA / "aws.yaml")
    asking = {name for name, node in cluster["available_node_types"].items() if "VISIBLE_DEVICES" in str(node)}
    assert asking == {"gpu"}
    gpu = cluster["available_node_types"]["gpu"]["docker"]
    assert gpu == {"worker_run_options": ["-e NVIDIA_VISIBLE_DEVICES=all"]}
    # In the image it would hand GPUs to pods that asked Kubernetes for none.
    assert "NVIDIA_VISIBLE_DEVICES" not in dockerfile


def test_the_clusters_commands_use_options_that_ray_has_and_agree_with_each_other():
    (cluster,) = documents(INFRA / "aws.yaml")
    started = []
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        stop, start = commands
        assert stop == "ray stop"
        words = shlex.split(start)
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        assert options.keys() <= options_of_ray("start"), start
        assert [word for word in words if not word.startswith("--")][-2:] == ["ray", "start"]
        started.append(options)
    head, worker = started
    assert worker["--address"] == f"$RAY_HEAD_IP:{head['--port']}"
    assert worker["--object-manager-port"] == head["--object-manager-port"]
    # Whoever reaches the dashboard runs code with the head's role.
    assert head["--dashboard-host"] == "127.0.0.1"
    assert head["--num-cpus"] == str(cluster["available_node_types"]["head"]["resources"]["CPU"])
    # Where Ray puts it.
    assert (
        f'{{"{head["--autoscaling-config"]}": remote_config_file'
        in (RAY / "autoscaler/_private/commands.py").read_text()
    )
    (ulimit,) = cluster["docker"]["run_options"]
    assert re.fullmatch(r"--ulimit nofile=(\d+):\1", ulimit)


def test_the_head_installs_the_locks_botocore_with_options_that_pip_has():
    (cluster,) = documents(INFRA / "aws.yaml")
    (install,) = cluster["head_setup_commands"]
    python, *arguments = install.split()
    assert (python, arguments[:3]) == ("python", ["-m", "pip", "install"])
    assert {word for word in arguments if word.startswith("--")} <= options_of(sys.executable, "-m", "pip", "install")
    assert set(re.findall(r"boto3==([\d.]+)", (INFRA / "aws.yaml").read_text())) == {locked("botocore")}
