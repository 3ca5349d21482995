"""The table of NATS users is complete: whoever adds a subject says who may use it."""

import inspect
from collections.abc import Callable

import pytest

from shared import subjects
from shared.bus_users import ROLES, authorization, from_environment, rights

C = "c"
# For a person, or made of others.
FOR_OPERATORS = {"everything", "selftests", "selftest_gateway"}
FUNCTIONS = [
    function
    for name, function in inspect.getmembers(subjects, inspect.isfunction)
    if name not in FOR_OPERATORS and function.__module__ == subjects.__name__
]


def covers(pattern: str, subject: str) -> bool:
    """Whether NATS lets who may use the pattern use this subject, which may have wildcards of its own."""
    ours, theirs = pattern.split("."), subject.split(".")
    if ours[-1] == ">":
        return ours[:-1] == theirs[: len(ours) - 1]
    return len(ours) == len(theirs) and all(one in ("*", other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_subject_has_who_hears_it_and_who_speaks_there(function: Callable[..., str]) -> None:
    subject = function(C, *("gateway" for _ in list(inspect.signature(function).parameters)[1:]))
    hears = [role for role in ROLES if any(covers(pattern, subject) for pattern in rights(C, role).subscribe)]
    assert hears, f"nobody may subscribe to {subject}: add it to shared/bus_users.py"
    if "*" in subject:
        return  # many subjects, each with its own function
    speaks = [role for role in ROLES if any(covers(pattern, subject) for pattern in rights(C, role).publish)]
    assert speaks, f"nobody may publish on {subject}: add it to shared/bus_users.py"


@pytest.mark.parametrize("role", ["prefill", "decode", "kv"])
def test_only_gateways_send_decode_jobs_and_cancels(role: str) -> None:
    for named in (subjects.decode, subjects.cancel):
        assert not any(covers(pattern, named(C, "w")) for pattern in rights(C, role).publish)


def test_workers_pass_prefill_jobs_on_and_stores_do_not() -> None:
    subject = subjects.prefill(C, "w")
    assert [role for role in ROLES if any(covers(one, subject) for one in rights(C, role).publish)] == [
        "gateway",
        "prefill",
        "decode",
    ]


def test_the_configuration_holds_no_password() -> None:
    text = authorization(C, from_environment)
    assert text.count("password: $NATS_") == len(ROLES) + 1
    assert "$NATS_GATEWAY_PASSWORD" in text
