"""timm's own weights from the Hugging Face hub: fetched once, and what is said where they cannot be."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.core.errors import WeightsError
from tests.conftest import ROOT

pytest.importorskip("timm", reason="timm is not installed: pip install timm")

from tests.backbones.timm_files import redrawn


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hugging Face hub answers where a repository has one file."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        self.asked.append(f"{self.command} {self.path}")
        data = self.files.get(self.path)
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return b""
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return data

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    """A small server that speaks the hub's protocol."""
    Hub.files, Hub.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


LOAD = """
import json, sys
from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.core.errors import WeightsError
told = []
for name, spec in json.loads(sys.argv[1]):
    try:
        weights = load_weights(name, spec)
        told.append([weights.name, weights.sha256])
    except WeightsError as error:
        told.append(str(error))
print(json.dumps(told))
"""


@pytest.mark.slow
def test_timms_own_weights_come_from_the_hub_once(hub: Any, tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its address when it is imported."""
    data = save_safetensors(redrawn("test_resnet").state_dict())
    torch.save(redrawn("test_vit").state_dict(), tmp_path / "old.bin")
    old = (tmp_path / "old.bin").read_bytes()
    Hub.files = {
        "/timm/test_resnet.r160_in1k/resolve/main/model.safetensors": data,
        "/timm/test_vit.r160_in1k/resolve/main/pytorch_model.bin": old,
    }
    ask = [
        ("timm/test_resnet", "DEFAULT"),
        ("timm/test_resnet", "r160_in1k"),
        ("timm/test_resnet.r160_in1k", "DEFAULT"),
        ("timm/test_vit", "DEFAULT"),
        ("timm/test_vit2", "DEFAULT"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(ask)],
        env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *same, other, missing = json.loads(done.stdout.splitlines()[-1])
    assert same == [["r160_in1k", hashlib.sha256(data).hexdigest()]] * 3
    assert other == ["r160_in1k", hashlib.sha256(old).hexdigest()]
    assert missing == "https://huggingface.co/timm/test_vit2.r160_in1k has no model.safetensors or pytorch_model.bin"
    # Asked for and fetched once; then what is here is taken without asking.
    asked = [line.partition(" ")[0] for line in Hub.asked if " /timm/test_resnet" in line]
    assert asked == ["HEAD", "GET"]


def test_where_no_download_is_possible_the_error_says_what_to_give_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_weights("timm/test_resnet", "DEFAULT")
    for text in ("cannot download the weights timm/test_resnet.r160_in1k", "--weights its path", "random:SEED"):
        assert text in str(caught.value)
