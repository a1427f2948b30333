"""How a run ended: its exit code, how bad that is, what happened, and what to do next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shard_embedder.pipeline.core.formatting import format_count

EXIT_OK = 0
EXIT_BROKEN_SHARDS = 3
EXIT_FAILED = 4  # the counts do not balance, or a disk or store failed
EXIT_TOO_MANY_ERRORS = 5

GOOD, WARN, BAD = "good", "warn", "bad"
_RUN_AGAIN = "run the same command again"
_NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Incomplete:
    """The names of shards that are not all stored, by what can be done about them."""

    damaged: Collection[str] = ()
    unreadable: Collection[str] = ()
    vanished: Collection[str] = ()
    refused: Collection[str] = ()

    def __len__(self) -> int:
        return len({*self.damaged, *self.unreadable, *self.vanished, *self.refused})

    def advice(self) -> str:
        """What to do, as a sentence."""
        steps = (
            ("replace {}", self.damaged),
            ("make {} readable", self.unreadable),
            ("restore {}", self.vanished),
            ("solve what keeps {} from being embedded", self.refused),
        )
        said = [step.format(_names(names)) for step, names in steps if names]
        text = "; ".join(said) + ("; then" if len(said) > 1 else " and") + f" {_RUN_AGAIN}."
        return text[0].upper() + text[1:]


def judge(
    report: Mapping[str, Any],
    incomplete: Incomplete,
    *,
    num_shards: int,
    num_left: int,
    worst_share: tuple[str, int, int] | None,
    max_error_fraction: float,
    max_shard_error_fraction: float,
) -> dict[str, Any]:
    """`exit_code` and `verdict` of a report: the worst that it tells.

    Args:
        report: the rest of it.
        incomplete: what could not be stored whole.
        num_shards: how many shards the input has.
        num_left: pending shards that `--limit` left for another run.
        worst_share: the shard with the largest share of errors, its errors and its samples.
        max_error_fraction: the share of errors that the user accepts.
        max_shard_error_fraction: the same of each shard.
    """
    samples, errors = report["samples"], report["errors"]
    if not report["balanced"]:
        num_missing = report["shards"]["missing"]
        missing = f"{format_count(num_missing, 'shard')} not complete, " if num_missing else ""
        happened = f"{missing}{format_count(report['num_imbalances'], 'disagreement')} in what is stored"
        then = f"{_RUN_AGAIN.capitalize()}. If that does not help, verify the output."
        return _verdict(EXIT_FAILED, BAD, "Not balanced", happened, then)
    if incomplete:
        happened = (
            f"{len(incomplete):,} of {format_count(num_shards, 'shard')} "
            f"{'is' if len(incomplete) == 1 else 'are'} incomplete"
        )
        return _verdict(EXIT_BROKEN_SHARDS, WARN, "Incomplete shards", happened, incomplete.advice())
    too_many = _above("", errors, samples, "--max-error-fraction", max_error_fraction)
    if too_many is None and worst_share is not None:
        shard, shard_errors, shard_samples = worst_share
        option = "--max-shard-error-fraction"
        too_many = _above(f" of {shard}.tar", shard_errors, shard_samples, option, max_shard_error_fraction)
    if too_many is not None:
        then = "Everything is stored. Read the reasons in errors/, and raise the limit if you accept them."
        return _verdict(EXIT_TOO_MANY_ERRORS, WARN, "Too many errors", too_many, then)
    then = f"--limit left {format_count(num_left, 'shard')}: {_RUN_AGAIN} to go on." if num_left else ""
    if report["device"] is None:
        happened = f"nothing to do: all {format_count(num_shards, 'shard')} had been embedded before"
        return _verdict(EXIT_OK, GOOD, "Nothing to do", happened, then)
    rows = f"{format_count(report['embedded'], 'embedding')} and {format_count(errors, 'error')}"
    happened = f"every sample is one stored row: {rows} for {format_count(samples, 'sample')}"
    is_doubtful = report["problems"] or report["warnings"] or (errors and not report["embedded"])
    return _verdict(EXIT_OK, WARN if is_doubtful else GOOD, "Balanced", happened, then)


def without_report(report: Mapping[str, Any], fault: str) -> dict[str, Any]:
    """A report that could not be stored, because of `fault`."""
    happened = f"the rows are stored, and the report cannot be stored: {fault}"
    worse = _verdict(EXIT_FAILED, BAD, "No report", happened, f"{_RUN_AGAIN.capitalize()}.")
    return {**report, "report_fault": fault, **(worse if report["balanced"] else {})}


def _verdict(code: int, level: str, title: str, happened: str, then: str) -> dict[str, Any]:
    return {"exit_code": code, "verdict": {"level": level, "title": title, "happened": happened, "next": then}}


def _above(of: str, errors: int, samples: int, option: str, limit: float) -> str | None:
    """What happened, where more of the samples are errors than an option allows."""
    if errors <= limit * samples:
        return None
    return (
        f"{errors:,} of {format_count(samples, 'sample')}{of} are errors, a fraction of {errors / samples:.4g}, "
        f"which is more than {option} {limit:g}"
    )


def _names(names: Iterable[str]) -> str:
    """Some of the shards by their files, and how many more there are."""
    files = [f"{name}.tar" for name in sorted(names)]
    more = f" and {len(files) - _NAMES_SHOWN:,} more" if len(files) > _NAMES_SHOWN else ""
    return ", ".join(files[:_NAMES_SHOWN]) + more
