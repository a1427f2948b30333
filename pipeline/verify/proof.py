"""Reads an output back and proves it, or names every fault: the Parquet alone, then against the tars.

The tars are walked from header to header, which the standard library parses, and not with the reader that
made the output, so that a fault of that reader shows. Only the rules for names are the job's: what is a
sample, and what its key. What only another computation can show, whether an embedding is that
of its image, is computed again for a random sample with the plain backbone in fp32.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.core.errors import StoreError
from pipeline.core.formatting import format_count
from pipeline.core.redact import describe
from pipeline.core.storage import TEMPORARY_FOLDER, list_files, locate
from pipeline.output.names import EMBEDDINGS, ERRORS, LEASE_FOLDER, RUN_FILE, PartName, version_tag
from pipeline.shards.find import Shard, find_shards
from pipeline.shards.left_out import archives_among, format_left_out
from pipeline.verify.findings import Progress, Verdict, one_line
from pipeline.verify.parts import Expected, Part, check_part, expectation
from pipeline.verify.recompute import Recompute, Source, draw, make_model, recompute_rows
from pipeline.verify.shards import Group, check_group, compare
from pipeline.verify.tars import Tar, walk

THREADS = 8
_EXPECTED_FILES = (RUN_FILE, ".uncounted", "report.json", "report.html")


def verify(
    output: str,
    inputs: Sequence[str] = (),
    recompute: Recompute | None = None,
    *,
    threads: int = THREADS,
    on_progress: Progress = lambda what, done, total: None,
) -> Verdict:
    """Read every part of `output`, and compare it with the tars of `inputs` where any are named.

    Memory holds `threads` parts at a time, and the ids of one shard or so. `recompute` needs `inputs`.

    Raises:
        OutputError: no output, or its run.json is missing or broken.
        SettingsError: the input, or the weights of a required recomputation, cannot be had.
    """
    expected = expectation(output)
    verdict = Verdict(output, expected.digest)
    shards = _input(inputs, expected, verdict) if inputs else {}
    model = make_model(expected.made, recompute, verdict) if recompute is not None and inputs else None
    groups = _groups(_list(output, verdict), shards, verdict)
    sources: list[Source] = []
    for group, parts, tar in _checked(output, expected, groups, threads, on_progress):
        check_group(group, parts, expected.naming, verdict)
        if tar is not None:
            compare(group, parts, tar, verdict)
            if tar.fault is None and not group.is_broken:
                sources += [Source(part.name, tar.shard, len(part.embedded.ids)) for part in parts if part.whole]
    if verdict.unused_images:
        verdict.notes.append(
            f"{format_count(verdict.unused_images, 'image member')} without a row: {verdict.unused_example}"
        )
    if model is not None and recompute is not None:
        drawn = draw(sources, recompute)
        recompute_rows(output, expected.naming, model, drawn, verdict, on_progress)
    return verdict


def _input(inputs: Sequence[str], expected: Expected, verdict: Verdict) -> dict[str, Shard]:
    found = find_shards(inputs)
    prefix = expected.made.input_prefix
    if found.prefix != prefix:
        verdict.notes.append(
            f"the input's prefix is {one_line(found.prefix)}, the output was made of {one_line(prefix)}"
        )
    archives = archives_among(found.left_out)
    if archives:
        verdict.notes.append(f"files of the input that may be shards and are not read: {format_left_out(archives)}")
    return {shard.name: shard for shard in found.shards}


def _list(output: str, verdict: Verdict) -> dict[str, set[PartName]]:
    """The parts in embeddings/ and in errors/, by one listing; a file that has no place there is told."""
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
        elif folder not in stored:
            if path not in _EXPECTED_FILES:
                verdict.notes.append(f"{one_line(path)} is no file of an output")
        elif name is None or str(name) != rest:
            verdict.find(path, "stray-file", "not named as a part is")
        else:
            verdict.num_bytes += info.num_bytes
            stored[folder].add(name)
    if num_temporary:
        verdict.notes.append(
            f"{num_temporary} temporary files in {TEMPORARY_FOLDER}/: a run died, which the next clears, or goes on"
        )
    if num_leases:
        verdict.notes.append("a run holds the output, or died: what it has not stored yet may be missing")
    if not stored[EMBEDDINGS]:
        verdict.find(f"{EMBEDDINGS}/", "no-parts", "there is none")
    for name in sorted(stored[ERRORS] - stored[EMBEDDINGS]):
        verdict.find(f"{ERRORS}/{name}", "errors-alone", f"{EMBEDDINGS}/{name} is not there")
    return stored


def _groups(stored: dict[str, set[PartName]], shards: dict[str, Shard], verdict: Verdict) -> list[Group]:
    """The shard versions to check, in the order of their names; versions that should not be there are told."""
    groups: list[Group] = []
    tags: dict[str, list[str]] = defaultdict(list)
    elsewhere = 0
    by_version = itertools.groupby(sorted(stored[EMBEDDINGS]), key=lambda part: (part.shard, part.tag))
    for (name, tag), found in by_version:
        parts = list(found)
        shard = shards.get(name)
        present = shard is not None and version_tag(shard.num_bytes, shard.version) == tag
        group = Group(parts, stored[ERRORS].intersection(parts), shard if present else None)
        groups.append(group)
        tags[name].append(tag)
        if shard is None:
            elsewhere += 1
        elif not present:
            value = f"the input's {shard.url} is now {shard.num_bytes} bytes, version {shard.version}"
            verdict.find(group.where, "old-version", value)
    for name, versions in tags.items():
        if len(versions) > 1 and name not in shards:
            value = f"{len(versions)} versions, so its samples come {len(versions)} times: {', '.join(versions)}"
            verdict.find(f"{EMBEDDINGS}/{name}.*", "two-versions", value)
    for name in sorted(shards.keys() - tags.keys()):
        verdict.find(f"{EMBEDDINGS}/{name}.*", "shard-missing", f"no part of {shards[name].url}")
    if elsewhere and shards:
        verdict.notes.append(
            f"{format_count(elsewhere, 'shard')} stored and not in this input: not compared with any tar"
        )
    verdict.shards = len(tags)
    return groups


def _checked(
    output: str, expected: Expected, groups: list[Group], threads: int, on_progress: Progress
) -> Iterator[tuple[Group, list[Part], Tar | None]]:
    """Read all parts and the tars beside them in threads, and give them shard by shard, in order."""
    waiting: deque[tuple[Group, list[Future[Part]], Future[Tar] | None]] = deque()
    total, done = sum(len(group.parts) for group in groups), 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        for group in [*groups, None]:
            if group is not None:
                futures = [
                    pool.submit(check_part, output, expected, name, name in group.with_errors) for name in group.parts
                ]
                tar = None if group.shard is None else pool.submit(walk, group.shard, expected.naming, expected.id)
                waiting.append((group, futures, tar))
            while waiting and (group is None or sum(len(parts) for _, parts, _ in waiting) > 8 * threads):
                oldest, futures, tar = waiting.popleft()
                checked = []
                for future in futures:
                    checked.append(future.result())
                    done += 1
                    on_progress("parts", done, total)
                yield oldest, checked, None if tar is None else tar.result()
    finally:
        pool.shutdown(cancel_futures=True)
