"""The page on Python: its blocks run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, encode, photo, write_shards

PAGE = ROOT / "docs" / "library.md"


@pytest.mark.slow
def test_the_blocks_of_the_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(encode(photo(2)))
    write_shards(tmp_path / "shards", num_shards=2, samples_each=3)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "6 embeddings, 0 errors {}" in printed
    assert "000-0002 photos-00000" in printed
    assert "layer2 [2, 128, 28, 28]\nlayer3 [2, 256, 14, 14]" in printed
    assert "the output was made with other settings" in printed
