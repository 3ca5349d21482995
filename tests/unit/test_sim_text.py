"""Which token comes next, how it reads, where a choice ends; the oracle; and what engine arguments may be."""

from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from shared import wire
from shared.errors import SettingsError
from shared.worker.sim.arguments import resolve
from shared.worker.sim.oracle import Oracle
from shared.worker.sim.text import Stops, TokenSampler, TokenTable
from tests.support.tiny_tokenizer import make_folder

DEMO = Path(__file__).parents[2] / "models" / "demo"
PROMPT = list(range(50, 150))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load(str(DEMO))


def test_tokens_of_the_table_read_the_same_wherever_they_stand() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    table = TokenTable.of(tokenizer, 2000)
    assert table.size > 500
    assert all(text.isprintable() for text in table.texts)
    assert not set(table.ids) & set(tokenizer.get_added_tokens_decoder())
    order = [index * 7919 % table.size for index in range(3000)]
    decoded = tokenizer.decode([table.ids[index] for index in order], skip_special_tokens=False)
    assert decoded == "".join(table.texts[index] for index in order)


def test_a_tokeniser_without_printable_tokens_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokenizer.get_vocab()))
    with pytest.raises(SettingsError, match="no printable token"):
        TokenTable.of(tokenizer, 10)


def table_of(*texts: str) -> TokenTable:
    return TokenTable(list(range(len(texts))), list(texts), len(texts))


def test_the_next_token_depends_on_state_excess_seed_and_choice() -> None:
    table = table_of(*map(str, range(1000)))
    plain = wire.Sampling(max_tokens=1)

    def ten(sampling: wire.Sampling, choice: int = 0, excess: int = 0) -> list[int]:
        sampler = TokenSampler(table, sampling, choice)
        return [sampler.next(state * 7, excess) for state in range(10)]

    variants = [ten(plain), ten(plain, 1), ten(plain, 0, 1), ten(msgspec.structs.replace(plain, seed=1))]
    assert len({tuple(variant) for variant in variants}) == 4
    assert ten(plain) == ten(msgspec.structs.replace(plain, seed=0, temperature=2.0, top_p=0.1))


def test_below_min_tokens_no_stop_token_is_drawn() -> None:
    table = table_of("a", "b", "c")
    sampler = TokenSampler(table, wire.Sampling(max_tokens=1, stop_token_ids=[0, 2]), 0)
    assert {sampler.next(state, 0, may_stop=False) for state in range(50)} == {1}
    assert {sampler.next(state * 977, 0) for state in range(50)} == {0, 1, 2}
    hopeless = TokenSampler(table, wire.Sampling(max_tokens=1, stop_token_ids=[0, 1, 2]), 0)
    assert hopeless.next(5, 0, may_stop=False) in (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "pieces", "texts", "reason"),
    [
        ({"stop": ["end"]}, ["a", "b", "c"], ["", "", "abc"], "length"),  # two characters are held back
        ({"stop": ["end"]}, ["abcd", "en", "d", "x"], ["ab", "cd", ""], "end"),
        ({"stop": ["end"]}, ["abcd", "en", "x"], ["ab", "cd", "enx"], "length"),
        ({"stop": ["end"], "include_stop_str_in_output": True}, ["ab", "en", "d!", "x"], ["ab", "en", "d"], "end"),
        ({"stop": ["cd", "abc"]}, ["ab", "cde"], ["", ""], "abc"),  # complete earlier
        ({"stop": ["b"], "min_tokens": 2}, ["b", "b", "ab"], ["b", "b", "a"], "b"),
        ({"stop_token_ids": [1]}, ["a", "b", "c"], ["a", ""], 1),
        ({"stop_token_ids": [1], "include_stop_str_in_output": True}, ["a", "b"], ["a", "b"], 1),
    ],
)
def test_stops(options: dict[str, object], pieces: list[str], texts: list[str], reason: object) -> None:
    stops = Stops(wire.Sampling(max_tokens=len(pieces), **options))  # type: ignore[arg-type]
    found, finish = [], None
    for token, piece in enumerate(pieces):
        ending = stops.push(token, piece, is_last=token == len(pieces) - 1)
        found.append(ending.text)
        if ending.finish is not None:
            finish = ending.finish
            break
    assert found == texts
    expected = wire.Finish(reason="length") if reason == "length" else wire.Finish(reason="stop", stop_reason=reason)
    assert finish == expected


