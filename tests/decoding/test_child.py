"""The child process that decodes: the same pixels, and an image that kills it is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL.PngImagePlugin import PngInfo

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import child, pillow
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.pages.previews import preview
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.passes import run
from tests.conftest import ROOT, child_pid, encode, photo, write_tar
from tests.decoding.images import every_format, with_orientation
from tests.outputs import IN_PROCESS, UNHEARD, job_for, rows

PREPROCESS = Preprocess(64, (56, 48), "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RULES = DecodingRules(preprocess=PREPROCESS, max_pixels=10_000)
# Stands for a fault in a C library that one image meets: no file is known that crashes Pillow.
_FAULTY_PILLOW = """
import os, signal
from PIL import ImageFile
load = ImageFile.ImageFile.load
def faulty(image):
    deadly = {"deadly": signal.SIGSEGV, "stopping": signal.SIGSTOP}
    # Once, however often it is loaded.
    if number := deadly.get(image.info.pop("comment", None)):
        os.kill(os.getpid(), number)
    return load(image)
ImageFile.ImageFile.load = faulty
"""


@pytest.fixture
def faulty_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has a Pillow that one image kills."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "sitecustomize.py").write_text(_FAULTY_PILLOW)
    monkeypatch.syspath_prepend(tmp_path / "faulty")


def deadly(seed: int, comment: str = "deadly") -> bytes:
    text = PngInfo()
    text.add_text("comment", comment)
    return encode(photo(seed), "PNG", pnginfo=text)


@pytest.fixture(autouse=True)
def _no_child() -> Iterator[None]:
    child.end()
    yield
    child.end()


def png(seed: int, size: tuple[int, int] = (96, 80)) -> bytes:
    return encode(photo(seed, size), "PNG", compress_level=1)


def is_running(process: Path) -> bool:
    try:
        return b"shard_embedder.pipeline.decoding.child" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_pixels_and_reasons_are_those_of_pillow_in_this_process() -> None:
    for data in (encode(photo(0)), png(1), encode(photo(2), "WEBP"), encode(photo(3, mode="CMYK"))):
        np.testing.assert_array_equal(Decoder(RULES).decode(data), pillow.decode(data, RULES))
    for broken in (b"no image", encode(photo(0))[:300], encode(photo(0, (200, 200))), png(0)[:3000]):
        with pytest.raises(SampleError) as expected:
            pillow.decode(broken, RULES)
        with pytest.raises(SampleError) as found:
            Decoder(RULES).decode(broken)
        assert str(found.value) == str(expected.value)


def test_only_what_is_no_plain_jpeg_meets_the_child() -> None:
    decoder = Decoder(RULES)
    for data in (encode(photo(0)), encode(photo(1), progressive=True), encode(photo(2, mode="L"))):
        assert decoder.plain_jpeg(data) is not None
        decoder.decode(data)
    with pytest.raises(ValueError, match="not enough values"):
        child_pid()
    decoder.decode(png(1))
    first = child_pid()
    for name, data in every_format().items():
        if name not in ("jpeg", "jpeg progressive", "jpeg grey", "jpeg exif", "mpo"):
            assert decoder.plain_jpeg(data) is None, name
        decoder.decode(data)
    assert child_pid() == first


@pytest.mark.usefixtures("faulty_pillow")
def test_an_image_that_kills_the_child_is_named_and_the_next_is_decoded() -> None:
    decoder = Decoder(RULES)
    before = decoder.decode(png(1))
    with pytest.raises(SampleError, match="decoder crash: it died of the image 2 times: SIGSEGV"):
        decoder.decode(deadly(2))
    np.testing.assert_array_equal(decoder.decode(png(1)), before)


@pytest.mark.usefixtures("faulty_pillow")
def test_a_picture_of_an_image_that_kills_the_child_is_its_reason() -> None:
    shown = preview(deadly(2))
    assert (shown.jpeg, shown.reason) == (None, "decoder crash: it died of the image 2 times: SIGSEGV")
    assert preview(png(1)).jpeg is not None


def test_a_size_is_that_of_the_image_as_it_is_seen() -> None:
    unturned = Decoder(replace(RULES, ignore_orientation=True))
    for orientation in range(1, 9):
        for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
            file = with_orientation(photo(1), orientation, format)
            seen = (80, 96) if orientation > 4 else (96, 80)
            assert Decoder(RULES).upright_size(file) == seen, (format, orientation)
            assert unturned.upright_size(file) == (96, 80), (format, orientation)
    for broken in (b"", b"no image"):
        with pytest.raises(SampleError, match=r"empty|not an image"):
            Decoder(RULES).upright_size(broken)


@pytest.mark.slow
def test_a_child_that_is_killed_from_outside_is_started_again() -> None:
    decoder = Decoder(RULES)
    before = decoder.decode(png(1))
    os.kill(child_pid(), signal.SIGKILL)
    np.testing.assert_array_equal(decoder.decode(png(1)), before)


def test_decoders_of_other_rules_share_the_child() -> None:
    other = DecodingRules(preprocess=Preprocess(32, (24, 30), "bicubic", (0.5,) * 3, (0.2,) * 3), max_pixels=10_000)
    one, two = Decoder(RULES), Decoder(other)
    for seed in range(3):
        np.testing.assert_array_equal(one.decode(png(seed)), pillow.decode(png(seed), RULES))
        np.testing.assert_array_equal(two.decode(png(seed)), pillow.decode(png(seed), other))
    assert child_pid()


def test_threads_share_the_child() -> None:
    files = [png(seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(Decoder(RULES).decode, files * 3))
    for pixels, data in zip(found, files * 3, strict=True):
        np.testing.assert_array_equal(pixels, pillow.decode(data, RULES))


def test_a_process_that_was_forked_has_a_child_of_its_own() -> None:
    decoder, data = Decoder(RULES), png(1)
    expected, first = decoder.decode(data), child_pid()
    forked = os.fork()
    if forked == 0:
        os._exit(0 if np.array_equal(decoder.decode(data), expected) and child_pid() != first else 1)
    assert os.waitpid(forked, 0)[1] == 0
    np.testing.assert_array_equal(decoder.decode(data), expected)
    assert child_pid() == first


def test_the_child_ends_with_its_parent() -> None:
    script = """
