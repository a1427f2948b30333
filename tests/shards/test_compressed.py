"""Compressed shards are not read; what is said of them names the program that makes a plain one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from shard_embedder.pipeline.core.errors import InputError
from shard_embedder.pipeline.shards.find import find_shards
from tests.conftest import encode, photo, write_tar
from tests.shards.test_tars import members


@pytest.mark.parametrize(
    ("suffix", "compress", "program"),
    [(".gz", gzip.compress, "gunzip"), (".bz2", bz2.compress, "bunzip2"), (".xz", lzma.compress, "unxz")],
)
def test_the_program_that_is_named_makes_a_shard(suffix: str, compress, program: str, tmp_path: Path) -> None:
    data = write_tar(tmp_path / "whole" / "a.tar", [("a.jpg", encode(photo(1)))]).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"a.tar{suffix}").write_bytes(compress(data))
    with pytest.raises(InputError, match=f"1 .tar{suffix}, .*: decompress them with `{program}`$"):
        find_shards([str(folder)])
    # Where the name says nothing of it, the fault does.
    found, fault = members(compress(data))
    assert (found, str(fault).rpartition(": ")[2]) == ([], f"decompress it with `{program}`")
    if shutil.which(program):
        subprocess.run([program, folder / f"a.tar{suffix}"], check=True)
        assert [shard.name for shard in find_shards([str(folder)]).shards] == ["a"]


def test_what_is_no_compressed_tar_is_to_be_made_one(tmp_path: Path) -> None:
    for name in ("a.tar.zst", "b.zip"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r": decompress them with `unzstd`, and make a \.tar of each other one$"):
        find_shards([str(tmp_path)])
