"""The docs and `infra/` name files, options, variables, messages, commands, tests and figures that exist."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shard_embedder.jobs.embed import gather, parser
from shard_embedder.jobs.support import exit_codes
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.schema import ERRORS_SCHEMA
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.settings import FORMAT
from shard_embedder.pipeline.run import verdict
from tests.conftest import ROOT, write_shards, write_tar
from tests.infra.files import INFRA, KUBERAY, RAY, UV, documents, groups, options_of, options_of_main, options_of_ray
from tests.outputs import embed

DOCS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(INFRA.rglob("*.md")),
]
TEXTS = sorted(
    {*DOCS, *(path for path in INFRA.rglob("*") if path.suffix in ("", ".py", ".yaml") and path.is_file())}
)
CODE = ("benchmarks", "jobs", "pipeline", "shard_embedder")
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
    named = set(re.findall(r"(?<![\w/.:-])((?:benchmarks|docs|examples|infra|jobs|pipeline|tests)/[\w./-]*\w)", text))
    # What a reader makes is none of the repository.
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    named = {name for name in named if not any(name == one or name.startswith(f"{one}/") for one in ignored)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    for name, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if name.startswith("http"):
            continue
        linked = doc.parent / name if name else doc
        assert linked.exists(), name
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, anchor


def test_every_file_and_module_that_the_code_names_exists():
    missing = []
    for path in [ROOT / "benchmarks" / "README.md", *(p for top in CODE for p in (ROOT / top).rglob("*.py"))]:
        text = path.read_text()
        # `templates/x.j2` is below its own package.
        named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|j2|md|toml|yaml))`", text)
        missing += [(path, name) for name in named if not any((top / name).exists() for top in (ROOT, path.parent))]
        modules = re.findall(rf"python3? -m ((?:{'|'.join(CODE)})\b[\w.]*)", text)
        missing += [(path, name) for name in modules if importlib.util.find_spec(name) is None]
    assert missing == []


@of_each_doc
def test_every_make_target_and_test_that_the_docs_name_exists(doc):
    text = doc.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    fenced = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    typed = "\n".join([*fenced, *re.findall(r"(?<!`)`[^`\n]+`(?!`)", text)])
    named = set(re.findall(r"\bmake ([a-z-]+)\b", typed))
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
    jobs = {f"shard_embedder.jobs.{name}" for name in re.findall(r"(?<!tests/)\bjobs/(\w+)\.py", texts)}
    for module in (*jobs, "benchmarks.bench", "tests.faults.kills"):
        known |= options_of_main(importlib.import_module(module).main)
    for command in (("start",), ("up",), ("down",), ("dashboard",), ("status",), ("job", "submit"), ("job", "logs")):
        known |= options_of_ray(*command)
    known |= options_of(sys.executable, KUBERAY / "launch.py")
    return frozenset(known | options_of("tar") | options_of(UV, "pip", "install"))


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
            assert verb in ("apply", "create", "logs", "kustomize"), command
        for option, value in itertools.pairwise(words):
            assert option != "-n" or value == kustomization["namespace"], command
        assert "-n" in words or {"namespace", "pod", "-k", "infra/mine"} & set(words), command
    assert f"--from=cronjob/{scheduled['metadata']['name']} embed-try" in readme
    assert set(re.findall(r"\bjob/([\w-]+)", readme)) == {"NAME_OF_THE_RAYJOB", "embed-try"}


def test_the_readmes_sed_names_another_image_and_edits_no_file_of_the_repository(readme, tmp_path):
    shutil.copytree(INFRA, tmp_path / "infra")
    commands = re.findall(r"^(sed \S+ (\S+)) [|>] .+$", readme, re.MULTILINE)
    assert {path for _, path in commands} == {"infra/aws.yaml", "infra/kuberay/rayjob.yaml"}
    for command, path in commands:
        before = (ROOT / path).read_text()
        sed = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, check=True)
        changed = sed(["sh", "-c", command], env={**os.environ, "IMAGE": "mine:1"}).stdout
        assert changed == before.replace("registry.example.com/shard-embedder:0.1.0", "mine:1") != before
        assert (tmp_path / path).read_text() == before


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
    for path in (ROOT / "tests").rglob("*.py"):
        embed |= set(re.findall(r'os\.environ\.get\("(EMBED_\w+)"', path.read_text()))
    of_aws = json.dumps([str(one) for one in botocore.configprovider.BOTOCORE_DEFAUT_SESSION_VARIABLES.values()])
    of_aws += " AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_ENDPOINT_URL"
    # What is set for a node is read there alone.
    sources = (*RAY.rglob("*.py"), RAY / "core" / "src" / "ray" / "raylet" / "raylet")
    of_ray = {name.decode() for path in sources for name in re.findall(rb"\bRAY_\w+", path.read_bytes())}
    ask = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    of_python = ask([sys.executable, "--help-env"]).stdout
    of_uv = ask([UV, "pip", "install", "--help"]).stdout
    return {
        "EMBED": lambda name: name in embed,
        "AWS": lambda name: name in re.findall(r"AWS_\w+", of_aws),
        "RAY": lambda name: name in of_ray,
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
    text = (ROOT / "pipeline" / "run" / "report.py").read_text()
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


def default_of(name: str, text: str) -> str:
    """The default of an option as the docs show it: that of `Config`, else what its help says."""
    default = {field.name: field.default for field in dataclasses.fields(Config)}.get(name)
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, bool) or name == "dry_run":
        return "on" if default else "off"
    if default in (None, ()):
        said = re.search(r"\(default: (?:by )?(.+)\)$", text)
        return {"id": "key", "image_member": "by a fixed order", "batch_size": "by device"}.get(
            name, said[1] if said else "-"
        )
    return str(default)


def rows_of_options(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]*?) \|", page, re.MULTILINE))


def test_the_page_of_options_has_each_option_with_its_default():
    page = (ROOT / "docs" / "options.md").read_text()
    actions = [action for action in parser()._actions if action.dest != "help"]
    assert {action.dest for action in actions} == {*Config.__dataclass_fields__, "config", "dry_run"}
    wanted = {action.option_strings[0][2:]: default_of(action.dest, action.help or "") for action in actions}
    assert rows_of_options(page) == wanted
    for action in actions:
        (row,) = re.findall(rf"^\| `{action.option_strings[0]}` \|.*$", page, re.MULTILINE)
        # All the values that it may have, or the default alone beside others that are described.
        assert all(
            f"`{choice}`" in row or choice == default_of(action.dest, "") for choice in action.choices or ()
        ), row


def test_options_that_the_page_marks_are_the_settings_of_an_output(tmp_path):
    page = (ROOT / "docs" / "options.md").read_text()
    marked = {name.replace("-", "_") for name in re.findall(r"^\| `--([a-z-]+)` \|[^|]*\| \*output\.\*", page, re.M)}
    write_shards(tmp_path / "in", num_shards=1)
    embed(tmp_path / "in", tmp_path / "out")
    made = read_fingerprint(str(tmp_path / "out"))
    assert made is not None
    settings = set(made.to_json()["settings"])
    assert marked - {"weights", "image_size"} == settings - {"format", "weights_sha256", "embedding_shape"}


def test_the_page_of_the_output_names_what_is_stored(tmp_path):
    page = (ROOT / "docs" / "output.md").read_text()
    write_shards(tmp_path / "in", num_shards=1)
    embed(tmp_path / "in", tmp_path / "out")
    part = pq.read_schema(next((tmp_path / "out" / "embeddings").rglob("*.parquet")))
    section = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.M))
    first = {title: set(re.findall(r"^\| ([^|]+) \|", text, re.M)) for title, text in section.items()}
    columns = {
        title: {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} for title, cells in first.items()
    }
    assert columns["Embeddings"] == set(part.names)
    assert columns["Errors"] == set(ERRORS_SCHEMA.names)
    keys = {key.decode().removeprefix("embed.") for key in part.metadata if key.startswith(b"embed.")}
    assert columns["Metadata"] == keys
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert columns["run.json"] == set(run)
    assert f'"format": {FORMAT}' in section["run.json"]
    assert run["settings"]["format"] == FORMAT
    report = (ROOT / "pipeline" / "run" / "report.py").read_text()
    named = set(re.findall(r"`(\w+)`", section["report.json"]))
    assert len(named) > 8
    assert [name for name in named if f'"{name}"' not in report] == []


def test_the_runbook_has_every_exit_code_and_quotes_messages_that_exist():
    page = (ROOT / "docs" / "runbook.md").read_text()
    defined = {**vars(exit_codes), **vars(verdict)}
    codes = {value for name, value in defined.items() if name.startswith("EXIT_")}
    for path in (ROOT / "jobs" / "submit.py", KUBERAY / "launch.py", ROOT / "jobs" / "verify.py"):
        codes |= {int(code) for code in re.findall(r"^_?EXIT_\w+ = (\d+)$", path.read_text(), re.MULTILINE)}
    told = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in cell.split(",")}
    assert told == codes | {130}
    said = "".join(path.read_text() for room in ("pipeline", "jobs") for path in (ROOT / room).rglob("*.py"))
    # Values stand in braces there, and constants behind some of the texts.
    said = re.sub(r"\{SUFFIX\}", ".tar", said)
    quoted = [
        text
        for cell in re.findall(r"^(?:\||-) ?((?:`[^`]+`(?:, )?)+)", page, re.MULTILINE)
        for text in re.findall(r"`([^`]+)`", cell)
        if " " in text or "..." in text
    ]
    assert len(quoted) >= 30
    system = ("No space left on device",)
    for text in quoted:
        for piece in filter(None, (piece.strip() for piece in text.split("..."))):
            assert piece in system or re.sub(r"^WARNING   ", "", piece) in said, (text, piece)


def test_the_runbooks_block_prints_the_shards_with_the_most_errors(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "runbook.md").read_text(), re.DOTALL | re.MULTILINE
    )
    write_shards(tmp_path / "in", num_shards=1)
    bad = [(f"{i}.jpg", b"no image") for i in range(2)]
    write_tar(tmp_path / "in" / "bad.tar", bad)
    write_tar(tmp_path / "in" / "worse.tar", [*bad, ("2.jpg", b"<html>")])
    embed(tmp_path / "in", tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "runbook.md", "exec"), {})
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["3", "worse", "decode"],
        ["2", "bad", "decode"],
    ]


def test_the_readme_prints_the_tree_and_is_two_screens():
    text = (ROOT / "README.md").read_text()
    tree = re.findall(r"^```text\n(pipeline/.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    rooms = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)) == rooms
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, re.MULTILINE))
    assert len(text.splitlines()) <= 120


def test_every_page_of_docs_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in text] == []


@of_each_doc
def test_no_page_has_indented_code_or_installs_a_package_that_is_not_published(doc):
    text = doc.read_text()
    assert "pip install 'shard-embedder" not in text
    assert "--cache" not in text
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"\n\n {4}\S.*", outside) == []


def test_the_example_of_a_config_file_works_with_its_comments_removed(tmp_path):
    text = (ROOT / "examples" / "job.toml").read_text()
    assert gather({"config": str(ROOT / "examples" / "job.toml")}, {}).max_error_fraction == 0.05
    # Lines that are there to be taken into use.
    every = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    assert every.count("\nkeep =") == 1
    (tmp_path / "job.toml").write_text(every)
    config = gather({"config": str(tmp_path / "job.toml")}, {})
    assert config.actors == (1, 4)
    assert [field.column for field in config.keep] == ["cls", "caption", "width"]
    (tmp_path / "job.toml").write_text(text.replace("part_rows", "part_row"))
    with pytest.raises(SettingsError, match="unknown setting 'part_row'"):
        gather({"config": str(tmp_path / "job.toml")}, {})


@pytest.mark.slow
def test_the_variable_of_the_page_of_stores_reaches_the_store():
    page = (ROOT / "docs" / "stores.md").read_text()
    told = re.findall(r"^export (FSSPEC_S3)='(.+?)'", page, re.MULTILINE)
    assert len(told) == 3
    code = "from shard_embedder.pipeline.core.storage import locate; fs, _ = locate('s3://b/k'); "
    code += "print(fs.anon, fs.req_kw, fs.s3_additional_kwargs)"
    shown = []
    for name, value in told:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), name: value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        shown.append(done.stdout.strip())
    assert shown[0].startswith("True ")
    assert "{'RequestPayer': 'requester'}" in shown[1]
    assert "'SSEKMSKeyId': 'KEY'" in shown[2]


def test_the_page_of_backbones_shows_python_that_runs():
    page = (ROOT / "docs" / "backbones.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(code, "backbones.md", "exec"), {})
