import gzip
import re
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.profiling.splitwise import KV_BYTES_PER_TOKEN, Row, choose, read_rows
from shared.worker.sim.profile import load_profile

HEADER = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time,"
    "tensor_parallel"
)


def prefill_ms(tokens: int) -> float:
    return 20 + 0.1 * tokens


def decode_ms(sequences: int) -> float:
    return 30 + 0.25 * sequences


def line(prompt: int, batch: int, hardware: str = "h100-80gb") -> str:
    first, step = prefill_ms(prompt * batch), decode_ms(batch)
    return f"llama2-70b,{hardware},{prompt},{batch},128,1,1,{first},{step},{first + 127 * step},8"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join((HEADER, *lines)) + "\n")
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    combinations = [(size, 1) for size in (128, 256, 512, 1024, 2048, 4096)] + [(512, n) for n in (2, 4, 8, 16, 32)]
    return write(tmp_path / "model.csv", *(line(*one) for one in combinations), line(512, 1, "a100-80gb"))


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr("sys.argv", ["loadtest", "profile", *map(str, argv)])
    return main()


def test_a_row_is_one_prefill_and_one_decode_step() -> None:
    row = Row(
        model="m",
        hardware="h",
        tensor_parallel=8,
        prompt_size=512,
        batch_size=4,
        prompt_time=100.0,
        token_time=10.0,
        e2e_time=1100.0,
    )
    prefill, decode = row.steps()
    assert (prefill.seconds, prefill.prefill) == (0.1, [(512, 0)] * 4)
    assert (decode.seconds, decode.sequences, decode.context) == (0.01, 4, 4 * (512 + 50))


def test_the_command_writes_a_profile_that_loads(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "llama.json", tmp_path / "llama.md"
    options = ("--model", "llama2-70b", "--out", out, "--report", report)
    assert run(monkeypatch, "--splitwise", published, *options) == 0
    profile = load_profile(str(out))
    assert profile.name == "llama"
    assert profile.hardware == "8 x h100-80gb"
    assert profile.kv_bytes_per_token == KV_BYTES_PER_TOKEN["llama2-70b"] == 327_680
    assert profile.step_s([(1500, 0)]) == pytest.approx(prefill_ms(1500) / 1e3, rel=0.02)
    assert profile.step_s([], (12, 12 * 576)) == pytest.approx(decode_ms(12) / 1e3, rel=0.03)
    assert profile.validation is not None
    assert profile.validation.steps == 2 * 9  # of eleven combinations all but the two at the edges
    assert profile.validation.median_error < 0.02
    assert "| 512 | 8 |" in report.read_text()
    assert "| 512 | 8 |" in capsys.readouterr().out


def test_packed_or_not_it_reads_the_same(published: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.csv.gz"
    packed.write_bytes(gzip.compress(published.read_bytes()))
    assert read_rows(packed) == read_rows(published)


def test_rows_are_chosen_by_all_three(published: Path) -> None:
    assert len(choose(read_rows(published), "llama2-70b", "a100-80gb", 8)) == 1


BAD = [
    ("a,b\n1,2\n", "line 1: no column"),
    (f"{HEADER}\n{line(128, 1)}\nllama2-70b,h100-80gb,x,1,128,1,1,5,5,50,8\n", "line 3: .*prompt_size"),
    (f"{HEADER}\nllama2-70b,h100-80gb,128,1,128,1,1,-5,5,50,8\n", "line 2: prompt_time is -5"),
    (f"{HEADER}\nllama2-70b,h100-80gb,128,1,128,1,1,nan,5,50,8\n", "line 2: prompt_time is nan"),
    (f"{HEADER}\nllama2-70b,h100-80gb,128\n", "line 2"),
    (f"{HEADER}\n", "there are: none at all"),
    (f"{HEADER}\n{line(128, 1, 'b200')}\n", "there are: llama2-70b b200 8"),
    ("", "line 1: no column"),
]


@pytest.mark.parametrize(("content", "says"), BAD)
def test_a_malformed_file_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    out = tmp_path / "p.json"
    assert run(monkeypatch, "--splitwise", file, "--model", "llama2-70b", "--out", out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("profile: ")
    assert re.search(says, said)
    assert not out.exists()


@pytest.mark.parametrize(
    "content", [b"\x1f\x8bnothing packed", b"\xff\xfe", b"\x1f\x8b\x08\x00", b"model\x00,\r\r\n\x00"]
)
def test_a_file_of_other_bytes_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "bad.csv.gz"
    file.write_bytes(content)
    assert run(monkeypatch, "--splitwise", file, "--model", "llama2-70b", "--out", tmp_path / "p.json") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--splitwise", "none.csv", "--model", "llama2-70b", "--out", "p.json"), "--splitwise none.csv: cannot read"),
        (("--model", "none", "--out", "p.json"), "--model none: there is no config.json"),
        (("--model", "none", "--out", "no/p.json"), "--out no/p.json: there is no folder no"),
        (("--model", "here", "--out", "p"), "--out p: name it NAME.json"),
        (("--model", "here", "--out", "here"), "--out here: is a folder"),
        (("--model", "here", "--out", "p.json", "--engine-arg", "dtype"), "--engine-arg dtype: write it as KEY=VALUE"),
        (("--model", "here", "--out", "p.json", "--cores", "x"), "cpu_cores"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    says: str,
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *options) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
