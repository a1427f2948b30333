"""The notebook of neighbours: its cells run as they stand, on small photos in two folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shard_embedder import build_backbone
from tests.conftest import ROOT, encode, photo

NOTEBOOK = ROOT / "docs" / "neighbours.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_cells_run_in_order_and_show_neighbours_and_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    for number in range(8):
        # Two kinds of photos: what lies in one folder looks alike.
        image = photo(number // 4, (96, 80))
        image.paste((250, 0, 0), (0, 0, 4 + number % 4, 4))
        path = tmp_path / "photos" / f"kind{number // 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, quality=95))
    monkeypatch.chdir(tmp_path)
    # From a file, as without a network: a search finds it again.
    torch.save(build_backbone("squeezenet1_1", "random:0").state_dict(), tmp_path / "weights.pth")
    names: dict[str, Any] = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert (names["photos"], names["weights"]) == (Path("photos"), "DEFAULT")
            names |= {"backbone": "squeezenet1_1", "weights": "weights.pth"}
    printed = capsys.readouterr().out
    assert "8 embedded now, 0 errors {}" in printed
    assert "1.000  kind0/0.jpg" in printed
    assert [one.image_id.partition("/")[0] for one in names["near"][:4]] == ["kind0"] * 4
    assert names["strip"].size == (6 * 160, 160)
    # On the map photos of one kind lie closer to each other than to the other kind.
    points = names["points"]
    kinds = np.array([image_id.startswith("kind1") for image_id in names["ids"]])
    apart = np.linalg.norm(points[kinds].mean(axis=0) - points[~kinds].mean(axis=0))
    assert apart > 2 * max(points[kinds].std(), points[~kinds].std())
    shown = np.asarray(names["photo_map"])
    assert isinstance(names["photo_map"], Image.Image)
    assert (shown != 255).any(axis=2).mean() > 0.005


def test_it_is_stored_without_what_a_run_showed_and_the_pages_lead_to_it() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    assert "(docs/neighbours.ipynb)" in (ROOT / "README.md").read_text()
    assert "(neighbours.ipynb)" in (ROOT / "docs" / "library.md").read_text()
