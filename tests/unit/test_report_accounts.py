"""What became of requests and where their time went: everything offered has one verdict, parts add up to the whole."""

import msgspec
import pytest

from loadtest.report import accounts, comparability, comparison, facts
from loadtest.report.runs import Run
from loadtest.result import Result
from tests.support.made_results import made_result


def result_of(**how) -> Result:
    return msgspec.convert(made_result(**how), Result)


def run_of(tmp_path, label="run", *, changed=None, **how) -> Run:
    made = made_result(**how)
    for path, value in (changed or {}).items():
        *parents, last = path.split(".")
        place = made
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Run(label, tmp_path / label / "result.json", msgspec.convert(made, Result))


@pytest.mark.parametrize(
    ("outcome", "ttft_s", "good", "verdict"),
    [
        ("ok", 0.1, True, "good"),
        ("ok", 2.5, False, "late"),
        ("ok", 0.1, False, "slow"),
        ("ok", None, False, "late"),
        ("shed", None, False, "shed"),
        ("left", 0.1, False, "left"),
        ("", None, False, "unfinished"),
        *(
            (outcome, None, False, "failed")
            for outcome in ("error", "client_error", "cut", "timeout", "unreachable", "wrong")
        ),
    ],
)
def test_each_outcome_has_a_verdict(outcome, ttft_s, good, verdict):
    made = made_result(requests=1)
    made["requests"] |= {"outcome": [outcome], "ttft_s": [ttft_s], "good": [good]}
    found = accounts.verdicts(msgspec.convert(made, Result))
    assert {name: number for name, number in found.items() if number} == {verdict: 1}


@pytest.mark.parametrize(
    "how", [{}, {"shed_share": 1.0}, {"shed_share": 0.2, "error_share": 0.2, "null_share": 0.5}, {"requests": 0}]
)
def test_verdicts_add_up_to_what_was_offered(how):
    result = result_of(**how)
    assert sum(accounts.verdicts(result).values()) == len(result.requests.intended_s)


@pytest.mark.parametrize("how", [{"stages": True}, {"stages": False}, {"null_share": 0.5}])
def test_the_parts_of_a_request_add_up_to_its_time(how):
    requests = result_of(**how).requests
    names = accounts.stage_names(requests)
    rows = accounts.parts_s(requests, names)
    whole_s = [value for value in accounts.whole_s(requests) if value is not None]
    assert len(rows) == len(whole_s) > 0
    for row, total_s in zip(rows, whole_s, strict=True):
        assert len(row) == len(names)
        assert sum(row) == pytest.approx(total_s)


def test_without_stages_there_are_first_token_and_decode():
    assert accounts.stage_names(result_of(stages=False).requests) == [accounts.WHOLE, accounts.DECODE]


def test_a_stage_that_would_reach_past_the_first_token_is_cut_there():
    made = made_result(requests=1)
    made["requests"] |= {"intended_s": [1.0], "ttft_s": [0.3], "end_s": [2.0]}
    made["requests"]["stages"] = {"queue": [0.2], "reserve": [0.0], "handoff": [0.5]}
    requests = msgspec.convert(made, Result).requests
    (row,) = accounts.parts_s(requests, accounts.stage_names(requests))
    assert row == pytest.approx([0.2, 0.0, 0.1, 0.0, 0.7])


def test_a_stage_with_an_unknown_name_has_a_colour_of_its_own():
    names = ["queue", "thinking", "handoff", "prefill", accounts.REST, accounts.DECODE]
    colours = accounts.stage_colours(names)
    assert len(set(colours)) == len(names)


def test_the_slowest_hundredth_is_at_least_one():
    rows = [[float(number)] for number in range(250)]
    assert accounts.slowest(rows) == [[248.0], [249.0]]
    assert accounts.slowest(rows[:3]) == [[2.0]]
    assert accounts.slowest([]) == []


