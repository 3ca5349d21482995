"""The dashboard in a real browser over a real cluster with the sim engine, as an operator uses it."""

import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support.browser import Complaints, chromium
from tests.support.cluster import Cluster, running_cluster

OPTIONS = ("--engine", "sim", "--sim-speed", "10", "--arrangement", "split", "--prefill", "1", "--decode", "2")
WIDTHS = ((1280, "light"), (1280, "dark"), (400, "light"), (400, "dark"))
CHAT = "/v1/chat/completions"
ROWS = "#requests tbody tr"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("dashboard"), *OPTIONS, "--arena-gib", "0.1") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@contextmanager
def opened(browser: Browser, cluster: Cluster, width: int = 1280, scheme: str = "light"):
    """A live page, which must not complain of anything."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints = Complaints(page, cluster.url)
    page.goto(f"{cluster.url}/dashboard")
    expect(page.locator("#status")).to_have_text("live")
    yield page
    assert not complaints.found
    page.close()


def ask(cluster: Cluster, request_id: str, tokens: int = 8) -> None:
    body = {
        "model": "baton-demo",
        "messages": [{"role": "user", "content": f"hello from {request_id}"}],
        "max_tokens": tokens,
    }
    httpx.post(f"{cluster.url}{CHAT}", json=body, headers={"x-request-id": request_id}, timeout=60).raise_for_status()


def colour(page: Page, selector: str, of: str = "color") -> str:
    return str(page.eval_on_selector(selector, f"element => getComputedStyle(element).{of}"))


def variable(page: Page, name: str) -> str:
    """A colour of the page, as the browser writes colours."""
    return str(
        page.evaluate(
            """name => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(${name})`;
                const found = getComputedStyle(probe).color;
                probe.remove();
                return found;
            }""",
            name,
        )
    )


def test_requests_are_shown_as_they_end(browser, cluster):
    with opened(browser, cluster) as page:
        expect(page.locator("#model")).to_have_text("baton-demo")
        expect(page.locator('[data-service="prefill-0"].is-ready')).to_be_visible()
        for number in range(3):
            ask(cluster, f"shown-{number}")
        expect(page.locator(ROWS).first).to_contain_text("shown-2")
        expect(page.locator(ROWS)).to_have_count(3)
        page.get_by_role("button", name="Failed").click()
        expect(page.locator("#no-requests")).to_have_text("None of the last requests failed.")
        body = {"model": "another", "messages": [{"role": "user", "content": "hello"}]}
        httpx.post(f"{cluster.url}{CHAT}", json=body, headers={"x-request-id": "fails"})
        expect(page.locator(ROWS)).to_contain_text("client error")
        tile = page.locator("#headline > div", has_text="Shed and failed")
        expect(tile).to_contain_text("of 4, 15 min")
        expect(page.locator(".chart", has_text="Time to first token").locator("svg path").first).to_be_attached()


def test_a_request_opens_as_a_waterfall_by_keyboard_and_by_mouse(browser, cluster):
    ask(cluster, "opened-0")
    with opened(browser, cluster) as page:
        row = page.locator(ROWS, has_text="opened-0")
        row.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        expect(dialog.get_by_role("heading")).to_have_text("Request opened-0")
        for span in ("gateway.request", "gateway.queue", "prefill.job", "decode.job"):
            expect(dialog.locator(".span", has_text=span)).to_be_visible()
        expect(dialog.locator(".more:visible")).to_have_count(0)
        dialog.locator(".span", has_text="decode.job").press("Enter")
        expect(dialog.locator(".more:visible")).to_contain_text("decode-")
        dialog.get_by_role("button", name="Until the first token").click()
        expect(dialog.locator(".span", has_text="prefill.job")).to_be_visible()
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        assert page.evaluate("document.activeElement.dataset.trace") == row.get_attribute("data-trace")
        page.get_by_role("button", name="Slowest").click()
        page.locator(ROWS).first.click()
        expect(dialog).to_be_visible()
        page.get_by_role("button", name="Close").click()
        expect(dialog).to_be_hidden()


def test_the_chat_box_streams(browser, cluster):
    with opened(browser, cluster) as page:
        page.evaluate(
            """() => {
                window.lengths = new Set();
                new MutationObserver(() => window.lengths.add(document.querySelector("#chat-log .assistant")?.textContent.length))
                    .observe(document.querySelector("#chat-log"), { childList: true, subtree: true, characterData: true });
            }"""
        )
        page.get_by_label("Message").fill("What is Baton?")
        page.keyboard.press("Enter")
        note = page.locator("#chat-log .note")
        expect(note).to_have_text(re.compile(r"first token .* tokens .* split: prefill-0 → decode-\d"), timeout=60_000)
        assert page.evaluate("window.lengths.size") > 10
        assert len(page.locator("#chat-log .assistant").inner_text()) > 20
        expect(page.locator("#chat-log .user")).to_have_text("What is Baton?")
        page.route(f"**{CHAT}", lambda _: None)  # the next answer does not come before it is stopped
        page.get_by_label("Message").fill("Go on")
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        expect(note.nth(1)).to_have_text("stopped")
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#chat-log p")).to_have_count(0)


def test_a_killed_worker_turns_red_and_its_return_is_told(browser, cluster):
    with opened(browser, cluster) as page:
        row = '[data-service="decode-1"]'
        expect(page.locator(row + ".is-ready")).to_be_visible()
        os.kill(cluster.pid("decode-1"), signal.SIGKILL)
        expect(page.locator(row + ".is-lost")).to_be_visible()
        assert colour(page, row + " .state") == variable(page, "--bad") != variable(page, "--ink")
        expect(page.locator("#health")).to_have_text("lost: decode-1")
        expect(page.locator(row + ".is-ready")).to_contain_text("was lost")


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_it_fits_at_any_width_in_light_and_dark(browser, cluster, width, scheme, tmp_path):
    ask(cluster, "a-request-id-that-is-rather-long-and-has-no-end-" + "x" * 60)
    with opened(browser, cluster, width, scheme) as page:
        expect(page.locator(ROWS).first).to_contain_text("a-request-id")

        def overhang() -> int:
            return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))

        assert overhang() <= 0
        inside = "parts => parts.every(part => part.scrollWidth <= part.clientWidth)"
        assert page.eval_on_selector_all(".group", inside)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.locator(ROWS).first.click()
        page.locator("#trace .span").first.click()
        assert overhang() <= 0
        assert page.eval_on_selector("#trace", "element => element.scrollWidth - element.clientWidth") <= 0
        page.screenshot(path=tmp_path / "trace.png")
        dark = scheme == "dark"
        assert (sum(int(part) for part in re.findall(r"\d+", colour(page, "body", "color"))[:3]) > 400) is dark
    assert Path(tmp_path / "page.png").stat().st_size > 10_000


def test_it_says_that_the_gateway_is_gone_and_comes_back_by_itself(browser, cluster):
    page = browser.new_page()
    page.goto(f"{cluster.url}/dashboard")
    status = page.locator("#status")
    expect(status).to_have_text("live")
    page.evaluate(
        """() => {
            window.said = [];
            new MutationObserver(() => window.said.push(document.querySelector("#status").textContent))
                .observe(document.querySelector("#status"), { childList: true, characterData: true, subtree: true });
        }"""
    )
    os.kill(cluster.pid("gateway-0"), signal.SIGKILL)
    expect(status).not_to_have_text("live")
    assert "stale" in (page.locator("#main").get_attribute("class") or "")
    expect(status).to_have_text("live", timeout=60_000)
    assert any("gone since" in text for text in page.evaluate("window.said"))
    assert page.locator("#main").get_attribute("class") == ""
    ask(cluster, "after")
    expect(page.locator(ROWS).first).to_contain_text("after")
    page.close()
