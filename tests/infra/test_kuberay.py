"""The manifests of `infra/kuberay/` are what KubeRay and Kubernetes accept, and agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
import tomllib

import botocore.session
import pytest
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT, DEFAULT_PORT

from shard_embedder.pipeline.core.config import parse
from tests.conftest import ROOT
from tests.infra.files import (
    CORE_KINDS,
    INFRA,
    KUBERAY,
    RAY_KINDS,
    SPOT_LABELS,
    check_texts,
    copied,
    documents,
    groups,
    locked,
    misspelt,
    on_demand,
    options_of_ray,
    passes,
    pods,
    walk,
)


@pytest.mark.slow
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
                assert {f"--{name}" for name in value} <= options_of_ray("start"), path
