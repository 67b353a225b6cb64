"""The gallery pages as text, and in a real browser with the network cut."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from posmat.report.gallery import escape_markdown, with_figures
from posmat.report.verbs import redraw
from posmat.tests.sample import MACHINES, PICTURE, execute, keep, make_project, make_rows

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
OPTIONS = "headless no-sandbox disable-gpu no-first-run disable-sync disable-dev-shm-usage"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Two published machines and runs of one's own, drawn, with a method's name that is markup."""
    root = make_project(tmp_path_factory.mktemp("gallery"), executed=True)
    times = {"W @ x": 1e-3, "W * x": 2e-3}
    strange = make_rows(times | {"a <script>alert(1)</script> | *b*": 1e-3}, *MACHINES[1])
    keep(root, "01_matvec_vs_elementwise", strange)
    keep(root, "01_matvec_vs_elementwise", make_rows(times, "local", "cpu", "My processor"))
    execute(root / "reports/local/cpu", "01_matvec_vs_elementwise")
    said, problems = redraw(root)
    assert said.startswith("7 figures") and not problems, (said, problems)
    return root


def every(page: Path, tag: str | bool, name: str) -> list[str]:
    """An attribute of all elements of a page that have it; the tag True stands for each."""
    page = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    return [one[name] for one in page.find_all(tag, attrs={name: True})]


PAGES = ("reports/index.html", "reports/local/index.html")
# All that a page links elsewhere, which is fetched when a reader follows it.
SEED = {"https://github.com/ValerianRey/Fibonacci", "https://doi.org/10.1109/DAC18074.2021.9586245"}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_is_there_and_local(project, page):
    path = project / page
    ids, sources = every(path, True, "id"), every(path, "img", "src")
    alts = every(path, "img", "alt")
    assert len(set(ids)) == len(ids)
    assert {unquote(target) for target in every(path, "a", "href") if "//" in target} == SEED
    assert sources and len(alts) == len(sources) and all(len(alt) > 80 for alt in alts)
    for target in {*every(path, "a", "href"), *sources} - SEED:
        assert "//" not in target
        if target.startswith("#"):
            assert target[1:] in ids, target
        else:
            there, _, anchor = unquote(target).partition("#")
            assert (path.parent / there).is_file(), target
            assert not anchor or anchor in every(path.parent / there, True, "id"), target
    text = path.read_text()
    assert "<script" not in text
    cards = text.split("<article")[1:]
    assert len(cards) >= 6
    assert all('.html#What-we-found" aria-label="What we found of' in card for card in cards)
    for link in SEED:
        text = text.replace(f'<a href="{link}"', "")
    assert "http" not in re.sub(r"rows sha256 \w+", "", text) and str(project) not in text


@pytest.mark.parametrize("page", ["reports/README.md", "reports/local/README.md"])
def test_the_page_for_a_code_host_links_what_is_there(project, page):
    path = project / page
    text = path.read_text()
    for target in {*re.findall(r"\]\(([^)]+)\)", text)} - SEED:
        if target.startswith("#"):
            headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("## ")]
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert target[1:] in anchors
        else:
            there, _, anchor = unquote(target).partition("#")
            assert (path.parent / there).is_file(), target
            assert anchor == ("What-we-found" if anchor else "")
    assert text.count("[What we found](") == text.count("![") == text.count("```bibtex\n@misc{")
    numbered = re.findall(r"## Figure (\d+)\. .* \(notebook (\d+)\)\n", text)
    assert numbered == [("1", "01"), ("2", "05")]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) == 1
    assert "<script" not in text.replace(r"\<script", "")
    assert "&lt;script&gt;alert(1)" in path.with_name("index.html").read_text()
    assert escape_markdown("a_b *c*\n<d> | `e`") == r"a\_b \*c\* \<d\> \| \`e\`"


