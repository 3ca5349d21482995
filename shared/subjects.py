"""NATS subjects as functions; nothing else in Baton spells a subject. `c` is the cluster's name."""


def decode(c: str, worker: str) -> str:
    return f"{c}.decode.{worker}"


def prefill(c: str, worker: str) -> str:
    return f"{c}.prefill.{worker}"


def gateway(c: str, gateway_id: str) -> str:
    return f"{c}.gateway.{gateway_id}"


def cancel(c: str, worker: str) -> str:
    return f"{c}.cancel.{worker}"


def kv(c: str, node: str) -> str:
    return f"{c}.kv.{node}"


def ping(c: str, worker: str) -> str:
    return f"{c}.ping.{worker}"


def beat(c: str, role: str, service_id: str) -> str:
    return f"{c}.beat.{role}.{service_id}"


def beats(c: str, role: str) -> str:
    return f"{c}.beat.{role}.*"


def all_beats(c: str) -> str:
    return f"{c}.beat.*.*"


def traffic(c: str, gateway_id: str) -> str:
    return f"{c}.traffic.{gateway_id}"


def all_traffic(c: str) -> str:
    return f"{c}.traffic.*"


def metrics(c: str, service_id: str) -> str:
    return f"{c}.metrics.{service_id}"


def spans(c: str, gateway_id: str) -> str:
    return f"{c}.spans.{gateway_id}"


def wanted(c: str) -> str:
    """Of spans that were not sent because their trace was not sampled."""
    return f"{c}.wanted"


def trace(c: str, gateway_id: str) -> str:
    return f"{c}.trace.{gateway_id}"


def selftest(c: str, work: str, worker: str) -> str:
    """Where a worker that starts sends a job to itself: it may send none to others. `work`: prefill or decode."""
    return f"{c}.selftest.{work}.{worker}"


def selftest_gateway(test: str) -> str:
    """As a gateway's id: two tokens of a subject, so that the workers' users may hear it and no gateway's."""
    return f"selftest.{test}"


def selftests(c: str) -> tuple[str, str]:
    return selftest(c, "*", "*"), gateway(c, selftest_gateway("*"))


def everything(c: str) -> str:
    """All traffic of a cluster, for `baton tap`."""
    return f"{c}.>"
