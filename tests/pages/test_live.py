"""The live search page over HTTP: it answers as a search does, shows rows of its index alone, and goes on."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.errors import InputError, SettingsError
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.pages.live import open_live_search
from shard_embedder.pipeline.pages.previews import preview
from shard_embedder.pipeline.pages.server import serving
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import open_index
from shard_embedder.pipeline.retrieval.search import search_images
from tests.conftest import (
    ROOT,
    encode,
    hearing_sigint,
    is_decoding_for,
    photo,
    sample_members,
    write_shards,
    write_tar,
)
from tests.decoding.test_bombs import SLOW
from tests.outputs import embed
from tests.pages.looking import _Reader

pytest.importorskip("faiss", reason="the extra `index` is not installed")


def make_index(folder: Path, **options: Any) -> Path:
    """The index of the shards `in` of a folder."""
    if not (folder / "out").exists():
        embed(folder / "in", folder / "out")
    name = "-".join(["index", *options.values()])
    build(str(folder / "out"), folder / name, Options(**options))
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of seven photos each, which differ, with their output and index."""
    made = tmp_path_factory.mktemp("live")
    write_shards(made / "in", num_shards=2)
    make_index(made)
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(open_live_search(open_index(folder / "index"))) as served:
        yield served.url


def ask(url: str, data: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer; `data` is posted."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_an_image_has_the_neighbours_that_a_search_finds(url: str, folder: Path, tmp_path: Path) -> None:
    image = encode(photo(3))
    status, answer = ask(f"{url}near", image)
    assert status == 200
    (tmp_path / "q.jpg").write_bytes(image)
    opened = open_index(folder / "index")
    (hit,) = search_images(opened, QueryEmbedder(opened.facts.made), [tmp_path / "q.jpg"], 50, with_self=True)
    assert [near["name"] for near in answer["near"]] == [near.image_id for near in hit.neighbours]
    assert [near["place"] for near in answer["near"]] == [f"{n.shard} [{n.sample_index}]" for n in hit.neighbours]
    scores = [float(near["score"].removeprefix("cosine ")) for near in answer["near"]]
    assert scores == pytest.approx([near.score for near in hit.neighbours], abs=1e-4)
    assert [near["bar"] for near in answer["near"]] == pytest.approx(np.clip(scores, 0, 1).tolist(), abs=1e-4)
    assert (answer["near"][0]["name"], len(answer["near"])) == ("000-0003", 14)
    assert answer["query"] == picture_of(image)


def picture_of(image: bytes) -> dict[str, str]:
    small = preview(image)
    assert small.jpeg is not None
    jpeg = "data:image/jpeg;base64," + base64.b64encode(small.jpeg).decode()
    return {"jpeg": jpeg, "size": f"96 \N{MULTIPLICATION SIGN} 80 px, {len(image) / 1024:.1f} KiB"}


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_a_row_has_the_neighbours_of_its_stored_embedding_and_not_itself(
    kind: str, metric: str, folder: Path
) -> None:
    index = make_index(folder, kind=kind, metric=metric)
    table = pq.read_table(folder / "out" / "embeddings")
    ids, stored = table["image_id"].to_pylist(), vectors(table).astype(np.float64)
    names = open_index(index).names(range(14))
    with serving(open_live_search(open_index(index))) as served:
        for row in (0, 13):
            status, answer = ask(f"{served.url}rows/{row}/near")
            assert status == 200
            name, shard, sample_index = names[row]
            assert answer["query"]["name"] == name
            assert answer["query"]["place"] == f"{shard} [{sample_index}]"
            own = stored[ids.index(name)]
            scores = {
                "cosine": stored @ own / np.linalg.norm(stored, axis=1) / np.linalg.norm(own),
                "ip": stored @ own,
                "l2": -np.linalg.norm(stored - own, axis=1),
            }[metric]
            nearest = [ids[at] for at in np.argsort(-scores) if ids[at] != name]
            assert [near["name"] for near in answer["near"]][:5] == nearest[:5]
            assert [names[near["row"]][0] for near in answer["near"]] == [near["name"] for near in answer["near"]]
            assert row not in [near["row"] for near in answer["near"]]
            assert all(0 <= near["bar"] <= 1 for near in answer["near"])


def test_an_index_of_one_image_has_no_neighbour_of_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1)))])
    live = open_live_search(open_index(make_index(tmp_path)))
    assert live.by_row(0)["near"] == []
    assert [near["name"] for near in live.by_image(encode(photo(2)))["near"]] == ["a"]


