"""`report.html`: one page that tells a person what a run did, and needs nothing but itself.

It is drawn after the run, from its report and a look into what is stored. What cannot be drawn says why in its place,
and nothing that goes wrong here changes the run or its report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from pipeline.core.formatting import format_count, format_duration, format_share, format_size
from pipeline.core.redact import describe
from pipeline.core.storage import write_bytes
from pipeline.output.names import PAGE_FILE
from pipeline.pages import look
from pipeline.pages import speed as report_time
from pipeline.pages.charts import STYLE as CHARTS
from pipeline.pages.charts import number
from pipeline.pages.html import document, safe
from pipeline.pages.sample import take_sample
from pipeline.shards.find import Shard
from pipeline.shards.keys import Naming

MAX_REASONS = 20
_OPEN_LISTED = 10
_STYLE = """
header { margin-bottom: 1.4rem; }
header .sub { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
h3:first-child { margin-top: 0; }
p { margin: .3rem 0 .6rem; max-width: 48rem; overflow-wrap: anywhere; }
.note { font-size: 13px; color: var(--soft); }
.verdict { display: flex; gap: .6rem; margin: 1rem 0; padding: .8rem 1rem; border-radius: 8px; max-width: none;
  background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--good); }
.verdict b { color: var(--good); white-space: nowrap; }
.verdict.warn { border-left-color: var(--warn); } .verdict.warn b { color: var(--warn); }
.verdict.bad { border-left-color: var(--bad); } .verdict.bad b { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; margin: 0; }
.figures div { background: var(--card); padding: .7rem 1rem; }
.figures dt { font-size: 13px; color: var(--soft); }
.figures dd { margin: 0; font-size: 1.35rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures dd small { font-weight: 400; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1.1rem 1.2rem 1.2rem;
  margin: 1rem 0; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.2rem; margin: 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--soft); font-size: 13px; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
ul { margin: .3rem 0; padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
summary { cursor: pointer; }
footer { color: var(--soft); font-size: 13px; margin-top: 1.4rem; } a { color: var(--data); }
@media (max-width: 560px) { body { padding: 1.2rem .75rem; } section { padding: .9rem .8rem 1rem; }
  .facts { gap: .3rem .8rem; font-size: 14px; }
  .figures { grid-template-columns: 1fr 1fr; } .figures dd { font-size: 1.05rem; }
  .figures div:last-child:nth-child(odd) { grid-column: span 2; }
  .wide { display: none; } .verdict { flex-direction: column; gap: .1rem; } }
@media print { body { max-width: none; } section { break-inside: avoid; } }
"""


def write_page(report: Mapping[str, Any], shards: Iterable[Shard], opened: Collection[str], naming: Naming) -> None:
    """Draw the page of a run and store it beside its report.

    `shards` are those of its input, as it found them. Pictures are read from those that it `opened`, by their names:
    a shard that was done before is not opened, not even for a picture.

    Raises:
        OSError, ShardError: it cannot be stored.
    """
    html = draw_page(report, {shard.name: shard for shard in shards}, opened, naming)
    write_bytes(str(report["output"]), PAGE_FILE, html.encode())


def draw_page(report: Mapping[str, Any], shards: Mapping[str, Shard], opened: Collection[str], naming: Naming) -> str:
    """The page as HTML."""
    body = "".join(
        (
            _header(report),
            _section("What ran", lambda: _facts(report)),
            "" if _was_idle(report) else _section("Speed", lambda: report_time.section(report)),
            _section("Errors and shards", lambda: _errors(report) + _lists(report)),
            _embeddings(str(report["output"]), shards, opened, naming),
            '<footer>Every number of this page that is of the run itself stands in <a href="report.json">report.json'
            "</a>, beside it.</footer>",
        )
    )
    return document(f"Embedding run {report['run']}", _STYLE + CHARTS + report_time.STYLE + look.STYLE, body)


def _section(title: str, make: Callable[[], str]) -> str:
    return f"<section><h2>{title}</h2>{_or_reason(make)}</section>"


def _or_reason(make: Callable[[], str]) -> str:
    """What `make` draws, or why it cannot: the one place where a page meets whatever went wrong."""
    try:
        return make()
    # The run is over and stored: no mistake in a drawing may look as if it were not.
    except Exception as error:
        return f'<p class="note">This could not be drawn: {safe(describe(error))}</p>'


def _was_idle(report: Mapping[str, Any]) -> bool:
    """Whether nothing was pending: no device was asked for."""
    return report["device"] is None


def _verdict(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """How it went: how grave, in a word, and in a sentence."""
    shards = report["shards"]
    if not report["balanced"]:
        missing = f"{format_count(shards['missing'], 'shard')} not complete, " if shards["missing"] else ""
        found = format_count(report["num_imbalances"], "disagreement")
        return "bad", "Not balanced", f"{missing}{found} in what is stored. Run the same command again."
    if _was_idle(report):
        return "", "Nothing to do", f"All {format_count(shards['found'], 'shard')} had been embedded before."
    rows = f"{format_count(report['embedded'], 'embedding')} and {format_count(report['errors'], 'error')}"
    balanced = f"Every sample is one stored row: {rows} for {format_count(report['samples'], 'sample')}."
    if shards["broken"]:
        broken = f"{format_count(shards['broken'], 'shard')} could not be read to the end"
        return (
            "warn",
            "Broken shards",
            f"{broken}; what could be read is stored, and the next run tries again. {balanced}",
        )
    return ("warn" if report["problems"] or report["warnings"] else ""), "Balanced", balanced


def _header(report: Mapping[str, Any]) -> str:
    kind, word, sentence = _verdict(report)
    when = str(report["started_at"]).replace("T", " ").replace("+00:00", " UTC")
    sub = f"run {report['run']}, started {when}, {format_duration(report['wall_s'])}"
    return (
        f'<header><h1>{safe(report["backbone"], 80)} embeddings</h1><p class="sub">{safe(sub)}</p>'
        f'<p class="verdict {kind}"><b>{word}</b><span>{safe(sentence)}</span></p>{_figures(report)}</header>'
    )


def _figures(report: Mapping[str, Any]) -> str:
    if _was_idle(report):
        return ""
    samples, errors = report["samples"], report["errors"]
    million = report["device_hours_per_million_images"]
    price = report["price_per_million_images"]
    found = [
        ("embeddings", f"{report['embedded']:,}"),
        ("errors", f"{errors:,} <small>{format_share(errors / samples) if samples else '-'} of samples</small>"),
        ("throughput", f"{report['images_per_s']:,} <small>images/s</small>"),
        ("run time", format_duration(report["wall_s"])),
        ("a million images", "-" if million is None else f"{number(million)} <small>device-hours</small>"),
        *(
            []
            if price is None
            else [
                ("a million images cost", f"{number(price)} <small>at {report['price_per_hour']:g} an hour</small>")
            ]
        ),
    ]
    return (
        '<dl class="figures">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in found)
        + "</dl>"
    )


def _facts(report: Mapping[str, Any]) -> str:
    shards, shape = report["shards"], "x".join(map(str, report["embedding_shape"]))
    inputs = report["input"]
    parts = [
        f"{shards['found']:,} in the input",
        f"{shards['done_before']:,} done before",
        f"{shards['done_now']:,} done now",
        *(
            f"{shards[key]:,} {what}"
            for key, what in (("changed", "changed since"), ("retried", "broken before"))
            if shards[key]
        ),
        *(
            [f"{shards['stored_but_not_in_input']:,} stored and not in this input"]
            * bool(shards["stored_but_not_in_input"])
        ),
    ]
    device = f"{report['num_devices']} x {report['device']}"
    facts = [
        ("backbone", report["backbone"]),
        ("weights", f"{report['weights']} (sha256 {report['weights_sha256'][:16]})"),
        ("embeddings", f"{report['features']} [{shape}], {report['dtype']}"),
        ("precision", report["precision"]),
        ("engine", report["engine"] or "none was started"),
        ("device", "none" if _was_idle(report) else device),
        ("input", ", ".join(inputs[:5]) + (f" and {len(inputs) - 5:,} more" if len(inputs) > 5 else "")),
        ("output", report["output"]),
        ("shards", ", ".join(parts)),
        ("image members without a row", f"{report['unused_images']:,}"),
        ("read, written", f"{format_size(report['read_bytes'])}, {format_size(report['written_bytes'])}"),
        ("fingerprint", report["fingerprint"]),
    ]
    return '<dl class="facts">' + "".join(f"<dt>{name}</dt><dd>{safe(value)}</dd>" for name, value in facts) + "</dl>"


def _errors(report: Mapping[str, Any]) -> str:
    reasons = list(report["errors_by_reason"].items())
    stored, total = report["errors"], sum(times for _, times in reasons)
    if not stored and not reasons:
        said = "no sample was read" if _was_idle(report) else "every sample became an embedding"
        return f"<p>No errors: {said}.</p>"
    if not reasons:
        return f"<p>{format_count(stored, 'error')}, stored before this run, with the reasons in errors/.</p>"
    reasons.sort(key=lambda item: -item[1])
    rows = "".join(
        f'<tr><td>{safe(reason, 80)}</td><td class="n">{times:,}</td>'
        f'<td class="n wide">{format_share(times / total)}</td>'
        f"<td>{safe(report['error_examples'].get(reason, ''), 240)}</td></tr>"
        for reason, times in reasons[:MAX_REASONS]
    )
    rest = reasons[MAX_REASONS:]
    # Parts that were there before have their reasons in errors/ alone; a broken shard's fault is a row and no sample.
    in_all = (
        ""
        if total == stored
        else " The reasons are of what this run stored; "
        f"{format_count(stored, 'sample')} of its shards failed in all."
    )
    more = f"{len(rest):,} more kinds of reason, {format_count(sum(times for _, times in rest), 'error')}"
    return (
        '<table><thead><tr><th>reason</th><th class="n">errors</th><th class="n wide">of all errors</th>'
        f"<th>an example: shard, image_id, and what was wrong</th></tr></thead><tbody>{rows}</tbody></table>"
        + (f'<p class="note">And {more}.</p>' if rest else "")
        + '<p class="note">Each is a row in errors/, with its sample.'
        + f"{in_all}</p>"
    )


def _lists(report: Mapping[str, Any]) -> str:
    shards = report["shards"]
    broken = [f"{name}: {fault}" for name, fault in report["broken_shards"].items()]
    return "".join(
        (
            _list("Broken shards", broken, shards["broken"]),
            _list("Missing shards: not complete after all passes", report["missing_shards"], shards["missing"]),
            _list("Disagreements in what is stored", report["imbalances"], report["num_imbalances"]),
            _list("Warnings", report["warnings"], len(report["warnings"])),
            _list("Problems on the way", report["problems"], len(report["problems"])),
            _list("The report itself", [report["report_fault"]] if report["report_fault"] else [], 1),
        )
    )


def _list(title: str, texts: list[str], total: int) -> str:
    if not texts:
        return ""
    items = [f"<li>{safe(text)}</li>" for text in texts]
    shown, folded = items[:_OPEN_LISTED], items[_OPEN_LISTED:]
    more = f"<details><summary>{len(folded):,} more</summary><ul>{''.join(folded)}</ul></details>" if folded else ""
    cut = f'<p class="note">And {total - len(texts):,} more, which are not listed.</p>' if total > len(texts) else ""
    return f"<h3>{title} ({total:,})</h3><ul>{''.join(shown)}</ul>{more}{cut}"


def _embeddings(output: str, shards: Mapping[str, Shard], opened: Collection[str], naming: Naming) -> str:
    """What is stored, whether or not this run stored it."""

    def make() -> str:
        sample = take_sample(output, shards, opened)
        said = f"<p>{safe(look.told(sample))}</p>{look.faults(sample.faults)}"
        if not sample.ids:
            return said
        shown = {name: shard for name, shard in shards.items() if name in opened}
        pictures = look.take_pictures(sample, shown, naming)
        near = (
            _or_reason(lambda: look.gallery(sample, pictures))
            if opened
            else "<p>Pictures are of the shards that a run opens, and this one opened none.</p>"
        )
        return (
            f"{said}{look.faults(pictures.faults)}"
            f'<div class="look"><div><h3>Map</h3>{_or_reason(lambda: look.map_of(sample, pictures))}</div>'
            f"<div><h3>Norms</h3>{_or_reason(lambda: look.lengths(sample))}</div></div>"
            f"<h3>Neighbours</h3>{near}"
        )

    return _section("The embeddings", make)
