"""Unsplit vLLM as the measure of exactness: its own offline `LLM`, no line of Baton, in a process of its own.

`python -m tests.support.reference SPEC OUT`: SPEC is JSON `{"engine": {...}, "batches": [[request, ...], ...]}`; the
requests of a batch run together. A request is `{"tokens": [...], "params": {vLLM SamplingParams}, "json": schema}`.
OUT gets, batch by batch, a list of choices a request: `{"token_ids", "text", "finish_reason", "stop_reason", "logprobs",
"prompt_logprobs"}`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_reference(folder: Path, engine: dict[str, Any], batches: list[list[dict[str, Any]]]) -> list[Any]:
    """Start the process, wait for its end, return what it wrote."""
    spec, out = folder / "reference-spec.json", folder / "reference-out.json"
    spec.write_text(json.dumps({"engine": engine, "batches": batches}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.reference", str(spec), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    spec = json.loads(args.spec.read_text())
    llm = LLM(distributed_executor_backend="uni", **spec["engine"])

    def params(request: dict[str, Any]) -> SamplingParams:
        structured = StructuredOutputsParams(json=request["json"]) if request.get("json") else None
        given = dict(request["params"])
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return SamplingParams(structured_outputs=structured, **given)

    results = []
    for batch in spec["batches"]:
        outputs = llm.generate(
            [{"prompt_token_ids": request["tokens"]} for request in batch],
            [params(request) for request in batch],
            use_tqdm=False,
        )
        results.append([[_choice(choice, output.prompt_logprobs) for choice in output.outputs] for output in outputs])
    args.out.write_text(json.dumps(results))


def _choice(choice: Any, prompt: Any) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs:
        logprobs = [{str(token): entry.logprob for token, entry in position.items()} for position in choice.logprobs]
    return {
        "token_ids": list(choice.token_ids),
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "logprobs": logprobs,
        "prompt_logprobs": None if prompt is None else [_position(position) for position in prompt],
    }


def _position(position: Any) -> dict[str, Any] | None:
    return position and {
        str(token): {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
        for token, entry in position.items()
    }


if __name__ == "__main__":
    main()