def test_every_rows_picture_is_that_of_its_image(url: str, folder: Path) -> None:
    for row, (name, _, _) in open_index(folder / "index").names(range(14)).items():
        shard, sample = map(int, name.split("-"))
        assert ask(f"{url}rows/{row}") == (200, picture_of(encode(photo(7 * shard + sample))))


@pytest.mark.parametrize(
    "path",
    ["rows/14", "rows/14/near", "rows/-1", "rows/1.5", "rows/..%2f..%2findex.json", "index.json", "live.css", "../a",
     "rows/999999999999999999999999", "in/photos-00000.tar", "rows/%2fetc%2fpasswd", "rows/"],
)  # fmt: skip
def test_what_is_no_row_of_the_index_is_not_there(path: str, url: str) -> None:
    status, answer = ask(url + path)
    assert status == 404
    assert answer.keys() == {"error"}
    if path.startswith("rows/14"):
        assert answer["error"] == "row must be below 14, got 14"


@contextmanager
def own_index(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    shards = write_shards(tmp_path / "in", num_shards=2)
    with serving(open_live_search(open_index(make_index(tmp_path)))) as served:
        yield shards, served.url


def test_a_shard_that_changes_while_it_is_served_shows_nothing_and_the_others_do(tmp_path: Path) -> None:
    with own_index(tmp_path) as (shards, url):
        names = open_index(tmp_path / "index").names(range(14))
        first, second = (next(r for r, n in names.items() if n[1] == f"photos-0000{s}") for s in (0, 1))
        assert ask(f"{url}rows/{second}")[1]["jpeg"]
        write_tar(shards / "photos-00001.tar", [("x.jpg", encode(photo(30))), *sample_members("y", 31)])
        status, answer = ask(f"{url}rows/{second}")
        assert (status, answer["jpeg"]) == (200, None)
        assert answer["reason"].startswith("its shard cannot be read: ShardChangedError: changed while it was read")
        status, answer = ask(f"{url}rows/{second}/near")
        assert status == 422
        assert "changed while it was read" in answer["error"]
        (shards / "photos-00001.tar").unlink()
        assert "not found when it was read" in ask(f"{url}rows/{second}")[1]["reason"]
        assert ask(f"{url}rows/{first}")[1]["jpeg"]
    with serving(open_live_search(open_index(tmp_path / "index"))) as served:
        assert ask(f"{served.url}rows/{second}")[1]["reason"] == "its shard is not in this input"
    shutil.rmtree(shards)
    with pytest.raises(InputError, match=r"^no input was named, and no \.tar shard found for input"):
        open_live_search(open_index(tmp_path / "index"))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"x" * 99, "not an image of a known format: text"),
        (encode(photo(1))[:600], "broken"),
    ],
)
def test_a_broken_image_has_its_reason_and_the_next_is_answered(image: bytes, reason: str, url: str) -> None:
    status, answer = ask(f"{url}near", image)
    assert status == 422
    assert answer["error"].startswith(reason)
    assert ask(f"{url}near", encode(photo(1), "PNG"))[0] == 200


def test_an_image_that_is_too_large_is_refused_however_it_is_sent(folder: Path) -> None:
    image = encode(photo(1))
    with serving(open_live_search(open_index(folder / "index")), max_bytes=len(image)) as served:
        assert ask(f"{served.url}near", image)[0] == 200
        refused = (413, {"error": f"an image must have at most {len(image) / 1024:.1f} KiB"})
        assert ask(f"{served.url}near", image + b"x") == refused
        # In pieces, whose number is not told.
        assert ask(f"{served.url}near", iter([image, b"x"]), **{"Transfer-Encoding": "chunked"}) == refused
        assert ask(f"{served.url}near", image)[0] == 200
        # Told at once: nothing is received of it.
        connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=30)
        connection.putrequest("POST", "/near")
        connection.putheader("Content-Length", str(2**40))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:{}", None, 200),
        ("localhost:{}", "http://localhost:{}", 200),
        ("LOCALHOST", None, 200),
        ("[::1]:9000", None, 200),
        ("evil.example", None, 403),
        ("evil.example:{}", "http://evil.example:{}", 403),
        ("127.0.0.1.evil.example:{}", None, 403),
        ("localhost@evil.example:{}", None, 403),
        ("[::1", None, 403),
        ("127.0.0.1:{}", "https://evil.example", 403),
        ("127.0.0.1:{}", "null", 403),
        ("127.0.0.1:{}", "http://127.0.0.1:1", 403),
    ],
)
def test_pages_of_other_sites_are_refused(host: str, origin: str | None, status: int, url: str) -> None:
    port = urlsplit(url).port
    headers = {"Host": host.format(port)} | ({} if origin is None else {"Origin": origin.format(port)})
    for path, data in (("rows/0", None), ("near", encode(photo(1)))):
        got, answer = ask(url + path, data, **headers)
        assert got == status
        assert status == 200 or answer["error"].startswith(("Host must be one of", "Origin must be this server's"))


