"""The page opens from disk and loads nothing; what users wrote is text in it; what cannot be read is named in a line."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from loadtest.report import write
from loadtest.report.page import FOLDER
from loadtest.report.series import POINTS
from shared.errors import SettingsError
from tests.support.made_results import made_result, write_result

HOSTILE = '</script><script>alert(1)</script> & "quoted" <!-- <b>bold</b> {{ 7 * 7 }}'
UGLY = {
    "plain": {},
    "all shed": {"shed_share": 1.0},
    "all failed": {"error_share": 1.0},
    "no stages": {"stages": False},
    "one request": {"requests": 1, "seconds": 1.0},
    "no request": {"requests": 0},
    "nulls": {"null_share": 0.7, "shed_share": 0.1},
    "real engines": {"engine": "vllm"},
    "engine not known": {"engine": "unknown"},
}


class Seen(HTMLParser):
    """Elements, what they would load, and the page's data."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.data = ""
        self._into = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self._into = told.get("id", "script")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._into = ""

    def handle_data(self, data):
        if self._into == "charts":
            self.data += data
        elif self._into:
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    """Writes results and gives the page about them."""

    def make(*results):
        folders = [write_result(tmp_path / f"run-{number}", result) for number, result in enumerate(results)]
        path = write(folders, tmp_path / "page.html")
        return path.read_text()

    return make


@pytest.mark.parametrize("how", UGLY.values(), ids=UGLY)
def test_every_kind_of_run_gives_a_sound_page(page, how):
    text = page(made_result(**how))
    seen = Seen(text)
    charts = json.loads(seen.data)
    assert seen.open == []
    assert charts
    for chart in charts:
        assert len(chart["columns"]) == len(chart["series"]) + 1
        assert len({len(column) for column in chart["columns"]}) == 1
        xs = chart["columns"][0]
        assert xs == sorted(xs)
        assert chart["x"]["label"]
        assert chart["y"]["label"]
    for number in range(len(charts)):
        assert text.count(f'data-chart="{number}"') <= 1


@pytest.mark.parametrize("how", UGLY.values(), ids=UGLY)
def test_every_kind_of_run_can_be_compared(page, how):
    seen = Seen(page(made_result(), made_result(seed=2, **how)))
    assert json.loads(seen.data)
    assert seen.open == []


@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_loads_nothing_and_runs_only_its_own_scripts(page, runs):
    text = page(*(made_result(seed=seed) for seed in range(runs)))
    seen = Seen(text)
    assert seen.loads == []
    assert "@import" not in text
    assert "url(" not in (FOLDER / "assets/page.css").read_text()
    assert len(seen.scripts) == text.count("'sha256-") == 2
    assert "default-src 'none'" in text


def test_what_users_wrote_is_text(page):
    hostile = made_result(name=HOSTILE, settings={"note": HOSTILE, "command": ["run", HOSTILE]})
    hostile["target"]["model"] = hostile["target"]["arrangement"] = HOSTILE
    hostile["summary"]["shed"] = {HOSTILE: 3}
    hostile["levels"]["series"][HOSTILE] = hostile["levels"]["series"]["queue_depth"]
    hostile["requests"]["stages"][HOSTILE] = hostile["requests"]["stages"].pop("queue")
    for text in (page(hostile), page(hostile, made_result(seed=2))):
        seen = Seen(text)
        assert len(seen.scripts) == 2
        assert seen.open == []
        assert "alert(1)</script>" not in text
        assert HOSTILE in seen.texts
        assert any(HOSTILE in str(chart) for chart in [chart["title"] for chart in json.loads(seen.data)])


def test_a_page_says_which_engine_ran(page):
    assert "engine: sim (llama2-70b-h100)" in page(made_result())
    assert "engine: vLLM" in page(made_result(engine="vllm"))
    both = page(made_result(), made_result(engine="vllm"))
    assert "engine: sim (llama2-70b-h100)" in both
    assert "engine: vLLM" in both


def test_a_long_run_stays_a_small_page(page):
    long_run = made_result(requests=20_000, seconds=7200.0)
    for text in (page(long_run), page(long_run, long_run)):
        assert len(text.encode()) < 2_000_000
        charts = json.loads(Seen(text).data)
        assert max(len(column) for chart in charts for column in chart["columns"]) <= POINTS


def test_equal_folder_names_are_told_apart(tmp_path):
    folders = [write_result(tmp_path / part / "chat", made_result()) for part in ("a", "b")]
    text = write(folders, tmp_path / "page.html").read_text()
    assert "chat (1)" in text
    assert "chat (2)" in text


def test_the_page_lies_beside_the_one_run(tmp_path):
    folder = write_result(tmp_path / "chat", made_result())
    assert write([folder]) == folder / "report.html"


def malformed(tmp_path, change):
    made = made_result(requests=3, seconds=2.0)
    change(made)
    return write_result(tmp_path / "bad", made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.update(schema=2), ["schema is 2"]),
        (lambda made: made.pop("schema"), ["schema"]),
        (lambda made: made["summary"].pop("goodput_per_s"), ["goodput_per_s", "$.summary"]),
        (lambda made: made["requests"].update(ttft_s=["slow"]), ["$.requests.ttft_s"]),
        (lambda made: made["requests"].update(ttft_s=[0.1]), ["requests.ttft_s has 1 entries"]),
        (lambda made: made["requests"]["stages"].update(queue=[0.1]), ["requests.stages.queue has 1 entries"]),
        (lambda made: made["timeline"].update(good=[]), ["timeline.good has 0 entries"]),
        (lambda made: made["levels"]["series"].update(queue_depth=[]), ["levels.series.queue_depth has 0 entries"]),
        (lambda made: made["timeline"].update(bucket_s=0.0), ["timeline.bucket_s"]),
        (lambda made: made["timeline"].update(t_s=[1.0, 0.0]), ["timeline.t_s does not ascend"]),
        (lambda made: made["levels"].update(t_s=[0.0, 0.0]), ["levels.t_s does not ascend"]),
    ],
)
def test_a_malformed_result_is_refused_by_file_and_field(tmp_path, change, words):
    folder = malformed(tmp_path, change)
    with pytest.raises(SettingsError) as refused:
        write([folder], tmp_path / "page.html")
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder / "result.json") in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": "1"}', b"null", b"[" * 100_000])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"result\.json"):
        write([tmp_path])


def test_too_many_runs_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="at most 6"):
        write([tmp_path] * 7)


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    folder = write_result(tmp_path / "chat", made_result(requests=1))
    with pytest.raises(SettingsError, match="cannot be written"):
        write([folder], tmp_path / "missing" / "page.html")


def test_the_command_ends_in_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "loadtest", "report", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "none") in done.stderr
