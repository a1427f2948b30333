"""Reads an output back and proves that it is right, or names every fault: the Parquet, then against the tars.

The tars are walked from header to header, which the standard library parses, and not with the reader that made the
output, so that a fault of that reader shows. Only the rules for names are the job's. Whether an embedding is that of
its image shows only another computation: some, drawn at random, are computed again with the plain backbone in fp32.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shard_embedder.pipeline.core.errors import StoreError
from shard_embedder.pipeline.core.formatting import format_count, one_line
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.storage import join, list_files, locate
from shard_embedder.pipeline.core.writing import TEMPORARY_FOLDER
from shard_embedder.pipeline.output.names import (
    EMBEDDINGS,
    ERRORS,
    LEASE_FOLDER,
    REPORTS_FOLDER,
    RUN_FILE,
    PartName,
    escape,
    version_tag,
)
from shard_embedder.pipeline.shards.find import Shard, ShardSet, find_shards
from shard_embedder.pipeline.shards.left_out import SUFFIX, archives_among, format_left_out
from shard_embedder.pipeline.shards.photos import PACKED, find_shards_or_images
from shard_embedder.pipeline.verify.findings import Verdict
from shard_embedder.pipeline.verify.parts import CheckedPart, Expected, check_part, read_expected
from shard_embedder.pipeline.verify.recompute import Recompute, ShardPart, build_reference, draw_rows, recompute_rows
from shard_embedder.pipeline.verify.shards import ShardVersion, check_shard_version, compare_with_tar
from shard_embedder.pipeline.verify.tars import Tar, read_tar

THREADS = 8
_EXPECTED_FILES = (RUN_FILE, ".uncounted", "report.json", "report.html")


def verify(
    output: str,
    inputs: Sequence[str] = (),
    recompute: Recompute | None = None,
    *,
    threads: int = THREADS,
    on_progress: Progress = no_progress,
) -> Verdict:
    """Read every part of `output`, and compare it with the tars of `inputs`, if any; or with a folder of images.

    Memory holds `threads` parts at a time, and the ids of one or two shards. `recompute` needs `inputs`.

    Raises:
        OutputError: no output, or its run.json is missing or broken.
        SettingsError: the input cannot be found, or the weights of a required recomputation cannot be loaded.
        StoreError: the output cannot be listed.
    """
    expected = read_expected(output)
    verdict = Verdict(output, expected.digest)
    shards = _find_shards_by_name(inputs, expected, verdict, output) if inputs else {}
    reference = build_reference(expected.made, recompute, verdict) if recompute is not None and inputs else None
    versions = _group_by_version(_list_parts(output, verdict), shards, verdict)
    sources: list[ShardPart] = []
    for version, parts, tar in _check_in_threads(output, expected, versions, threads, on_progress):
        first = len(verdict.findings)
        check_shard_version(version, parts, expected.naming, verdict)
        if inputs and version.parts[0].shard not in shards:
            verdict.retire(version.where, first)
        if tar is not None:
            compare_with_tar(version, parts, tar, verdict)
            if tar.fault is None and not version.is_broken:
                sources += [ShardPart(part.name, tar.shard, len(part.embedded.ids)) for part in parts if part.whole]
    if verdict.unused_images:
        verdict.notes.append(
            f"{format_count(verdict.unused_images, 'image member')} without a row: {verdict.unused_example}"
        )
    if reference is not None and recompute is not None:
        drawn = draw_rows(sources, recompute)
        recompute_rows(output, expected.naming, reference, drawn, verdict, on_progress)
    return verdict


def _find_shards_by_name(
    inputs: Sequence[str], expected: Expected, verdict: Verdict, output: str
) -> dict[str, Shard]:
    named = find_shards_or_images(inputs)
    # The images of a folder are packed there.
    found = named if isinstance(named, ShardSet) else find_shards([join(output, PACKED)])
    prefix = expected.made.input_prefix
    if found.prefix != prefix:
        verdict.notes.append(
            f"the input's prefix is {one_line(found.prefix)}, the output was made of {one_line(prefix)}"
        )
    archives = archives_among(found.left_out)
    if archives:
        verdict.notes.append(f"files of the input that may be shards and are not read: {format_left_out(archives)}")
    for name, reason in found.refused:
        verdict.add_finding(f"{name}{SUFFIX}", "shard-refused", reason)
    return {shard.name: shard for shard in found.shards}


def _list_parts(output: str, verdict: Verdict) -> dict[str, set[PartName]]:
    """The parts in embeddings/ and in errors/, from one listing. A file that does not belong there is a finding."""
    fs, base = locate(output)
    stored: dict[str, set[PartName]] = {EMBEDDINGS: set(), ERRORS: set()}
    num_temporary = num_leases = 0
    try:
        files = sorted(list_files(fs, base))
    except OSError as error:
        raise StoreError(f"cannot list {output}: {describe(error)}") from error
    for info in files:
        path = info.path[len(base) :].lstrip("/")
        folder, _, rest = path.partition("/")
        name = PartName.parse(rest)
        if folder == TEMPORARY_FOLDER:
            num_temporary += 1
        elif folder == LEASE_FOLDER:
            num_leases += 1
        elif folder == REPORTS_FOLDER and rest:
            continue
        elif folder not in stored:
            if path not in _EXPECTED_FILES and folder != PACKED:
                verdict.notes.append(f"{one_line(path)} is no file of an output")
        elif name is None or str(name) != rest:
            verdict.add_finding(path, "stray-file", "not named as a part is")
        else:
            verdict.num_bytes += info.num_bytes
            stored[folder].add(name)
    if num_temporary:
        verdict.notes.append(
            f"{num_temporary} temporary files in {TEMPORARY_FOLDER}/: a run goes on or died; the next removes them"
        )
    if num_leases:
        verdict.notes.append("a run holds the output, or died: parts that it has not stored yet may be missing")
    if not stored[EMBEDDINGS]:
        verdict.add_finding(f"{EMBEDDINGS}/", "no-parts", "there is none")
    for name in sorted(stored[ERRORS] - stored[EMBEDDINGS]):
        verdict.add_finding(f"{ERRORS}/{name}", "errors-alone", f"{EMBEDDINGS}/{name} is missing")
    return stored


def _group_by_version(
    stored: dict[str, set[PartName]], shards: dict[str, Shard], verdict: Verdict
) -> list[ShardVersion]:
    """The shard versions to check, in the order of their names. A version that should not be there is a finding."""
    versions: list[ShardVersion] = []
    tags: dict[str, list[str]] = defaultdict(list)
    elsewhere = 0
    by_version = itertools.groupby(sorted(stored[EMBEDDINGS]), key=lambda part: (part.shard, part.tag))
    for (name, tag), found in by_version:
        parts = list(found)
        shard = shards.get(name)
        present = shard is not None and version_tag(shard.num_bytes, shard.version) == tag
        version = ShardVersion(parts, stored[ERRORS].intersection(parts), shard if present else None)
        versions.append(version)
        tags[name].append(tag)
        if shard is None:
            elsewhere += 1
        elif not present:
            value = f"the input's {shard.url} is now {shard.num_bytes} bytes, version {shard.version}"
            verdict.add_finding(version.where, "old-version", value)
    for name, found_tags in tags.items():
        if len(found_tags) > 1 and name not in shards:
            value = (
                f"{len(found_tags)} versions, so its samples come {len(found_tags)} times: {', '.join(found_tags)}"
            )
            where, first = f"{EMBEDDINGS}/{escape(name)}.*", len(verdict.findings)
            verdict.add_finding(where, "two-versions", value)
            if shards:
                verdict.retire(f"all but one version of {where}", first)
    for name in sorted(shards.keys() - tags.keys()):
        verdict.add_finding(f"{EMBEDDINGS}/{escape(name)}.*", "shard-missing", f"no part of {shards[name].url}")
    if elsewhere and shards:
        verdict.notes.append(
            f"{format_count(elsewhere, 'shard')} stored and not in this input: not compared with any tar"
        )
    verdict.shards = len(tags)
    return versions


def _check_in_threads(
    output: str, expected: Expected, versions: list[ShardVersion], threads: int, on_progress: Progress
) -> Iterator[tuple[ShardVersion, list[CheckedPart], Tar | None]]:
    """Read all parts and their tars in threads, and yield them shard by shard, in order."""
    waiting: deque[tuple[ShardVersion, list[Future[CheckedPart]], Future[Tar] | None]] = deque()
    total, done = sum(len(version.parts) for version in versions), 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        for version in [*versions, None]:
            if version is not None:
                futures = [
                    pool.submit(check_part, output, expected, name, name in version.with_errors)
                    for name in version.parts
                ]
                tar = (
                    None
                    if version.shard is None
                    else pool.submit(read_tar, version.shard, expected.naming, expected.id)
                )
                waiting.append((version, futures, tar))
            while waiting and (version is None or sum(len(parts) for _, parts, _ in waiting) > 8 * threads):
                oldest, futures, tar = waiting.popleft()
                checked = []
                for future in futures:
                    checked.append(future.result())
                    done += 1
                    on_progress("parts", done, total)
                yield oldest, checked, None if tar is None else tar.result()
    finally:
        pool.shutdown(cancel_futures=True)
