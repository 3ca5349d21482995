"""`python -m loadtest COMMAND`: measurements of a running cluster. Each command says what it needs with `-h`."""

import argparse
import sys
from collections.abc import Callable

from loadtest import report
from loadtest.cluster import compare, fairness, handoff, model, overload, scale, soak
from loadtest.load import run
from loadtest.micro import connectors, eviction, gateway, kv, placement
from loadtest.planning import plan
from loadtest.profiling import profile

COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
    "run": (run.add_arguments, run.run, "offer a workload or a trace, measure as a client, write result.json"),
    "report": (report.add_arguments, report.run, "one HTML page about a run, or a comparison of several"),
    "compare": (compare.add_arguments, compare.run, "a split cluster against an unsplit one, in turns"),
    "handoff": (handoff.add_arguments, handoff.run, "from the end of prefill to decode's first step, against memcpy"),
    "gateway": (gateway.add_arguments, gateway.run, "the token path by itself, next to servers without an engine"),
    "kv": (kv.add_arguments, kv.run, "the KV plane of one node by itself, next to plain memcpy and raw sockets"),
    "connectors": (connectors.add_arguments, connectors.run, "engine to engine: vLLM's NixlConnector beside ours"),
    "eviction": (eviction.add_arguments, eviction.run, "a recorded trace through the store, in several orders"),
    "placement": (placement.add_arguments, placement.run, "what choosing the workers of one request costs"),
    "overload": (overload.add_arguments, overload.run, "0.5 to 4 times its capacity, with admission and without"),
    "fairness": (fairness.add_arguments, fairness.run, "what one tenant's flood costs another one's first token"),
    "scale": (scale.add_arguments, scale.run, "throughput against the workers of one tier, the other one fixed"),
    "soak": (soak.add_arguments, soak.run, "mixed load for an hour: right texts, flat memory"),
    "plan": (plan.add_arguments, plan.run, "how many workers of each tier a load needs, from a profile's step times"),
    "model": (model.add_arguments, model.run, "make a random model with a KV cache of a chosen size"),
    "profile": (profile.add_arguments, profile.run, "measure engine step times and fit a profile for the sim engine"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, _, text) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args()
    return COMMANDS[args.command][1](args)


if __name__ == "__main__":
    sys.exit(main())
