"""The result of `python -m loadtest kv` as text: every figure beside its limit."""

from typing import Any

from loadtest.micro.bench import Figure

STAGES = ("reserve", "reserve_source", "copy_out", "checksum", "commit", "notice", "pick_up", "copy_in", "total")
RATES = (("get", "raw get"), ("prefix", ""), ("pin", "raw pin"), ("put", "raw put"))

HANDOFF_HEAD = (
    "   MiB slot KiB               GB/s   p50 ms   p99 ms  one memcpy ms"
    f"{'/ one':>19}{'/ two':>19}{'/ two by page + xxh3':>22}"
)
PEERS_HEAD = (
    f"  {'MiB':>4} {'slot KiB':>8} {'GB/s':>18} {'raw GB/s':>18} {'of raw':>18} {'CPU s/GB':>18} "
    f"{'p50 ms':>8} {'p99 ms':>8}"
)


def text(found: dict[str, Any]) -> str:
    parts = [
        _limits(found["limits"]),
        _handoffs(found["handoff"]),
        _stages(found["handoff"]),
        _protocol(found["protocol"]),
        _concurrency(found["concurrency"]),
        _between_nodes(found["peers"]["bandwidth"]),
        _overlap(found["peers"]["overlap"]),
        _store(found["store"]),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def of(figure: Figure, digits: int = 2) -> str:
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"


def _limits(rows: dict[str, Figure]) -> list[str]:
    return ["Raw limits: median (lowest-highest round)", *(f"  {name:38} {of(row)}" for name, row in rows.items())]


def _handoffs(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Hand-off: from the source's first copy to the last page in the target; ratios to limits of the same round",
        HANDOFF_HEAD,
    ]
    for point in points:
        total = point["stages"]["total"]
        lines.append(
            f"  {point['size_mib']:4.0f} {point['slot_kib']:8.0f} {of(point['gb_per_s']):>18} "
            f"{total['p50_ms']:8.2f} {total['p99_ms']:8.2f} {point['limits_ms']['one memcpy'].median:14.2f} "
            f"{of(point['of_one_memcpy']):>18} {of(point['of_two_memcpys']):>18} "
            f"{of(point['of_two_by_page_and_xxh3']):>21}"
        )
    return lines


def _stages(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Where a hand-off's time goes, p50 / p99 in ms (the two reservations are not part of the total)",
        f"  {'MiB':>4} {'slot KiB':>8} " + " ".join(f"{name.replace('_', ' '):>15}" for name in STAGES),
    ]
    for point in points:
        cells = [f"{point['stages'][name]['p50_ms']:.2f} / {point['stages'][name]['p99_ms']:.2f}" for name in STAGES]
        lines.append(
            f"  {point['size_mib']:4.0f} {point['slot_kib']:8.0f} " + " ".join(f"{cell:>15}" for cell in cells)
        )
    return lines


def _protocol(calls: dict[str, Any]) -> list[str]:
    lines = [
        "Local protocol, 32 keys, against a raw unix-socket round trip of as many bytes",
        f"  {'call':8} {'bytes':>11} {'p50 us':>8} {'p99 us':>8} {'raw p50':>8} {'raw p99':>8} {'/ raw':>6}",
    ]
    for name, row in calls.items():
        lines.append(
            f"  {name:8} {row['asked_bytes']:>5}/{row['answer_bytes']:<5} {row['p50_us']:8.0f} {row['p99_us']:8.0f} "
            f"{row['raw_p50_us']:8.0f} {row['raw_p99_us']:8.0f} {row['of_raw']:6.1f}"
        )
    return lines


def _concurrency(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Transfers at once (16 MiB each); the limit: two threads that copy, and every byte is copied twice",
        f"  {'at once':>7} {'GB/s':>18} {'of limit':>18} {'Jain':>20} {'p50 ms':>8} {'p99 ms':>8}",
    ]
    lines += [
        f"  {row['at once']:7} {of(row['GB/s']):>18} {of(row['of limit']):>18} {of(row['Jain'], 3):>20} "
        f"{row['p50 ms'].median:8.1f} {row['p99 ms'].median:8.1f}"
        for row in rows
    ]
    return lines


def _between_nodes(points: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Between nodes: blocks that the source's store holds, until the target's has verified and committed them all;",
        "raw: a plain socket in the same round; CPU: of both stores",
        PEERS_HEAD,
    ]
    lines += [
        f"  {row['size_mib']:4.0f} {row['slot_kib']:8.0f} {of(row['GB/s']):>18} {of(row['raw GB/s']):>18} "
        f"{of(row['of raw']):>18} {of(row['CPU s/GB']):>18} {row['p50 ms'].median:8.2f} {row['p99 ms'].median:8.2f}"
        for row in points
    ]
    return lines


def _overlap(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Exposed: from the last chunk's commit at the source until the target's store holds the whole prompt (32 MiB)",
        f"  {'chunks':>6} {'exposed ms':>18} {'whole ms':>18} {'of whole':>18} {'1/chunks':>8}",
    ]
    lines += [
        f"  {row['chunks']:6} {of(row['exposed ms']):>18} {of(row['whole ms']):>18} {of(row['of whole']):>18} "
        f"{1 / row['chunks']:8.2f}"
        for row in rows
    ]
    return lines


def _store(rates: dict[str, Figure]) -> list[str]:
    lines = [
        "Store in process, 100,000 blocks, thousands of operations a second; raw: a dictionary that does the least"
    ]
    for name, raw in RATES:
        limit = f"   raw {rates[raw].median / 1e3:8.0f}" if raw else ""
        lines.append(f"  {name:8} {rates[name].median / 1e3:8.0f}{limit}")
    return lines
