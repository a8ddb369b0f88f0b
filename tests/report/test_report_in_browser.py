"""The report in a real browser, headless Chromium: what its script adds, how it looks, and whether all can use it.

One page holds every kind of section: the demo's run, a gallery, gradient norms, and the files of every command as
tests/data/before keeps them. Without the browser, or axe, these tests are skipped and say what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from test_gallery import seen_run
from test_gradient_plots import table
from test_gradient_plots import write as write_norms
from test_report import HOSTILE, demo_run

from rankwise.report.report import build_report

BEFORE = Path(__file__).parents[1] / "data" / "before"
SERIOUS = ("serious", "critical")
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = demo_run(tmp_path_factory.mktemp("runs") / "all", layers=8)
    norms = table(steps=40)
    places = {path: f"model.layers.{path.split('.')[2]}.mlp.up_proj" for path in {row.site for row in norms}}
    write_norms(run / "trained", [row.__class__(row.step, places[row.site], *cells_after(row)) for row in norms])
    shutil.copytree(BEFORE, run / "ways")
    (run / "seen" / "data").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (40 * number, 90, 10)).save(run / "seen" / "data" / f"{number}.png")
    seen_run(run / "seen", [[f"{number}.png"] for number in range(3)])
    return build_report(run, title=HOSTILE)


def cells_after(row: Any) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in row.__slots__[2:])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver and importlib.util.find_spec("selenium")):
        pytest.skip("needs selenium, and Debian's packages chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    found.set_script_timeout(120)
    yield found
    found.quit()


def opened(
    browser: Any, page: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light", script: bool = True
) -> None:
    """Load the page anew, on a screen of this size in CSS pixels."""
    screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})  # for the test's own questions


def ask(browser: Any, question: str, *args: Any) -> Any:
    return browser.execute_script(f"return {question}", *args)


def found(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def axe_source() -> str:
    """axe-core of a node_modules folder, which may be newer, else the one that a Python package ships."""
    modules = os.environ.get("RANKWISE_NODE_MODULES")
    if modules and (Path(modules) / "axe-core" / "axe.min.js").is_file():
        return (Path(modules) / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    shipped = importlib.util.find_spec("axe_core_python")
    if not shipped or not shipped.submodule_search_locations:
        pytest.skip("needs axe-core: the package axe-core-python, or RANKWISE_NODE_MODULES with axe-core in it")
    return (Path(shipped.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


AXE = """const done = arguments[0];
    axe.run({exclude: [["tbody tr:nth-child(n+5)"]]}, {resultTypes: ["violations"]}).then(done)"""  # rows are alike
CASES = [(DESKTOP, "light", True), (DESKTOP, "dark", True), (PHONE, "light", True), (PHONE, "dark", False)]


@pytest.mark.parametrize(("size", "scheme", "script"), CASES)
def test_nobody_is_kept_out_nothing_is_said_on_the_console_and_the_page_is_as_wide_as_the_screen(
    browser: Any, page: Path, size: tuple[int, int], scheme: str, script: bool
) -> None:
    opened(browser, page, size, scheme, script)
    assert ask(browser, "document.documentElement.scrollWidth") <= size[0]
    assert bool(found(browser, "th button")) == script
    dark = "rgb(21, 23, 26)"
    assert (ask(browser, "getComputedStyle(document.body).backgroundColor") == dark) == (scheme == "dark")
    ask(browser, "document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert ask(browser, "document.documentElement.scrollWidth") <= size[0], "nor with its details open"
    browser.execute_script(axe_source())
    result = browser.execute_async_script(
        "const done = arguments[0]; axe.run({resultTypes: ['violations']}).then(done)"
    )
    faults = [
        (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in result["violations"]
        if one["impact"] in SERIOUS
    ]
    assert faults == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def facts(browser: Any) -> dict[str, str]:
    """What the first map tells."""
    shown = found(browser, ".facts")[0]
    names, values = (shown.find_elements("css selector", kind) for kind in ("dt", "dd"))
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


def test_map_tells_of_the_cell_that_is_pointed_at_or_reached_by_keys(browser: Any, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened(browser, page)
    rows = found(browser, "figure.map tbody tr")[:7]
    cell = rows[4].find_elements("css selector", "td")[1]
    ActionChains(browser).move_to_element(cell).perform()
    told = facts(browser)
    assert told["site"] == "model.layers.1.mlp.gate_proj" and told["shape"] == "172 × 64"
    assert told["rank"] == cell.text and told["energy kept"].endswith("%")
    cell.click()
    for key, site in (
        (Keys.ARROW_DOWN, "model.layers.1.mlp.up_proj"),
        (Keys.ARROW_LEFT, "model.layers.0.mlp.up_proj"),
        (Keys.END, "model.layers.7.mlp.up_proj"),
        (Keys.ARROW_UP, "model.layers.7.mlp.gate_proj"),
    ):
        ActionChains(browser).send_keys(key).perform()
        assert facts(browser)["site"] == site
        assert ask(browser, "document.activeElement.classList.contains('at')")
    assert len(found(browser, "figure.map")[0].find_elements("css selector", "td[tabindex='0']")) == 1


def test_map_shows_other_measures(browser: Any, page: Path) -> None:
    opened(browser, page)
    figure = found(browser, "figure.map")[0]
    labels = figure.find_elements("css selector", ".measures label")
    assert [label.text for label in labels] == ["rank", "energy kept", "stable rank", "gradient norm"]
    before = [cell.text for cell in figure.find_elements("css selector", "td")]
    labels[1].click()
    cells = figure.find_elements("css selector", "tbody td")
    assert {cell.text[:1] for cell in cells} <= {".", "1"} and [cell.text for cell in cells] != before
    assert figure.find_element("css selector", ".scale .name").text == "energy kept"
    labels[3].click()
    known = [cell.text for cell in cells if cell.text]
    assert len(known) == 3, "gradient norms of the sites that have one, from the run that trained these ranks"
    assert "blank" in cells[0].get_attribute("class")


def test_tables_are_sorted_by_number_up_down_and_back(browser: Any, page: Path) -> None:
    opened(browser, page)
    heads = found(browser, "table.rows th[scope=col]")
    head = next(
        one for one in heads if one.text.startswith("stage") or one.get_attribute("textContent") == "rank before"
    )
    rows = "arguments[0].closest('table').tBodies[0].rows"
    shown = f"Array.from({rows}, (row) => row.cells[arguments[0].cellIndex].textContent)"
    ask(browser, "arguments[0].closest('details')?.setAttribute('open', '')", head)
    first = ask(browser, shown, head)
    button = head.find_element("css selector", "button")
    numbers = [float(text.replace(",", "")) for text in first]
    for state, wanted in (
        ("ascending", sorted(numbers)),
        ("descending", sorted(numbers, reverse=True)),
        (None, numbers),
    ):
        ask(browser, "arguments[0].click()", button)
        assert head.get_attribute("aria-sort") == state
        assert [float(text.replace(",", "")) for text in ask(browser, shown, head)] == wanted


def test_values_with_units_have_their_order(browser: Any, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    texts = [
        "2 h 05 min",
        "",
        "41 s",
        "1 min 17 s",
        "1.2 GiB",
        "not measured",
        "950 MiB",
        "−3.5",
        "61.42 [58.35, 64.49]",
        "1.18M",
        "9,000",
    ]
    rows = "".join(f"<tr><th>{place}</th><td>{cell}</td></tr>" for place, cell in enumerate(texts))
    head = '<thead><tr><th scope="col">a</th><th scope="col">b</th></tr></thead>'
    made = f'<table class="rows" id="made">{head}<tbody>{rows}</tbody></table>'
    other = tmp_path / "page.html"
    other.write_text(text.replace("<h1>", f"{made}<h1>", 1), encoding="utf-8")
    opened(browser, other)
    found(browser, "#made th button")[1].click()
    order = [cell.text for cell in found(browser, "#made td")]
    assert order == [
        "−3.5",
        "41 s",
        "61.42 [58.35, 64.49]",
        "1 min 17 s",
        "2 h 05 min",
        "9,000",
        "1.18M",
        "950 MiB",
        "1.2 GiB",
        "",
        "not measured",
    ]


def test_without_a_script_the_map_and_its_facts_are_all_there(browser: Any, page: Path) -> None:
    opened(browser, page, script=False)
    cells = found(browser, "figure.map tbody td")[:8]
    assert all(cell.text.isdigit() for cell in cells) and not found(browser, ".facts, .measures, th button")
    assert "site: model.layers.0.self_attn.q_proj" in cells[0].get_attribute("title")
    assert found(browser, "svg.chart rect title"), "phases"


def test_every_figure_is_linked_to_its_file(browser: Any, page: Path) -> None:
    """Whatever has a digit in it, outside versions and settings, lies within a part that links to files."""
    opened(browser, page)
    lacking = ask(
        browser,
        """Array.from(document.querySelectorAll("main > :not(header):not(.appendix) :is(p, td, th, dd, svg, .value)"))
        .filter((one) => /[0-9]/.test(one.textContent) && !one.closest(".facts, .scale"))
        .filter((one) => !one.querySelector("a") && !one.closest(".sourced")?.querySelector(":scope > .source a"))
        .map((one) => one.outerHTML.slice(0, 200))""",
    )
    assert lacking == []
    links = [link.get_attribute("href") for link in found(browser, "a")]
    assert links and all(Path(unquote(link.removeprefix("file://"))).is_file() for link in links)


def test_printed_page_has_its_details_and_no_buttons(browser: Any, page: Path) -> None:
    opened(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert ask(browser, "document.querySelector('details pre').getBoundingClientRect().height") > 20
    assert ask(browser, "getComputedStyle(document.querySelector('.measures')).display") == "none"
    assert ask(browser, "getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