def test_own_runs_stand_beside_the_published_and_not_among_them(project):
    published, own = (every(project / page, "img", "src") for page in PAGES)
    assert not any("local" in source for source in published)
    assert own[0].endswith("figures/matvec-vs-elementwise-local-cpu.svg")
    assert set(published) <= {source.removeprefix("../") for source in own}


def test_machines_and_versions_are_shown_where_provenance_has_them(blank_pictures, tmp_path):
    root = make_project(tmp_path, MACHINES[1:])
    (root / "README.md").unlink()  # it shows a picture of the other machine
    host = {
        "host_identity": "beta",
        "processor": "A Host",
        "memory_bytes": 2**33,
    }  # of older sources
    for path in sorted((root / "data/beta/cuda").glob("*.json")):
        facts = json.loads(path.read_text()) | {"host": host}
        path.write_text(json.dumps(facts))
    facts["host"] = host | {"family": "25"}
    facts["device"] |= {"driver": "570.86.15", "onednn": "3.7.1", "cuda": "13.0", "gpu": "GPU"}
    facts["libraries"] = {"numpy": "2.4.6", "pandas": "not installed"}
    path.write_text(json.dumps(facts))
    assert not redraw(root)[1]
    for page in ("index.html", "README.md"):
        text = re.sub("</?td>", " ", (root / "reports" / page).read_text())
        words = ("beta · cuda", "PyTorch 2.13.0", "2026-11-01", " 8 GiB ", " A Host; family 25 ")
        for word in words:
            assert word in text
        assert "CUDA 13.0, driver 570.86.15, oneDNN 3.7.1, numpy 2.4.6" in text
        assert "not installed" not in text


def test_a_figure_is_rewritten_between_its_marks_only(project):
    text = (project / "README.md").read_text()
    assert "\n\nThe sign-magnitude form of a fully connected layer beside the layer itself." in text
    assert "says [what we found](reports/alpha/cpu/05_positive_matrix_product.ipynb#What" in text
    assert f"](reports/figures/{PICTURE}.png)" in text and text.endswith("-->\n\nThe end.\n")
    unknown = text.replace(PICTURE, "gone-alpha-cpu")
    again, problems = with_figures(unknown, {})
    assert again == unknown and "gone-alpha-cpu" in problems[0]


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("there is no chromium with its chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="there is no selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS.split():
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # the network is cut
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, page: Path, width: int, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


# Text whose contrast with what is behind it is under 4.5 : 1.
LOW_CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const behind = e => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
  return [255, 255, 255]; };
return [...document.querySelectorAll('body *')].filter(e =>
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).filter(e => {
  const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5; })
  .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 30));
"""
EXECUTED = "reports/alpha/cpu/05_positive_matrix_product.html"


@pytest.mark.parametrize("page", [*PAGES, EXECUTED])
@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(browser, project, page, width, scheme):
    show(browser, project / page, width, scheme)
    assert browser.execute_script("return [...document.images].every(i => i.naturalWidth > 0)")
    assert browser.get_log("browser") == []
    # Nothing makes the page itself scroll sideways.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    fetched = browser.execute_script("return performance.getEntriesByType('resource')")
    assert all(one["name"].startswith(("file:", "data:")) for one in fetched)
    assert browser.execute_script(LOW_CONTRAST) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_keyboard_reaches_everything_in_order(browser, project, page):
    from selenium.webdriver.common.keys import Keys

    show(browser, project / page, 1400, "light")
    reached = []
    for _ in range(400):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        place = browser.execute_script(
            "const e = document.activeElement; return e === document.body ? null :"
            "[e.tagName, e.innerText || e.ariaLabel || '', getComputedStyle(e).outlineStyle]"
        )
        if place is None:
            break
        reached.append(place)
    assert reached[0][1] == "Skip to the figures"
    hrefs = [one for one in reached if one[0] == "A"]
    # A link around a picture has no text: the picture's own text names it.
    assert len(hrefs) == len(every(project / page, "a", "href"))
    assert all(outline != "none" for *_, outline in reached), reached
    assert len([one for one in reached if one[0] == "SUMMARY"]) >= 2
