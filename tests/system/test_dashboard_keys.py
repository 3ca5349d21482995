"""The dashboard of a cluster that wants keys, in a real browser."""

import re

from playwright.sync_api import expect

from shared.access import key_file
from shared.access.key import Key, digest, new_secret
from tests.support.browser import WAIT_MS, Complaints, chromium
from tests.support.cluster import running_cluster

OPTIONS = ("--engine", "sim", "--sim-speed", "10", "--prefill", "1", "--decode", "1", "--arena-gib", "0.1")


def test_it_asks_for_the_key_and_keeps_it_nowhere(tmp_path):
    secret, path = new_secret(), tmp_path / "keys.yaml"
    key_file.change(path, lambda keys: [*keys, Key(id="key-1", tenant="acme", hash=digest(secret))])
    with chromium() as browser, running_cluster(tmp_path, *OPTIONS, "--keys", str(path)) as cluster:
        page = browser.new_page()
        complaints = Complaints(page, cluster.url)
        page.goto(f"{cluster.url}/dashboard")
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_be_visible()
        assert not complaints.found  # nothing was tried without a key
        page.keyboard.press("Escape")
        expect(dialog).to_be_visible()

        page.get_by_label("Key", exact=True).fill("sk-baton-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("the API key is wrong, or was revoked")
        page.get_by_label("Key", exact=True).fill(secret)
        page.get_by_role("button", name="Open").click()
        expect(page.locator("#status")).to_have_text("live")
        expect(dialog).to_be_hidden()

        page.get_by_label("Message").fill("What is Baton?")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-log .note")).to_have_text(re.compile("first token"), timeout=60_000)
        expect(page.locator("#requests tbody tr").first).to_contain_text("acme")
        stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert stored == [0, 0, "", f"{cluster.url}/dashboard"]
        assert secret not in page.content()
        assert [text for text in complaints.found if "401" not in text] == []

        key_file.change(path, lambda _: [])
        expect(dialog).to_be_visible(timeout=WAIT_MS)
        expect(page.locator("#key-error")).to_have_text("the API key is wrong, or was revoked")
