"""Names of OpenTelemetry's GenAI conventions (still in development), all in one place."""

from collections.abc import Mapping

from opentelemetry.util.types import AttributeValue

from services.gateway.answer.render import Usage

PROVIDER = "baton"
DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"  # noqa: S105 - a metric's name
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"  # noqa: S105 - a metric's name


def request(*, chat: bool, model: str, max_tokens: int, response_id: str) -> Mapping[str, AttributeValue]:
    return {
        "gen_ai.operation.name": "chat" if chat else "text_completion",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": max_tokens,
        "gen_ai.response.id": response_id,
    }


def response(usage: Usage, finish_reasons: list[str]) -> Mapping[str, AttributeValue]:
    return {
        "gen_ai.response.finish_reasons": finish_reasons,
        "gen_ai.usage.input_tokens": usage.prompt,
        "gen_ai.usage.output_tokens": usage.completion,
        "gen_ai.usage.cache_read.input_tokens": usage.cached,
    }


def error(code: str) -> Mapping[str, AttributeValue]:
    return {"error.type": code}


def prometheus(name: str) -> str:
    """The metric's name as Prometheus writes it; seconds are these metrics' unit."""
    return name.replace(".", "_") + "_seconds"
