"""A trace as lines of text: the tree of spans on the left, when each ran on the right. Pure.

Invariant: no line is wider than asked for, and bars are in proportion: half of the time has half of the width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

LEAST_BAR = 20
MS_DIGITS = 9
BLOCK, EIGHTHS, MARK = "█", " ▏▎▍▌▋▊▉", "▸"
SHOWN = (  # attributes that explain a span, with what is written for them
    ("baton.worker", ""),
    ("gen_ai.usage.input_tokens", "prompt "),
    ("gen_ai.usage.output_tokens", "output "),
    ("gen_ai.usage.cache_read.input_tokens", "cached "),
    ("blocks", "blocks "),
    ("bytes", "bytes "),
    ("path", ""),
    ("failed", "failed "),
)

Span = Mapping[str, Any]


def waterfall(trace: Mapping[str, Any], width: int) -> str:
    """`trace`: as GET /dashboard/traces/{id} gives it."""
    spans: Sequence[Span] = trace["spans"]
    end_ms = max((_end(span) for span in spans), default=0.0) or 1.0
    depths = _depths(spans)
    names = [("  " * depths[span["span_id"]]) + span["name"] for span in spans]
    left = max((len(name) for name in names), default=0)
    where = max((len(span["instance"]) for span in spans), default=0)
    bar = max(LEAST_BAR, width - left - where - 2 * MS_DIGITS - 7)
    scale = f"{'0 ms':<{bar // 2}}{f'{end_ms:,.1f} ms':>{bar - bar // 2}}"
    lines = [*_head(trace), f"{'':{left}}  {'':{where}}  {'start':>{MS_DIGITS}} {'took':>{MS_DIGITS}}  {scale}"]
    for name, span in zip(names, spans, strict=True):
        took = f"{span['start_ms']:>{MS_DIGITS},.1f} {span['duration_ms']:>{MS_DIGITS},.1f}"
        drawn = _bar(span["start_ms"] / end_ms, span["duration_ms"] / end_ms, bar)
        lines.append(f"{name:<{left}}  {span['instance']:<{where}}  {took}  {drawn}")
        note = _note(span)
        indent = "  " * depths[span["span_id"]] + "  "
        lines += [f"{indent}{note}"] if note else []
        lines += [f"{indent}{MARK} {event['at_ms']:,.1f} ms {_event(event)}" for event in span["events"]]
    return "\n".join(line[:width].rstrip() for line in lines)


def listing(traces: Sequence[Mapping[str, Any]]) -> str:
    """One line a trace."""
    rows = [("REQUEST", "OUTCOME", "FIRST TOKEN", "TOOK", "TIER", "TENANT", "PATH", "KEPT", "SPANS")]
    for one in traces:
        ttft = "-" if one["ttft_ms"] is None else f"{one['ttft_ms']:,.1f} ms"
        took = f"{one['duration_ms']:,.1f} ms"
        path, spans = one["path"] or "-", str(one["spans"])
        rows.append(
            (one["request_id"], one["outcome"], ttft, took, one["tier"], one["tenant"], path, one["kept"], spans)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _head(trace: Mapping[str, Any]) -> list[str]:
    summary, receipt = trace["summary"], trace["receipt"]
    ttft = "no token came" if summary["ttft_ms"] is None else f"first token after {summary['ttft_ms']:,.1f} ms"
    lines = [
        f"request {trace['request_id']}: {trace['outcome']} after {summary['duration_ms']:,.1f} ms, {ttft}",
        f"trace {trace['trace_id']}, tier {summary['tier']}, tenant {summary['tenant']}, kept: {summary['kept']}",
    ]
    if receipt.get("path"):
        told = f"{receipt['path']} ({receipt['reason']}), prefill {receipt['prefill'] or '-'}, "
        told += f"decode {receipt['decode']}, cached tokens {receipt['cached_tokens']}, retries {receipt['retries']}"
        if receipt.get("predicted_ttft_ms") is not None:
            told += f", predicted {receipt['predicted_ttft_ms']:,.1f} ms"
        lines.append(told)
    if stages := receipt.get("stages_ms"):
        lines.append("to the first token: " + ", ".join(f"{name} {ms:,.1f}" for name, ms in stages.items()) + " ms")
    return [*lines, ""]


def _depths(spans: Sequence[Span]) -> dict[str, int]:
    """Parents come first."""
    depths: dict[str, int] = {}
    for span in spans:
        depths[span["span_id"]] = depths.get(span["parent_id"], -1) + 1
    return depths


def _end(span: Span) -> float:
    return float(span["start_ms"] + span["duration_ms"])


def _bar(start: float, share: float, width: int) -> str:
    """To an eighth of a character, and never nothing."""
    first = min(width - 1, max(0, int(start * width)))
    eighths = max(1, min((width - first) * 8, round(share * width * 8)))
    return " " * first + BLOCK * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


def _note(span: Span) -> str:
    told = [f"{word}{span['attributes'][key]}" for key, word in SHOWN if span["attributes"].get(key) not in (None, "")]
    if span["status"] == "error":
        told.insert(0, f"failed: {span['error'] or 'error'}")
    return ", ".join(told)


def _event(event: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in event["attributes"].items() if value != "")
    return f"{event['name']}{': ' if told else ''}{told}"
