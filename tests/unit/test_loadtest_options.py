"""The command line of `run`: what it refuses, and how."""

import argparse

import pytest

from loadtest.load import expected, options
from loadtest.load.run import _times
from loadtest.load.run import run as run_command
from shared.errors import SettingsError


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return parser.parse_args([*words, "--out", "/nowhere"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "--rate", "1", "--concurrency", "2"], "not both"),
        (["chat", "--arrivals", "gamma"], "need --rate"),
        (["chat", "--rate", "1", "--cv", "2"], "--arrivals gamma"),
        (["chat", "--rate", "-1"], "--rate"),
        (["chat", "--rate", "nan"], "--rate"),
        (["chat", "--rate", "1", "--seconds", "0"], "--seconds"),
        (["chat", "--rate", "1", "--seconds", "inf"], "--seconds"),
        (["chat", "--concurrency", "0"], "--concurrency"),
        (["chat", "--rate", "1", "--processes", "0"], "--processes"),
        (["chat", "--rate", "1", "--leave-share", "1.5"], "--leave-share"),
        (["chat", "--rate", "1", "--retries", "-1"], "--retries"),
        (["chat", "--rate", "1", "--first-byte-timeout", "0"], "--first-byte-timeout"),
        (["chat", "--rate", "1", "--header", "nonsense"], "--header"),
        (["chat", "--rate", "1", "--header", "a: b\r\nc: d"], "--header"),
        (["chat", "--rate", "1", "--minutes", "3"], "only for a trace"),
        (["chat", "--rate", "1", "--length-scale", "0"], "--length-scale"),
        (["azure-code", "--time-scale", "-2"], "--time-scale"),
        (["azure-code", "--start-minute", "70"], "no request there"),
        (["no-such-thing", "--rate", "1"], "no such workload or trace; there are agent-turns"),
        (["nowhere.jsonl"], "No such file"),
        (["nowhere.yaml", "--rate", "1"], "No such file"),
        (["chat"], "--rate R or --concurrency N"),
        (["chat", "--rate", "1", "--url", "ftp://127.0.0.1"], "give an address such as"),
        (["chat", "--rate", "1", "--url", "http://127.0.0.1:99999"], "the port"),
        (["chat", "--rate", "1", "--url", "http://"], "give an address such as"),
        (["chat", "--rate", "1", "--url", "http://no-such-host.invalid"], "cannot be resolved"),
        (["chat", "--rate", "0.0001", "--seconds", "1"], "not one request"),
    ],
)
def test_refused_in_one_line(words, said, capsys):
    assert run_command(parsed(*words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.startswith("loadtest run: ")


def test_bounds():
    def found(*words: str):
        read = options.checked(parsed(*words))
        return options.bounds(read, options.source(read))

    assert found("chat", "--rate", "1") == (60.0, None)
    assert found("chat", "--rate", "1", "--requests", "5") == (None, 5)
    assert found("chat", "--concurrency", "1", "--seconds", "5") == (5.0, None)
    assert found("azure-code") == (None, 1482)
    assert found("azure-code", "--requests", "7") == (None, 7)
    assert found("azure-code", "--seconds", "9") == (9.0, 1482)
    assert found("chat", "--rate", "1", "--rate-to", "2", "--arrivals", "ramp", "--requests", "5") == (60.0, 5)


def test_arrivals_of_a_trace_end_with_the_time():
    read = options.checked(parsed("azure-code", "--seconds", "9"))
    load = options.source(read)
    times = _times(read, load, *options.bounds(read, load))
    assert 0 < len(times) < 1482
    assert max(times) < 9


def test_keys_are_not_written_down():
    words = ["chat", "--rate", "1", "--header", "authorization: Bearer hush", "--header=x-key:hush"]
    read = options.checked(parsed(*words))
    assert read.headers == (("authorization", "Bearer hush"), ("x-key", "hush"))
    assert "hush" not in str(read.described())
    assert "hush" not in str(options.shown(words))
    assert options.shown(words)[:4] == words[:4]


def test_an_api_key_is_sent_and_not_written_down(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert options.checked(parsed("chat", "--rate", "1")).headers == ()
    for words in (["--api-key", "hush"], ["--api-key=hush"]):
        read = options.checked(parsed("chat", "--rate", "1", *words))
        assert read.headers == (("authorization", "Bearer hush"),)
        assert "hush" not in str(read.described())
        assert "hush" not in str(options.shown(words))
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    assert options.checked(parsed("chat", "--rate", "1")).headers == (("authorization", "Bearer other"),)
    assert options.checked(parsed("chat", "--rate", "1", "--header", "Authorization: x")).headers == (
        ("Authorization", "x"),
    )


def test_texts_that_nobody_knows_cannot_be_verified():
    with pytest.raises(SettingsError, match="--verify"):
        expected.of_engine("models/demo", {"engine": "vllm"})
    with pytest.raises(SettingsError, match="--verify"):
        expected.of_engine("", {})
