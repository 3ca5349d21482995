from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SettingsError
from shared.worker.sim.profile import Profile, interpolate, load_profile, shipped

PLAIN: dict[str, Any] = {
    "name": "plain",
    "model": "m",
    "hardware": "h",
    "source": "made up",
    "licence": "Apache-2.0",
    "kv_bytes_per_token": 2048,
    "max_model_len": 4096,
    "max_running": 64,
    "token_budget": 2048,
    "prefill_ms": [[10, 20.0], [100, 65.0], [200, 165.0]],
    "decode_ms": [[1, 10.0], [4, 16.0]],
    "context_prefill_ms": 0.001,
    "context_decode_ms": 0.01,
    "overlap_ms": 5.0,
}


def made(**changes: Any) -> Profile:
    return msgspec.convert({**PLAIN, **changes}, Profile)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1, 20.0),  # constant before the first knot
        (10, 20.0),
        (55, 42.5),
        (100, 65.0),
        (150, 115.0),
        (200, 165.0),
        (300, 265.0),  # the last slope goes on
    ],
)
def test_interpolation(x: float, expected: float) -> None:
    assert interpolate(made().prefill_ms, x) == pytest.approx(expected)


@pytest.mark.parametrize("x", [1, 7, 8, 9, 1000])
def test_a_single_knot_is_a_constant(x: float) -> None:
    assert interpolate([(8, 3.0)], x) == 3.0


@pytest.mark.parametrize(
    ("prefill", "decode", "expected_ms"),
    [
        ([], (0, 0), 0.0),
        ([], [], 0.0),
        ([(100, 0)], (0, 0), 65 + 0.001 * 100 * 50),
        ([(50, 0), (50, 0)], (0, 0), 65 + 0.001 * 2 * 50 * 25),  # two prompts do not look at each other
        ([(100, 400)], (0, 0), 65 + 0.001 * (100 * 400 + 100 * 50)),
        ([], (1, 300), 10 + 3),
        ([], [100, 200, 300, 400], 16 + 10),
        ([], (4, 1000), 16 + 10),
        ([], (7, 0), 22),
        ([(10, 0)], (1, 0), 20 + 0.05 + 10 - 5),
    ],
)
def test_step_times(prefill: list[tuple[int, int]], decode: list[int] | tuple[int, int], expected_ms: float) -> None:
    assert made().step_s(prefill, decode) == pytest.approx(expected_ms / 1e3)


def test_chunks_cost_the_same_pairs_as_the_whole() -> None:
    flat = made(prefill_ms=[[1, 1.0], [2, 2.0]])
    whole = flat.step_s([(1000, 0)])
    chunks = flat.step_s([(400, 0)]) + flat.step_s([(600, 400)])
    assert chunks == pytest.approx(whole)


def test_what_a_mixed_step_saves_is_never_more_than_either_part() -> None:
    profile = made(overlap_ms=1000.0)
    assert profile.step_s([(100, 0)], (1, 0)) == pytest.approx(profile.step_s([(100, 0)]))


@given(
    tokens=st.integers(1, 10_000),
    more=st.integers(0, 1000),
    before=st.integers(0, 10_000),
    sequences=st.integers(0, 200),
)
def test_more_work_never_takes_less_time(tokens: int, more: int, before: int, sequences: int) -> None:
    profile = made()
    contexts = [before] * sequences
    less = profile.step_s([(tokens, before)], contexts)
    assert profile.step_s([(tokens + more, before)], contexts) >= less
    assert profile.step_s([(tokens, before + more)], contexts) >= less
    assert profile.step_s([(tokens, before)], [*contexts, before]) >= less - 1e-12


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prefill_ms": [[10, 5.0], [10, 6.0]]}, "prefill_ms"),
        ({"prefill_ms": [[20, 5.0], [10, 6.0]]}, "prefill_ms"),
        ({"decode_ms": [[1, 5.0], [2, 4.0]]}, "decode_ms"),
        ({"decode_ms": [[1, 0.0]]}, "decode_ms"),
        ({"decode_ms": [[0, 1.0]]}, "decode_ms"),
        ({"decode_ms": []}, "decode_ms"),
        ({"overlap_ms": -1}, "overlap_ms"),
        ({"token_budget": 0}, "token_budget"),
        ({"model": 3}, "model"),
        ({"speed": 3}, "speed"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(msgspec.json.encode({**PLAIN, **changes}))
    with pytest.raises(SettingsError, match=names) as caught:
        load_profile(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"name": "x"}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"bad\.json"):
        load_profile(str(file))


def test_a_missing_file_and_an_unknown_name_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        load_profile(str(tmp_path / "none.json"))
    with pytest.raises(SettingsError, match=r"known are .*llama2-70b-h100"):
        load_profile("llama3")


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_load_and_are_in_order(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    assert profile.licence
    assert profile.validation is not None
    assert profile.validation.median_error < 0.15
    assert profile.step_s([(profile.token_budget, 0)]) > profile.step_s([], (1, 100)) > 0