def test_an_address_that_others_reach_takes_any_host(folder: Path) -> None:
    with serving(open_live_search(open_index(folder / "index")), "0.0.0.0") as served:
        assert not served.is_loopback
        assert ask(f"{served.url}rows/0", Host="images.example")[0] == 200
        assert ask(f"{served.url}rows/0", Host="images.example", Origin="http://evil.example")[0] == 403


def test_a_port_that_is_taken_is_told(url: str, folder: Path) -> None:
    port = urlsplit(url).port
    assert port
    live = open_live_search(open_index(folder / "index"))
    with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
        serving(live, port=port).__enter__()


def test_the_page_and_every_answer_forbid_all_but_their_own_script(url: str) -> None:
    for path, status in (("", 200), ("live.js", 200), ("rows/0", 200), ("rows/14", 404), ("favicon.ico", 204)):
        try:
            answer = urllib.request.urlopen(url + path)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            policy = answer.headers["Content-Security-Policy"]
            assert answer.status == status
            assert policy.startswith("default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:;")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert answer.headers["Cache-Control"] == "no-store"
            text = answer.read().decode()
        if path == "":
            page = _Reader(text)
            assert page.tags.count("script") == 1
            assert [value for name, value in page.attributes if name in ("src", "href")] == ["live.js"]
            assert not [name for name, _ in page.attributes if name.startswith("on")]
            assert not re.search(r"url\(|@import|https?:", text)
            assert "Random weights" in " ".join(page.text)
        if path == "live.js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|https?:", text)


def test_ids_are_told_as_text_that_a_page_may_show(tmp_path: Path) -> None:
    nasty = "<b>\u202e\x1b[31m"
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1))), ("a.json", json.dumps({"n": nasty}).encode())])
    embed(tmp_path / "in", tmp_path / "out", id="json:n")
    (near,) = open_live_search(open_index(make_index(tmp_path))).by_image(encode(photo(1)))["near"]
    assert near["name"] == r"<b>\u202e\x1b[31m"


# The command.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "must be a whole number from 0 to 65535, got '65536'"),
        (["--host", ""], "must not be empty, got ''"),
        (["--input", "nothing.tar"], "nothing.tar"),
        (["--weights", "random:9"], "weights random:9 have sha256"),
        (["--host", "256.0.0.1", "--port", "0"], "cannot listen on 256.0.0.1 port 0: "),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(
    arguments: list[str], message: str, folder: Path, run_job: Callable[..., Any]
) -> None:
    done = run_job("serve.py", folder / "index", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_a_slow_image_neither_stops_the_server_nor_its_end(folder: Path) -> None:
    options = (str(folder / "index"), "--port", "0", "--device", "cpu")
    with hearing_sigint():
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "serve.py"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_PROXY": "*"},
        )
    clients: list[socket.socket] = []
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"searching 14 embeddings at (http://127\.0\.0\.1:\d+/) until you press Ctrl-C\n", line)
        assert found, process.communicate()
        url = found[1]
        assert ask(f"{url}near", encode(photo(1), "PNG"))[0] == 200
        (decoder,) = (one for one in Path("/proc").glob("[0-9]*") if is_decoding_for(one, process.pid))
        before_s = processor_s(decoder)
        bomb = SLOW["TIFF that lists its strips 100,000 times"]()
        # More of them than are received at once.
        clients += [socket.create_connection(("127.0.0.1", urlsplit(url).port or 0)) for _ in range(6)]
        head = f"POST /near HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(bomb)}\r\n\r\n".encode()
        senders = [threading.Thread(target=send, args=(client, head + bomb), daemon=True) for client in clients]
        for sender in senders:
            sender.start()
        while processor_s(decoder) < before_s + 0.2:
            assert process.poll() is None
            time.sleep(0.02)
        assert ask(f"{url}rows/3")[1]["jpeg"]
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        # The decoder's own deadline is 30 s of processor time.
        assert time.monotonic() - begun < 15
        assert process.communicate() == ("", "serve.py: interrupted\n")
    finally:
        process.kill()
        process.communicate()
        for client in clients:
            client.close()


def processor_s(process: Path) -> float:
    """The processor time that a process of /proc has had."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send(client: socket.socket, data: bytes) -> None:
    try:
        client.sendall(data)
    except OSError:
        return