# ---- oracle ---------------------------------------------------------------------------------------------------------


def test_an_answer_begins_like_a_longer_one(oracle: Oracle) -> None:
    whole = oracle.expected_tokens(PROMPT, 80)
    assert oracle.expected_tokens(PROMPT, 30) == whole[:30]
    assert len(set(whole)) > 40


@pytest.mark.parametrize("cut", [1, 28, 29, 60])
def test_an_answer_goes_on_from_what_was_said(oracle: Oracle, cut: int) -> None:
    """So a stream that is resumed elsewhere, with its tokens as prompt, ends with the same text."""
    whole = oracle.expected_tokens(PROMPT, 80)
    assert oracle.expected_tokens([*PROMPT, *whole[:cut]], 80 - cut) == whole[cut:]


def test_the_text_is_its_tokens(oracle: Oracle) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokens = oracle.expected_tokens(PROMPT, 50)
    assert oracle.expected_text(PROMPT, 50) == tokenizer.decode(tokens)


def test_only_a_sim_engine_can_be_predicted() -> None:
    with pytest.raises(SettingsError, match="engine vllm cannot be predicted"):
        Oracle.of_engine(str(DEMO), {"engine": "vllm", "max_model_len": "1024", "dtype": "bfloat16"})


def test_an_answer_ends_at_its_limits(oracle: Oracle) -> None:
    short = Oracle.load(str(DEMO), engine_args={"max_model_len": 110})
    assert len(short.expected_tokens(PROMPT, 80)) == 10
    text = oracle.expected_text(PROMPT, 40)
    stopped = oracle.answer(PROMPT, wire.Sampling(max_tokens=40, stop=[text[20:24]]))
    assert stopped.text == text[: text.index(text[20:24])]
    assert stopped.finish.stop_reason == text[20:24]


# ---- engine arguments -----------------------------------------------------------------------------------------------


def test_what_is_not_given_is_the_profiles() -> None:
    shape = resolve({}, has_kv=True)
    assert (shape.max_model_len, shape.max_running, shape.token_budget) == (
        shape.profile.max_model_len,
        shape.profile.max_running,
        shape.profile.token_budget,
    )
    assert (shape.block_size, shape.token_bytes, shape.slot_bytes) == (32, 2048, 32 * 2048)
    assert resolve({}, has_kv=False).slot_bytes == 64


def test_arguments_come_as_text_too() -> None:
    shape = resolve({"max_model_len": "4096", "max_num_seqs": 7, "kv_bytes_per_token": "true"}, has_kv=True)
    assert (shape.max_model_len, shape.max_running) == (4096, 7)
    assert shape.token_bytes == shape.profile.kv_bytes_per_token
    assert resolve({"kv_bytes_per_token": True}, has_kv=True).token_bytes == shape.token_bytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "float32"}, "dtype: not one of the sim engine's, which are profile, max_model_len"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": "long"}, "max_model_len"),
        ({"kv_bytes_per_token": 100}, "multiple of 8"),
        ({"kv_bytes_per_token": 0}, "multiple of 8"),
        ({"kv_bytes_per_token": "much"}, "or true"),
        ({"profile": "llama9"}, "known are"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve(arguments, has_kv=True)


def test_engines_that_differ_in_what_matters_do_not_share_blocks() -> None:
    def fingerprint(has_kv: bool = True, **arguments: object) -> str:
        return resolve(arguments, has_kv=has_kv).fingerprint("/models/demo", 2000)

    assert fingerprint() == fingerprint(max_num_seqs=3, max_model_len=100)
    different = {
        fingerprint(),
        fingerprint(has_kv=False),
        fingerprint(block_size=16),
        fingerprint(kv_bytes_per_token=64),
        fingerprint(profile="llama2-70b-a100"),
        resolve({}, has_kv=True).fingerprint("/models/other", 2000),
    }
    assert len(different) == 6
