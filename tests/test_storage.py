"""Storage on disk and on S3."""

from __future__ import annotations

from pipeline.storage import list_files, locate, read_bytes, write_bytes


def test_what_is_written_to_s3_is_listed_and_read(s3_url: str) -> None:
    write_bytes(s3_url, "folder/name.bin", b"content")
    fs, path = locate(s3_url)
    assert [info.path for info in list_files(fs, path)] == [f"{path}/folder/name.bin"]
    assert read_bytes(f"{s3_url}/folder/name.bin") == b"content"
