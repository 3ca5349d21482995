"""The result of `python -m loadtest gateway` as text: every figure beside its limit."""

from typing import Any

from loadtest.micro.bench import Figure

HEAD = (
    f"{'req/s':>20} {'TTFT ms p50/p99':>16} {'ITL ms p50/p99':>16} {'tok/s':>8} {'/read':>6} "
    f"{'gateway us/req':>18} {'us/token':>14} {'nats':>5} {'workers':>7} {'driver':>6}"
)
LIMIT_HEAD = (
    f"{'req/s':>20} {'TTFT ms p50/p99':>16} {'ITL ms p50/p99':>16} {'tok/s':>8} {'/read':>6} "
    f"{'server us/req':>18} {'us/token':>14}"
)


def text(found: dict[str, Any]) -> str:
    settings = found["settings"]
    shape = f"{settings['prompt_tokens']} prompt and {settings['output_tokens']} output tokens"
    lines = [
        f"Workers that never wait, {shape}; median (lowest-highest round), CPU of others in us per token",
        f"  {'':12} {'c':>4} {HEAD}",
        *(f"  {row['api']:12} {row['concurrency']:4} {_gateway(row)}" for row in found["free"]),
        "",
        "Servers without an engine, gateway, bus or workers",
        f"  {'':26} {'c':>4} {LIMIT_HEAD}",
        *(
            f"  {row['server']:26} {row['concurrency']:4} {_common(row)} {_cpu(row, 'server')}"
            for row in found["limits"]
        ),
        "",
        f"A token every {settings['step_ms']:g} ms for each stream",
        f"  {'':12} {'n':>4} {'of ideal':>16} {HEAD}",
        *(_paced(row) for row in found["paced"]),
    ]
    lines += [f"ERROR {what}: {count} times" for what, count in found["errors"].items()]
    return "\n".join(lines)


def _paced(row: dict[str, Any]) -> str:
    share: Figure = row["share_of_ideal"]
    cells = f"{share.median:.3f} ({share.low:.2f}-{share.high:.2f})"
    rest = _gateway(row) if row["server"] == "gateway" else f"{_common(row)} {_cpu(row, 'server')}"
    return f"  {row['server']:12} {row['streams']:4} {cells:>16} {rest}"


def _gateway(row: dict[str, Any]) -> str:
    workers = row["prefill_us_per_token"].median + row["decode_us_per_token"].median
    return (
        f"{_common(row)} {_cpu(row, 'gateway')} "
        f"{row['nats_us_per_token'].median:5.1f} {workers:7.1f} {row['driver_us_per_token'].median:6.1f}"
    )


def _common(row: dict[str, Any]) -> str:
    rate: Figure = row["requests_per_s"]
    rates = f"{rate.median:.0f} ({rate.low:.0f}-{rate.high:.0f})"
    ttft = f"{row['ttft_p50_ms'].median:.2f}/{row['ttft_p99_ms'].median:.2f}"
    itl = f"{row['itl_p50_ms'].median:.2f}/{row['itl_p99_ms'].median:.2f}"
    return f"{rates:>20} {ttft:>16} {itl:>16} {row['tokens_per_s'].median:8.0f} {row['tokens_per_read'].median:6.1f}"


def _cpu(row: dict[str, Any], process: str) -> str:
    request: Figure = row[f"{process}_us_per_request"]
    token: Figure = row[f"{process}_us_per_token"]
    requests = f"{request.median:.0f} ({request.low:.0f}-{request.high:.0f})"
    tokens = f"{token.median:.1f} ({token.low:.1f}-{token.high:.1f})"
    return f"{requests:>18} {tokens:>14}"
