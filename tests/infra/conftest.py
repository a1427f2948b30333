"""What tests of `infra/` share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.infra.files import (
    INFRA,
    KUBERAY,
    documents,
)


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (INFRA / "Dockerfile").read_text()


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


@pytest.fixture(scope="session")
def kubernetes_validate() -> Iterator[Any]:
    """The package of this name. It reads a megabyte of schemas for each document: here once."""
    package = pytest.importorskip("kubernetes_validate", reason="knows the schemas of Kubernetes' kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.utils, "schema_contents", functools.cache(package.utils.schema_contents))
        yield package


@pytest.fixture(scope="module")
def check_ray_kind(test_data, kubernetes_validate) -> Callable[[dict[str, Any]], None]:
    """Raise where KubeRay would not take a document, or drop a field of it."""
    jsonschema = pytest.importorskip("jsonschema", reason="checks manifests against KubeRay's schema")
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
        # The first error will do: `validate` looks for all, to tell the best.
        for error in validators[document["apiVersion"], document["kind"]].iter_errors(document):
            raise error
        plain = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
        kubernetes_validate.validate(plain, kubernetes_validate.latest_version(), strict=True)

    return check


@pytest.fixture(scope="module")
def check_core_kind(kubernetes_validate) -> Callable[[dict[str, Any]], None]:
    return lambda document: kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


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