import os, signal
from tests.conftest import child_pid, encode, photo
from tests.decoding.images import make_decoder
make_decoder().decode(encode(photo(1), "PNG"))
print(child_pid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    orphan = Path("/proc", done.stdout.strip())
    assert done.stdout.strip()
    deadline = time.monotonic() + 30
    while is_running(orphan) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(orphan)


def test_the_time_of_the_child_counts() -> None:
    decoder = Decoder(DecodingRules(preprocess=PREPROCESS, max_pixels=10**8))
    data = png(1, (2000, 2000))
    before, here = decoder.clock(), time.thread_time()
    decoder.decode(data)
    spent, here = decoder.clock() - before, time.thread_time() - here
    assert spent > 3 * here


@pytest.mark.slow
@pytest.mark.usefixtures("faulty_pillow")
def test_a_child_that_has_stopped_is_given_up() -> None:
    decoder = Decoder(replace(RULES, image_timeout_s=0.1))
    expected = decoder.decode(png(1))
    with pytest.raises(SampleError, match="decoder timeout: no answer within 2 s, 2 times"):
        decoder.decode(deadly(2, "stopping"))
    np.testing.assert_array_equal(decoder.decode(png(1)), expected)


# In a process of its own: a test process that had run many other tests died in this one, and why was not found.
_INTERRUPTED = """
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
import numpy as np
from shard_embedder.pipeline.decoding.decoder import Decoder
from tests.conftest import child_pid
from tests.decoding.test_child import RULES, deadly, png
sys.path.insert(0, sys.argv[1])
decoder = Decoder(RULES)
expected = decoder.decode(png(1))
pid = child_pid()
def interrupt():
    while "stopped" not in Path(f"/proc/{pid}/status").read_text():
        time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
signal.signal(signal.SIGUSR1, signal.default_int_handler)
threading.Thread(target=interrupt).start()
try:
    decoder.decode(deadly(2, "stopping"))
except KeyboardInterrupt:
    # If it were still there, it would answer now.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    np.testing.assert_array_equal(decoder.decode(png(1)), expected)
    print("interrupted")
"""


@pytest.mark.usefixtures("faulty_pillow")
def test_an_answer_that_was_not_waited_for_is_not_taken_for_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "faulty")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.stdout == "interrupted\n", done.stderr


def test_a_child_that_cannot_start_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the process that decodes images did not start: exit status 1"):
        Decoder(RULES).decode(png(1))


@pytest.mark.usefixtures("faulty_pillow")
def test_an_image_that_kills_its_worker_costs_a_job_one_row(tmp_path: Path) -> None:
    images = {f"k{i}": encode(photo(i)) for i in range(6)}
    for shard in ("a", "b"):
        write_tar(tmp_path / "in" / f"{shard}.tar", [(f"{key}.jpg", data) for key, data in images.items()])
    with_deadly = {**images, "k3": deadly(3)}
    write_tar(tmp_path / "in" / "c.tar", [(f"{key}.jpg", data) for key, data in with_deadly.items()])
    job = job_for(tmp_path / "in", tmp_path / "out", part_rows=2)
    report = run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)
    assert report["balanced"], "every sample is one stored row"
    assert (report["samples"], report["embedded"], report["missing_shards"]) == (18, 17, [])
    (row,) = rows(tmp_path / "out", "errors")
    assert (row["shard"], row["image_id"], row["stage"]) == ("c", "k3", "decode")
    assert row["reason"] == "decoder crash: it died of the image 2 times: SIGSEGV"
    vectors: dict[str, dict[str, list[float]]] = {"a": {}, "b": {}, "c": {}}
    for row in rows(tmp_path / "out"):
        vectors[row["shard"]][row["image_id"]] = row["embedding"]
    assert vectors["a"] == vectors["b"]
    assert vectors["c"] == {key: value for key, value in vectors["a"].items() if key != "k3"}