def test_a_request_without_gaps_meets_every_bound_that_any_meets():
    made = made_result(requests=2)
    made["requests"] |= {"itl_p99_s": [0.05, None], "outcome": ["ok", "ok"]}
    assert accounts.longest_gaps_s(msgspec.convert(made, Result).requests) == [0.05, 0.05]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"target.engine": "vllm"}, "engine"),
        ({"target.profile": "other"}, "engine"),
        ({"target.model": "other"}, "model"),
        ({"machine.cpu": "other"}, "machine"),
        ({"name": "other"}, "workload"),
        ({"settings.source": {"prompt_tokens": {"constant": 9}}}, "workload"),
        ({"slo.ttft_s": 9.0}, "SLO"),
    ],
)
def test_runs_that_are_not_comparable_are_said_to_be(tmp_path, changed, name):
    warnings = comparability.warnings([run_of(tmp_path, "a"), run_of(tmp_path, "b", changed=changed)])
    assert [warning.partition(",")[0] for warning in warnings] == [f"The runs differ in {name}"]


def test_runs_that_differ_in_arrangement_and_revision_may_be_compared_and_it_is_listed(tmp_path):
    changed = {"target.arrangement": "unsplit", "git.revision": "f" * 40}
    runs = [run_of(tmp_path, "a"), run_of(tmp_path, "b", changed=changed)]
    assert comparability.warnings(runs) == []
    assert [row[0].text for row in comparability.differences(runs)] == ["arrangement", "revision"]


def test_different_loads_are_warned_of(tmp_path):
    (warning,) = comparability.warnings([run_of(tmp_path, "a"), run_of(tmp_path, "b", requests=800)])
    assert "different loads" in warning


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"client.lateness_s.p99": 0.5}, "was late: 500\u00a0ms"),
        ({"client.cpu_share": 0.95}, "was busy"),
        ({"client.cpu_share": 0.95, "client.processes": 2}, None),
        ({"client.rejected_by_client": 3}, "turned 3 requests away"),
        ({"settings.interrupted": True}, "interrupted"),
        ({"settings.clipped": 4}, "4 requests were clipped"),
        ({"settings.lost_drivers": ["driver 1 ended with -9"]}, "driver 1 ended with -9"),
        ({"summary.outcomes": {"wrong": 2}}, "2 answers had the wrong text"),
        ({"summary.completed": 0}, "No request was completed"),
        ({"summary.offered": 0}, "No request was offered"),
    ],
)
def test_what_makes_a_run_untrustworthy_is_said(tmp_path, changed, words):
    warnings = facts.warnings(run_of(tmp_path, changed=changed))
    assert len(warnings) == (0 if words is None else 1)
    assert all(words in warning for warning in warnings)


def test_ratios_are_to_the_first_run_and_say_which_way_is_better(tmp_path):
    first = {"summary.goodput_per_s": 4.0, "summary.ttft_s": {"p50": 0.2}, "summary.shed": {}}
    second = {"summary.goodput_per_s": 8.0, "summary.ttft_s": {"p50": 0.4}, "summary.shed": {"queue_full": 3}}
    runs = [run_of(tmp_path, "a", changed=first), run_of(tmp_path, "b", changed=second)]
    table = comparison.page(runs).sections[0].blocks[0]
    rows = {row[0].text: row[2] for row in table.rows}
    assert (rows["goodput"].note, rows["goodput"].tone) == ("2.00\u00d7 better", "better")
    assert (rows["TTFT p50"].note, rows["TTFT p50"].tone) == ("2.00\u00d7 worse", "worse")
    assert (rows["TTFT p99"].text, rows["TTFT p99"].note) == ("\u2013", "")  # not known
    assert (rows["shed"].text, rows["shed"].note) == ("3", "")  # nothing to divide by
    assert (rows["offered"].note, rows["offered"].tone) == ("1.00\u00d7", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": {"b": 1.0, "c": [1, 2]}, "d": None}, {"a.b": "1", "a.c": "1, 2", "d": "\u2013"}),
        ({"a": [{"b": True}]}, {"a[0].b": "yes"}),
        ({}, {"": "\u2013"}),
        ({"a": []}, {"a": "\u2013"}),
    ],
)
def test_nested_settings_become_dotted_keys(value, expected):
    assert dict(facts.flat(value)) == expected
