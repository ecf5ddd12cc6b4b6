"""The console in a real browser, through the whole story, by mouse and by keyboard; screenshots on the way.

Not part of `make test`, because it needs a browser: `make console-test`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, FilePayload, Page, Playwright, expect, sync_playwright

from tests.fixtures.keylake_command import KeylakeCommand, running_console

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

PICTURES = os.environ.get("KEYLAKE_PICTURES")
"""A directory for screenshots; none are kept without."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    keylake = KeylakeCommand(tmp_path_factory.mktemp("home") / "k", tmp_path_factory.mktemp("cwd"))
    keylake("up", "--links")
    try:
        with running_console(keylake) as address:
            yield address
    finally:
        keylake.run("down", "--purge", "--yes")


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    assert found is not None, "no browser: apt-get install chromium"
    browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(address)
    expect(page.locator("#connection")).to_have_text("live", timeout=60_000)
    yield page
    page.close()
    # A button that a role may not press is a refusal by HTTP, which browsers log.
    assert [each for each in problems if "Failed to load resource" not in each] == []


def picture(page: Page, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def do(page: Page) -> None:
    page.locator("#tour-do").click()


def onward(page: Page, title: str) -> None:
    page.locator("#tour-next").click()
    expect(page.locator("#tour-title")).to_contain_text(title)


def done(page: Page) -> None:
    expect(page.locator("#tour-wait")).to_have_text("✓ done", timeout=60_000)


def check_receipt(page: Page, content: bytes, told: str) -> None:
    page.get_by_label("Is a receipt genuine?").set_input_files(
        FilePayload(name="receipt.json", mimeType="application/json", buffer=content)
    )
    expect(page.locator("#receipt-result")).to_contain_text(told, timeout=60_000)


def wear(page: Page, hat: str) -> None:
    page.get_by_role("radio", name=hat, exact=True).check()


def test_the_guided_tour_from_a_key_to_its_loss_and_back(page: Page) -> None:
    page.get_by_role("button", name="Guided tour").click()
    expect(page.locator("#tour-title")).to_contain_text("The parts")
    onward(page, "A database")
    page.get_by_role("button", name="Make a project called demo").click()
    done(page)
    onward(page, "Some data")
    expect(page.locator("#sql-endpoint option")).to_have_count(1, timeout=60_000)  # it comes after its project
    do(page)
    done(page)
    expect(page.locator("#keys")).to_contain_text("KEKs: this role may not see them.")
    expect(page.locator("#node-compute")).to_contain_text(re.compile(r"oldest boot key: \d+ s"))
    expect(page.locator("#keys [data-since]")).to_have_text(re.compile(r"\d+ s old"))
    onward(page, "What a thief gets")
    do(page)
    page.get_by_label("Find in all of them").fill("treasure")
    page.get_by_label("Find in all of them").press("Enter")
    expect(page.locator("#stored-hex")).to_contain_text("not found", timeout=60_000)
    page.locator("#stored-list button").first.click()
    expect(page.locator("#stored-hex")).to_contain_text("00000000")
    long = page.locator("#stored-list tr", has=page.locator("td", has_text=re.compile(r"^\d{5,}$"))).first
    long.get_by_role("button").click()
    expect(page.locator("#stored-hex")).to_contain_text(long.get_by_role("button").inner_text())
    page.get_by_role("button", name="Bytes after").click()
    expect(page.locator("#stored-hex")).to_contain_text("00000400")
    page.get_by_role("button", name="Bytes before").click()
    expect(page.locator("#stored-hex")).to_contain_text("00000000")
    picture(page, "stored")
    onward(page, "The customer takes the key away")
    page.locator("#customer [data-action='key.disable']").wait_for()
    do(page)
    done(page)
    onward(page, "Sealed")
    done(page)
    expect(page.locator("#revocations")).to_contain_text("sealed everywhere after", timeout=60_000)
    page.locator("#picture").scroll_into_view_if_needed()
    picture(page, "sealed")
    with page.expect_download() as download:
        page.get_by_role("button", name="Signed receipt").first.click()
    receipt = Path(download.value.path()).read_bytes()
    check_receipt(page, receipt, "Genuine. Signed by keymanager")
    check_receipt(page, receipt.replace(b"REVOKED", b"SHREDDED"), "Not genuine")
    onward(page, "Nobody gets in")
    do(page)
    done(page)
    onward(page, "And gives it back")
    page.locator("#customer [data-action='key.enable']").wait_for()
    do(page)
    done(page)
    onward(page, "Nothing is lost")
    expect(page.locator("#keys .state.ACTIVE").first).to_be_visible(timeout=60_000)
    do(page)
    done(page)
    onward(page, "Two records of it")
    do(page)
    expect(page.locator("#log-ours")).to_contain_text("project.revoking", timeout=60_000)
    expect(page.locator("#log-theirs")).to_contain_text("DisableKey", timeout=60_000)
    picture(page, "logs")
    page.locator("#tour-next").click()
    expect(page.locator("#tour")).to_be_hidden()


WATCH = """() => {
  window.flowed = new Set();
  const seen = (changes) => changes.forEach(({ target }) => target.classList.contains("flow") && flowed.add(target.id));
  new MutationObserver(seen).observe(document.getElementById("diagram"), { subtree: true, attributeFilter: ["class"] });
}"""
WORK = """async () => {
  const { post } = await import("/static/api.js");
  const endpoint_id = document.getElementById("sql-endpoint").value;
  await post("act", { hat: "workspace-admin", action: "endpoint.kill", target: endpoint_id });
  const sql = "insert into notes values ('and so do the pages')";
  return (await post("sql", { hat: "data-user", endpoint_id, sql })).status;
}"""
SEEN = """(edges) => new Promise((done) => {
  const look = () => (edges.every((edge) => flowed.has(edge)) ? done(true) : setTimeout(look, 100));
  setTimeout(() => done([...flowed].join()), 60000);
  look();
})"""


def test_pages_and_wal_flow_in_the_picture(page: Page) -> None:
    """While somebody else is at work: another compute starts from the pageserver's pages, and writes WAL."""
    wear(page, "auditor")
    pageserver = page.locator("#node-pageserver")
    expect(pageserver).to_contain_text(re.compile(r"\d+ pages, \d redo workers"), timeout=60_000)
    expect(pageserver).to_contain_text(re.compile(r"\d leases?: \d\.\d s"), timeout=60_000)
    ring = pageserver.locator(".left").get_attribute("stroke-dasharray") or ""
    expect(pageserver.locator(".left")).not_to_have_attribute("stroke-dasharray", ring)
    expect(page.locator("#sql-endpoint option")).to_have_count(1, timeout=60_000)
    page.evaluate(WATCH)
    assert page.evaluate(WORK) == "INSERT 0 1"
    assert page.evaluate(SEEN, ["edge-pages", "edge-wal", "edge-ingest"]) is True


def test_the_operator_pulls_a_cable(page: Page) -> None:
    wear(page, "operator")
    expect(page.locator("#keys")).to_contain_text("no keys, and no data")
    page.locator("#network [data-key='link.cut:keymanager/pageserver']").click()
    expect(page.locator("#edge-leases-pageserver")).to_have_class("edge cut", timeout=60_000)
    expect(page.locator("#diagram text.cut")).to_have_text("cut: keymanager from pageserver")
    expect(page.locator("#edge-pages")).not_to_have_class("edge cut")
    page.locator("#picture").scroll_into_view_if_needed()
    picture(page, "cut")
    page.get_by_role("button", name="Heal all").click()
    expect(page.locator("#diagram text.cut")).to_be_empty(timeout=60_000)
    expect(page.locator("#edge-leases-pageserver")).not_to_have_class("edge cut")


FOCUS = """() => {
  const element = document.activeElement;
  const { outlineStyle, outlineWidth } = getComputedStyle(element);
  const name = element.id || element.dataset.key || element.textContent.trim();
  return { name, shown: element === document.body || (outlineStyle !== "none" && outlineWidth !== "0px") };
}"""
CONTROLS = """() => [...document.querySelectorAll("button, input, select, textarea, a[href]")]
  .filter((each) => each.offsetParent && !each.disabled && each.type !== "radio")
  .map((each) => each.id || each.dataset.key || each.textContent.trim())"""


@pytest.mark.parametrize(
    ("hat", "own"),
    [
        ("customer", "#customer [data-action='key.disable']"),
        ("security admin", "#keys [data-action='project.revoke']"),
        ("workspace admin", "#keys [data-action='endpoint.kill']"),
        ("operator", "#network [data-key]"),
    ],
)
def test_the_tab_key_gets_to_every_control_and_shows_where_it_is(page: Page, hat: str, own: str) -> None:
    wear(page, hat)
    page.locator(own).first.wait_for()
    wanted = set(page.evaluate(CONTROLS))
    reached = set[str]()
    for _ in range(2 * len(wanted) + 20):  # once around, with what only scrolls
        page.keyboard.press("Tab")
        here = page.evaluate(FOCUS)
        assert here["shown"], here
        reached.add(here["name"])
    assert wanted <= reached, wanted - reached


def test_a_hat_and_a_button_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.locator("#hats input:checked").press("ArrowLeft")
    expect(page.locator("#hats input:checked")).to_be_focused()
    page.locator("#hats input[value='security-admin']").focus()
    page.keyboard.press("Space")
    rotate = page.get_by_role("button", name="Rotate KEK")
    rotate.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#keys")).to_contain_text("KEK version 2", timeout=60_000)
    expect(page.locator("#keys")).to_contain_text(re.compile(r"[1-9]\d* DEKs in use, for \d+\.\d MiB"), timeout=60_000)
    expect(rotate).to_be_focused()


FAINT = """() => {
  const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const channel = (value) => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *:not(svg *, script, option)")]
    .filter((each) => each.offsetParent && own(each) && !each.disabled)
    .map((each) => {
      const both = [rgb(getComputedStyle(each).color), ground(each)].map(luminance).sort((a, b) => b - a);
      const what = `${each.tagName} .${each.className} ${each.textContent.trim().slice(0, 30)}`;
      return [(both[0] + 0.05) / (both[1] + 0.05), what];
    })
    .filter(([contrast]) => contrast < 4.5)
    .map(([contrast, what]) => `${contrast.toFixed(1)}: ${what}`);
}"""
"""Text with less contrast than 4.5 : 1 (WCAG 2.2, 1.4.3), but for the picture's and of what cannot be pressed."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_by_day_and_by_night(browser: Browser, address: str, scheme: Literal["light", "dark"]) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 800}, color_scheme=scheme, reduced_motion="reduce", has_touch=True
    )
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#connection")).to_have_text("live", timeout=60_000)
    for hat, own in {
        "customer": "#customer [data-action]",
        "security admin": "#keys [data-action]",
        "auditor": "#keys",
    }.items():
        page.locator("#hats label").filter(has_text=re.compile(f"^{hat}$")).tap()
        page.locator(own).first.wait_for()
        # Parts that scroll by themselves may be wider; the page may not.
        too_wide = page.locator("body").evaluate(
            "body => [...body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll, pre')).map(e => `${e.tagName} #${e.id} .${e.className}`)"
        )
        assert too_wide == [], hat
        assert page.locator("body").evaluate("body => body.scrollWidth <= innerWidth"), hat
        assert page.evaluate(FAINT) == [], hat
    ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) is (scheme == "dark")
    if scheme == "dark":
        picture(page, "phone")
    context.close()


def test_without_the_key_there_is_nothing(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(address.partition("#")[0])
    expect(page.locator("#connection")).to_contain_text("open the console with the address", timeout=60_000)
    expect(page.locator("#keys .body")).to_be_empty()
    page.close()


def test_it_asks_nobody_else(browser: Browser, address: str) -> None:
    """No CDN, no font, no beacon: every request goes to the console."""
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    expect(page.locator("#connection")).to_have_text("live", timeout=60_000)
    origin = address.partition("/#")[0]
    assert [url for url in asked if not url.startswith((origin, "data:"))] == []
    page.close()


def test_the_address_does_not_keep_the_key(page: Page) -> None:
    assert "key=" not in page.url


def test_the_network_is_cut_and_a_project_shredded_by_two_people(page: Page) -> None:
    """What the tour leaves out. Last: the project is gone afterwards."""
    wear(page, "customer")
    page.get_by_role("button", name="Cut the network").click()
    expect(page.locator("#customer")).to_contain_text("nothing that it says reaches Keylake", timeout=60_000)
    wear(page, "auditor")
    expect(page.locator("#keys .state.SUSPENDED").first).to_be_visible(timeout=60_000)
    wear(page, "customer")
    page.get_by_role("button", name="Let it answer again").click()
    wear(page, "security admin")
    expect(page.locator("#keys .state.ACTIVE").first).to_be_visible(timeout=60_000)

    name = page.get_by_label("Name of demo, typed")
    ask = page.get_by_role("button", name="Ask to shred")
    ask.click()
    expect(page.get_by_role("alert")).to_contain_text("project_name")  # nothing was typed
    name.fill("demo")
    ask.click()
    approve = page.get_by_role("button", name="Approve: destroy its keys for good")
    name.fill("demo")
    approve.click()
    expect(page.get_by_role("alert")).to_contain_text("another person")
    wear(page, "second security admin")
    expect(page.locator("#keys")).to_contain_text("asked by admin:console:", timeout=60_000)
    name.fill("demo")
    picture(page, "shred")
    approve.click()
    expect(page.locator("#keys .state.SHREDDED").first).to_be_visible(timeout=60_000)
    with page.expect_download(timeout=90_000) as download:
        page.get_by_role("button", name="Receipt of the shred").click()
    check_receipt(page, Path(download.value.path()).read_bytes(), "Genuine")
    wear(page, "workspace admin")
    page.locator("#keys [data-action='endpoint.delete']").click()
    expect(page.locator("#keys [data-action='endpoint.delete']")).to_have_count(0, timeout=60_000)
