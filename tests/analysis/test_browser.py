"""The report in a real browser: a silent console, and controls that show the data's numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright drives a browser"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# A page of another width for each theme; WebGL is computed, since there may be no GPU.
OPTIONS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZES = {"light": (1280, 900), "dark": (390, 844)}
# Advice of the browser on how plotly reads its canvas.
HARMLESS = re.compile("willReadFrequently|GPU stall due to ReadPixels")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        program = CHROMIUM or playwright.chromium.executable_path
        if not Path(program).exists():
            pytest.skip(
                "no chromium here: apt-get install chromium, or playwright install chromium"
            )
        opened = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module", params=list(SIZES))
def page(browser, report, request):
    """The page in a theme, and what its console and its network said."""
    width, height = SIZES[request.param]
    phone = width < 600
    opened = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=request.param,
        is_mobile=phone, has_touch=phone,
    )  # fmt: skip
    opened.told, opened.asked, opened.theme = [], [], request.param
    opened.on("console", lambda message: opened.told.append(message.text))
    opened.on("pageerror", lambda error: opened.told.append(str(error)))
    opened.on("request", lambda wanted: opened.asked.append(wanted.url))
    opened.goto(report[0].as_uri())
    opened.wait_for_function("document.documentElement.dataset.ready === 'yes'", timeout=120_000)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def weights(report):
    return load_file(report[0].parent / "data" / "weights.safetensors")


def heard(page):
    """What the list says: key to weight."""
    rows = page.evaluate(
        "[...document.querySelectorAll('#heard li')].map(x => [x.dataset.key, x.dataset.weight])"
    )
    return {int(key): float(weight) for key, weight in rows}


def place(page):
    return {
        name: int(page.locator(f"#{name}").input_value()) for name in ("layer", "cylinder", "token")
    }


def assert_shows(page, weights):
    """List, marked tokens, status and plots show the row that the sliders name."""
    at = place(page)
    row = weights[f"layer{at['layer']}"][at["cylinder"], at["token"]]
    wanted = {key: row[key].item() for key in range(len(row)) if row[key].isfinite()}
    shown = heard(page)
    assert shown.items() <= wanted.items() and len(shown) == min(24, len(wanted))
    marked = page.evaluate(
        "[...document.querySelectorAll('#tokens button')]"
        ".flatMap((x, i) => x.classList.contains('kept') ? [i] : [])"
    )
    assert marked == sorted(wanted)
    status = page.locator("#status").inner_text()
    assert f"hears {len(wanted)} of {at['token'] + 1} tokens" in status
    traces = page.evaluate("document.getElementById('plane').data.map(t => [t.name, t.x.length])")
    assert [f"kept ({len(wanted)})", len(wanted)] in traces
    x = page.evaluate("document.getElementById('heat').data[1].z")
    for key, value in wanted.items():
        assert x[at["token"]][key] == pytest.approx(value, rel=1e-6)
    box = page.evaluate("document.getElementById('heat').layout.shapes[0].y0")
    assert box == at["token"] - 0.5


def test_tokens_are_pointed_at(page, weights):
    assert_shows(page, weights)
    for token in (0, 31, 47):
        page.locator("#tokens button").nth(token).hover()
        assert place(page)["token"] == token
        assert_shows(page, weights)


def test_sliders_choose_layer_and_cylinder(page, weights):
    for name, key, value in (("layer", "Home", 0), ("cylinder", "End", 2), ("token", "Home", 0),
                             ("token", "ArrowRight", 1), ("layer", "ArrowRight", 1)):  # fmt: skip
        page.locator(f"#{name}").press(key)
        assert place(page)[name] == value
        assert_shows(page, weights)


def test_colours_are_for_all_weights_but_the_largest(page, weights):
    """One weight of a first row, where few keys share it, would make all others look the same."""
    at = place(page)
    sizes = weights[f"layer{at['layer']}"][at["cylinder"]]
    sizes = sizes[sizes.isfinite()].abs().sort().values
    least, most = page.evaluate(
        "(({zmin, zmax}) => [zmin, zmax])(document.getElementById('heat').data[1])"
    )
    assert most == pytest.approx(sizes[int(0.99 * (len(sizes) - 1))].item(), rel=1e-6)
    assert least in (0, -most) and most < sizes[-1]


def test_keys_move_through_the_text(page, weights):
    page.locator("#tokens button[tabindex='0']").focus()
    page.keyboard.press("End")
    assert place(page)["token"] == 47
    page.keyboard.press("ArrowLeft")
    assert place(page)["token"] == 46
    assert_shows(page, weights)
    # One stop for the tabulator, not one for each token.
    assert page.locator("#tokens button[tabindex='0']").count() == 1
    focused = page.evaluate("document.activeElement.getAttribute('aria-selected')")
    assert focused == "true"


def test_the_half_plane_holds_what_is_kept(page, report):
    states = load_file(report[0].parent / "data" / "states.safetensors")
    page.locator("#tokens button").nth(40).hover()
    at = place(page)
    name, cylinder = f"layer{at['layer']}", at["cylinder"]
    low = states[f"{name}.low"][cylinder, 40].item()
    direction = states[f"{name}.direction"][cylinder, 40]
    region, kept = (
        page.evaluate("n => { const t = document.getElementById('plane').data[n];"
                      " return [[...t.x], [...t.y]] }", number) for number in (0, 1)
    )  # fmt: skip
    sides = [direction[0] * x + direction[1] * y - low for x, y in zip(*region, strict=True)]
    assert min(sides) == pytest.approx(0, abs=1e-5) and max(sides) > 0
    assert all(
        direction[0] * x + direction[1] * y >= low - 1e-6 for x, y in zip(*kept, strict=True)
    )


def test_every_picture_is_drawn(page):
    figures = json.loads(page.locator("#figures").text_content())
    for name, panels in figures.items():
        for number, figure in enumerate(panels):
            # Without a GPU they take seconds each: once is enough.
            if "scene" in figure["layout"] and page.theme == "dark":
                continue
            plot = page.locator(f".plot[data-picture='{name}'][data-panel='{number}']")
            plot.scroll_into_view_if_needed()
            page.wait_for_function("x => x.dataset.drawn === 'yes'", arg=plot.element_handle(),
                                   timeout=60_000)  # fmt: skip
            assert plot.evaluate("x => x.data.length") == len(figure["data"])
            assert plot.locator("svg.main-svg").count() > 0
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "the page is wider than the screen"


def test_buttons_of_a_plot_do_not_stand_on_its_title(page):
    """They come with a pointer that hovers; on a phone, where they would stay, there are none."""
    page.locator("#heat svg.main-svg").first.wait_for()
    bars = page.locator("#heat .modebar")
    shown = page.evaluate("matchMedia('(hover: hover)').matches")
    assert shown == (page.theme == "light")
    assert bars.locator(".modebar-btn").count() > 0 if shown else bars.count() == 0
    assert bars.count() == page.locator("#heat .modebar--hover").count()


def test_light_and_dark(page):
    def luminance():
        colors = page.evaluate("[getComputedStyle(document.body).backgroundColor, "
                               "document.getElementById('plane').layout.font.color]")  # fmt: skip
        paper = [int(v) for v in re.findall(r"\d+", colors[0])]
        ink = [int(colors[1][i : i + 2], 16) for i in (1, 3, 5)]
        return sum(paper), sum(ink)

    for theme in (page.theme, {"light": "dark", "dark": "light"}[page.theme]):
        paper, ink = luminance()
        assert (paper > 600 and ink < 150) if theme == "light" else (paper < 150 and ink > 600)
        page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == page.theme


def test_the_console_is_silent_and_nothing_is_fetched(page):
    """After all of the above; a page that had stopped half-way would fail there."""
    assert [text for text in page.told if not HARMLESS.search(text)] == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []
