"""The blocks of docs/tutorial.md, as they stand there, run one after the other in an empty folder.

A shell runs them, but for `python jobs/...`: each of these is the same command in this process, which has imported
all that it needs and has a Ray.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq
import pytest

from tests.conftest import _DATA, ROOT, Done, encode, photo

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
# Language and text of each block, in order.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)
NUM_PHOTOS, NUM_NEW = 60, 12
_MARK = "=== block"


def take_photos(folder: Path) -> None:
    """Photos of two weeks, in folders: real ones where there are any."""
    shard = _DATA / "data" / "grocery" / "grocery-val-000000.tar"
    if shard.is_file():
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")][
                : NUM_PHOTOS + NUM_NEW
            ]
            images = [file.read() for file in files if file is not None]
    else:
        images = [encode(photo(seed, (320, 240))) for seed in range(NUM_PHOTOS + NUM_NEW)]
    assert len(images) == NUM_PHOTOS + NUM_NEW
    for number, image in enumerate(images):
        week = "photos" if number < NUM_PHOTOS else "new photos"
        path = folder / week / ("shop" if number % 2 else "at home") / f"img{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def weights() -> str:
    """Real weights where there are any."""
    return str(next((_DATA / "weights").glob("mobilenet_v2-*.pth"), "random:0"))


# Asks for a command by its arguments, each ended by a zero byte, and an empty one; then shows what it printed.
_PYTHON = """
python() {
    if [ "$1" = - ]; then command python -; return; fi
    printf '%s\\0' "$@" '' >&"$ASK"
    IFS= read -r code <&"$ANSWER"
    cat "$PRINTED"
    return "$code"
}
"""


def script() -> str:
    """All that is to be typed, with a mark before each block."""
    lines = ["set -e", _PYTHON]
    for number, (language, text) in enumerate(BLOCKS):
        if language == "text":
            continue
        lines += [f"echo '{_MARK} {number}'", f"python - <<'PYTHON'\n{text}PYTHON" if language == "python" else text]
    return "\n".join(lines)


def normalised(line: str) -> str:
    """A line without sizes and numbers that depend on the photos and the machine; counts stay."""
    # How many there are depends on the photos, and so whether it is one.
    line = re.sub(r"^1 pair\b", "1 pairs", line)
    line = re.sub(r"\d+\.\d+( [kKMG]?i?B)?|\d+ B\b", "#", line)
    return re.sub(r"\s+", " ", line).strip()


def is_told(line: str, output: list[str]) -> bool:
    """Whether a line of the tutorial, in which `...` is anything, is one of the output."""
    pieces = [re.escape(piece) for piece in re.sub(r"\s*\.\.\.\s*", "...", normalised(line)).split("...")]
    pattern = re.compile(r".*".join(pieces).replace(r"\ ", " *"))
    return any(pattern.fullmatch(normalised(one)) for one in output)


def test_a_block_of_output_follows_a_block_that_makes_it() -> None:
    languages = [language for language, _ in BLOCKS]
    assert set(languages) == {"sh", "python", "text"}
    assert all(before != "text" for before, after in itertools.pairwise(languages) if after == "text")
    assert languages.count("text") >= 8


def test_what_the_output_does_not_say_is_noticed() -> None:
    output = [
        "rows       60, 60 of them added now",
        "index      tour/index, 303.8 KiB",
        "    2  0.786454  a  week1[36]",
    ]
    assert is_told("rows       60, 60 of them added now", output)
    assert is_told("index      tour/index, ...", output)
    assert is_told("    2  ...  week1[...]", output)
    assert not is_told("    2  ...  week2[...]", output)
    assert not is_told("rows       60, 59 of them added now", output)
    assert not is_told("row        60, 60 of them added now", output)


def commands(asked: BinaryIO) -> Iterator[list[str]]:
    """The arguments of each command that the shell asks for, until it ends."""
    arguments: list[str] = []
    text = b""
    while byte := asked.read(1):
        if byte != b"\0":
            text += byte
        elif text:
            arguments.append(text.decode())
            text = b""
        else:
            yield arguments
            arguments = []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_tutorial_runs_as_it_stands_and_prints_what_it_shows(
    tmp_path: Path, run_job: Callable[..., Done]
) -> None:
    for module in ("duckdb", "faiss"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[index,readers]'")
    take_photos(tmp_path)
    # "All commands are run from the folder of this project": of that, only the commands are here.
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    printed_file, said = tmp_path / "printed.txt", tmp_path / "said.txt"
    (asked, ask), (answered, answer) = os.pipe(), os.pipe()
    with said.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script()],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PHOTOS": str(tmp_path / "photos"),
                "NEW_PHOTOS": str(tmp_path / "new photos"),
                "WEIGHTS": weights(),
                "ASK": str(ask),
                "ANSWER": str(answered),
                "PRINTED": str(printed_file),
            },
            stdout=output,
            stderr=output,
            pass_fds=(ask, answered),
        )
    os.close(ask)
    os.close(answered)
    errors = ""
    with open(asked, "rb", buffering=0) as asks, open(answer, "w") as answers:
        for path, *arguments in commands(asks):
            assert path.startswith("jobs/")
            done = run_job(Path(path).name, *arguments)
            printed_file.write_text(done.stdout)
            errors += done.stderr
            print(done.returncode, file=answers, flush=True)
    assert shell.wait(60) == 0, errors[-3000:] + said.read_text()[-3000:]
    printed: dict[int, list[str]] = {}
    for chunk in said.read_text().split(_MARK)[1:]:
        number, _, text = chunk.partition("\n")
        printed[int(number)] = text.splitlines()
    for number, (language, text) in enumerate(BLOCKS):
        if language == "text":
            missing = [line for line in text.splitlines() if not is_told(line, printed[number - 1])]
            assert not missing, (missing, printed[number - 1])
    rows = pq.read_table(tmp_path / "tour" / "embeddings" / "embeddings")
    assert len(set(rows["image_id"].to_pylist())) == NUM_PHOTOS + NUM_NEW
    for page in ("near.html", "pairs.html"):
        assert "data:image/" in (tmp_path / "tour" / page).read_text()
