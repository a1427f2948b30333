"""The docs and `infra/` name files, options, variables, commands, tests and figures that exist."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.config import Config
from tests.conftest import ROOT
from tests.whole.test_infra import INFRA, KUBERAY, RAY, RAY_COMMAND, UV, documents, groups, options_of

DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(INFRA.rglob("*.md")),
]
TEXTS = sorted(
    {*DOCS, *(path for path in INFRA.rglob("*") if path.suffix in ("", ".py", ".yaml") and path.is_file())}
)
OTHER_OPTIONS = {
    # Of programs that are not this repository's, which the docs use.
    *("--from", "--from-env-file", "--follow", "--sort-by"),  # kubectl
    *("--version", "--namespace", "--create-namespace"),  # helm
    "--ignore-zeros",  # tar
}
of_each_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def readme() -> str:
    return (INFRA / "README.md").read_text()


@of_each_doc
def test_every_file_and_heading_that_the_docs_name_exists(doc):
    text = doc.read_text()
    named = set(re.findall(r"(?<![\w/.:-])((?:docs|infra|jobs|pipeline|tests)/[\w./-]*\w)", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    for name, anchor in re.findall(r"\]\(([^)#:]*)#?([^)#:]*)\)", text):
        linked = doc.parent / name if name else doc
        assert linked.exists(), name
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor


@of_each_doc
def test_every_make_target_and_test_that_the_docs_name_exists(doc):
    text = doc.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(re.findall(r"`[^`]+`|^    .+$", text, re.MULTILINE))))
    assert named <= targets
    tests = "\n".join(
        re.findall(r"^ *def (test_\w+)", "\n".join(map(Path.read_text, (ROOT / "tests").rglob("*.py"))), re.M)
    )
    # What follows an -k of kubectl is a folder.
    for word in re.findall(r"-k '?(\w+)\b(?!/)", text):
        assert word in tests, word


@functools.cache
def known_options() -> frozenset[str]:
    known = set(OTHER_OPTIONS)
    texts = "\n".join(path.read_text() for path in DOCS)
    for name in {*re.findall(r"\bjobs/\w+\.py", texts), "infra/kuberay/launch.py"}:
        known |= options_of(sys.executable, ROOT / name)
    known |= options_of("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.faults.kills")
    known |= options_of("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "benchmarks.bench")
    for command in (("start",), ("up",), ("down",), ("dashboard",), ("status",), ("job", "submit"), ("job", "logs")):
        known |= options_of(RAY_COMMAND, *command)
    return frozenset(known | options_of(UV, "pip", "install"))


@pytest.mark.slow
@of_each_doc
def test_every_option_that_the_docs_name_exists(doc):
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", doc.read_text())) - known_options() == set()


def test_kubectls_commands_of_the_readme_name_what_there_is(readme):
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    (scheduled,) = documents(KUBERAY / "cronjob.yaml")
    commands = re.findall(r"\bkubectl ((?:[^`#\n]|\\\n)+)", readme)
    assert len(commands) >= 10
    kinds = {"get": {"rayjobs", "events"}, "describe": {"pod"}, "create": {"namespace", "secret", "job"}}
    for command in commands:
        verb, *words = shlex.split(command)
        if verb in kinds and words and not words[0].startswith("-"):
            assert words[0] in kinds[verb], command
        else:
            assert verb in ("apply", "create", "logs"), command
        for option, value in itertools.pairwise(words):
            assert option != "-n" or value == kustomization["namespace"], command
        assert "-n" in words or {"namespace", "pod", "-k"} & set(words), command
    assert f"--from=cronjob/{scheduled['metadata']['name']} embed-try" in readme
    assert set(re.findall(r"\bjob/([\w-]+)", readme)) == {"NAME_OF_THE_RAYJOB", "embed-try"}


def test_the_readmes_sed_names_another_image_in_every_file(readme, tmp_path):
    shutil.copytree(INFRA, tmp_path / "infra")
    (command,) = re.findall(r"^    (sed .+)$", readme, re.MULTILINE)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    for path in INFRA.rglob("*.yaml"):
        changed = (tmp_path / path.relative_to(ROOT)).read_text()
        assert "registry.example.com" not in changed, path
        num_images = path.read_text().count("registry.example.com/shard-embedder:0.1.0")
        assert changed.count("YOUR_REGISTRY/shard-embedder:0.1.0") == num_images


@of_each_doc
def test_every_figure_of_the_benchmark_that_the_docs_name_is_one_that_it_makes(doc):
    made = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for name in re.findall(r"`((?:sizing|scaling)_\w+|\w+_images_per_s)`", doc.read_text()):
        pattern = re.sub(r"BACKBONE|(?<=_)N(?=_)", r"\\{\\w+\\}", name)
        assert re.search(rf'"{pattern}"', made), name


# Found without an import, which takes seconds.
TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent
# What the README quotes of a log, and where it is said.
SAID = {
    "WARNING   Ray has no GPU here": ROOT / "jobs" / "support" / "console.py",
    "no part stored for": ROOT / "jobs" / "support" / "console.py",
    "driver on your system is too old": TORCH / "lib" / "libc10_cuda.so",
}


def test_what_the_readme_quotes_of_a_log_is_said(readme):
    for text, path in SAID.items():
        assert f"`{text}`" in readme
        if path.suffix == ".so" and not path.exists():
            continue  # torch for CPUs alone
        source = path.read_bytes()
        # The mark of a warning is said in one place for all of them.
        assert all(piece.encode() in source for piece in re.split(r"(?<=^WARNING   )", text)), text


@functools.cache
def known_variables() -> dict[str, Callable[[str], bool]]:
    """What tells whether a variable exists, by how its name begins: the help or the code of what reads it."""
    import botocore.configprovider

    # The last stands for any of them.
    embed = {f"EMBED_{name.upper()}" for name in Config.__dataclass_fields__} | {"EMBED_CONFIG", "EMBED_NAME"}
    # What tests ask for, by the lines that read it.
    for path in (ROOT / "tests").glob("*.py"):
        embed |= set(re.findall(r'os\.environ\.get\("(EMBED_\w+)"', path.read_text()))
    of_aws = json.dumps([str(one) for one in botocore.configprovider.BOTOCORE_DEFAUT_SESSION_VARIABLES.values()])
    of_aws += " AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_ENDPOINT_URL"
    of_ray = [path.read_bytes() for path in sorted(RAY.rglob("*.py"))]
    # What is set for a node is read there alone.
    of_ray.append((RAY / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes())
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    of_python = ask([sys.executable, "--help-env"]).stdout
    of_uv = ask([UV, "pip", "install", "--help"]).stdout
    return {
        "EMBED": lambda name: name in embed,
        "AWS": lambda name: name in re.findall(r"AWS_\w+", of_aws),
        "RAY": lambda name: any(re.search(rb"\b%s\b" % name.encode(), source) for source in of_ray),
        "PYTHON": lambda name: name in re.findall(r"PYTHON\w+", of_python),
        "UV": lambda name: name in re.findall(r"UV_\w+", of_uv),
        # NVIDIA's container runtime reads them, which no package has.
        "NVIDIA": lambda name: name in ("NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES"),
    }


VARIABLE = re.compile(r"\b(?:(EMBED|AWS|RAY|UV|NVIDIA)_\w+|(PYTHON)[A-Z]+)\b")


def unknown_variables(text: str) -> set[str]:
    known = known_variables()
    return {found[0] for found in VARIABLE.finditer(text) if not known[found[1] or found[2]](found[0])}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_that_a_file_names_exists_and_a_misspelt_one_is_seen(path):
    text = path.read_text()
    assert unknown_variables(text) == set()
    misspelt = {f"{found[0]}Z" for found in VARIABLE.finditer(text)}
    assert unknown_variables(" ".join(misspelt)) == misspelt


def test_every_field_of_the_report_that_the_readme_names_exists(readme):
    text = (ROOT / "pipeline" / "report.py").read_text()
    named = set(re.findall(r"`report\.json`'s `(\w+)`", readme))
    assert "device_hours_per_million_images" in named
    assert [name for name in named if f'"{name}"' not in text] == []


def test_the_readme_tells_every_exit_code_and_object_by_its_name(readme):
    (rayjob,) = documents(KUBERAY / "rayjob.yaml")
    for name in ("embed-settings", "embed-object-store", "embed-launcher"):
        assert name in readme
    for code in (2, 3, 4, 5, 69, 75):
        assert re.search(rf"^\| {code} \|", readme, re.MULTILINE), code
    for kind in groups(rayjob["spec"]):
        assert f"`{kind}`" in readme
