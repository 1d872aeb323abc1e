"""The HTML report in a browser: it opens without an error, answers clicks and keys, and text from a file is inert."""

from __future__ import annotations

import html
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from repconv_cli.report.html import html_page
from repconv_cli.results import Change, NodeFacts, OutputFacts, RefusalFacts, Result, Totals
from tests.report.made import BENCHED, DIFFERENT, FUSED, INSPECTED, LISTED, VERIFIED, drawn

Open = Callable[..., Any]
ALL = {"inspect": INSPECTED, "fuse": FUSED, "verify": VERIFIED, "verify, fail": DIFFERENT}
HOSTILE = "</script><script>window.ran=1</script><img src=x onerror='window.ran=1'>\x1b[31m\u202e{{7*7}}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("result", ALL.values(), ids=ALL)
def test_every_report_opens_without_an_error(opened: Open, result: Result, scheme: str) -> None:
    page = opened(drawn(result), color_scheme=scheme)
    assert page.title().startswith(f"repconv {result.command}: repvgg_a0.pt")
    assert page.locator("#pane-before .node").count() > 10
    assert page.locator("#pane-after .node").count() > 5


def test_a_result_without_a_drawing_has_a_page_too(opened: Open) -> None:
    page = opened(FUSED)
    assert page.locator("#blocks tbody tr").count() == 22
    page.locator("#blocks [data-block]").first.click()
    assert page.locator("#block").is_visible()


def test_times_and_tensors_have_pages_too(opened: Open) -> None:
    page = opened(BENCHED)
    assert "GAIN the fused model: 1.50× as fast in eager." in page.locator("header").first.inner_text()
    assert "30.20 ms" in page.locator("#speed").inner_text()
    assert "it cannot read the model" in page.locator("#speed").inner_text()
    assert page.locator("#blocks").count() == 0
    listed = opened(LISTED)
    assert "layers.*.weight" in listed.locator("#contents").inner_text()
    assert listed.locator("#use code").inner_text() == "repconv inspect repvgg_a0.pt --arch file.py:callable"


def test_a_click_on_a_box_of_a_block_opens_it(opened: Open) -> None:
    page = opened(drawn(FUSED))
    page.locator("#pane-before .node", has_text="conv2d 64×64×3×3").first.click()
    assert page.locator("#block-title").inner_text() == "Block backbone.stages.0.0"
    assert page.locator("#block .branches svg").first.get_attribute("aria-label") == (
        "Before: 3×3, 1×1, identity, all read one input and are added."
    )
    captions = page.locator("#block figcaption").all_inner_texts()
    assert captions[:3] == ["3×3", "identity, embedded", "one kernel"]
    maps = page.locator("#block .heat")
    taps = [maps.nth(i).locator("text").all_text_contents() for i in range(3)]
    assert [taps[0][4], taps[1][4], taps[2][4]] == ["-0.500", "1.00", "0.500"]
    assert "the rounding error would be 7.0 %" in page.locator("#block .warning").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#block").is_visible()


def test_a_click_on_a_name_in_the_table_opens_the_block_and_next_goes_on(opened: Open) -> None:
    page = opened(drawn(FUSED))
    page.locator("#blocks [data-block='1']").click()
    assert page.locator("#block-title").inner_text() == "Block backbone.stages.0.1"
    page.locator("#block-next").click()
    assert page.locator("#block-title").inner_text() == "Block backbone.stages.0.2"
    assert page.url.endswith("#block-2")


def test_search_finds_blocks_modules_and_operators(opened: Open) -> None:
    page = opened(drawn(FUSED, 3000))
    page.locator("#search").fill("stages.30.4")
    page.locator("#found button").first.wait_for()
    assert page.locator("#found button").first.inner_text() == "block backbone.stages.30.4"
    page.locator("#search").fill("relu_2107")
    page.locator("#found button", has_text="relu_2107").wait_for()
    page.keyboard.press("Enter")
    assert "relu relu_2107, backbone.stages.30.0" in page.locator("#told").inner_text()
    page.locator("#pane-before .node.current").wait_for()
    page.locator("#search").fill("there is no such thing")
    page.locator("#found-count", has_text="0 found").wait_for()


def test_the_keyboard_alone_walks_the_graph_and_opens_a_block(opened: Open) -> None:
    page = opened(drawn(FUSED))
    page.locator("#pane-before > svg").focus()
    for key in ("ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert "conv2d_1" in page.locator("#told").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#block-title").inner_text() == "Block backbone.stages.0.0"
    page.keyboard.press("Escape")
    page.locator("#pane-before > svg").focus()
    page.keyboard.press("Backspace")
    page.locator("#pane-before .node.current", has_text="▸ backbone").wait_for()
    page.keyboard.press("Enter")
    page.locator("#pane-before .node.current", has_not_text="▸").wait_for()


def test_wheel_and_drag_move_the_graph(opened: Open) -> None:
    page = opened(drawn(FUSED))
    world = page.locator("#pane-before > svg > g")
    before = world.get_attribute("transform")
    page.locator("#pane-before > svg").hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "t => document.querySelector('#pane-before > svg > g').getAttribute('transform') !== t", arg=before
    )
    zoomed = world.get_attribute("transform")
    page.mouse.down()
    page.mouse.move(700, 500, steps=4)
    page.mouse.up()
    page.wait_for_function(
        "t => document.querySelector('#pane-before > svg > g').getAttribute('transform') !== t", arg=zoomed
    )
    assert not page.locator("#block").is_visible()


def test_3000_operators_open_in_two_seconds_and_stay_usable(opened: Open) -> None:
    start = time.monotonic()
    page = opened(drawn(FUSED, 3000))
    opening = page.evaluate("performance.now()")
    assert opening < 2000, f"{opening:.0f} ms, {time.monotonic() - start:.1f} s with the browser's own start"
    assert page.locator(".node").count() < 400
    spent = page.evaluate(
        "async () => { const start = performance.now();"
        "app.open = app.panes[0].model.openTo(9); app.refold(); app.panes[0].drawNow();"
        "for (let i = 0; i < 20; i++) app.panes[0].zoom(0.9); app.panes[0].drawNow();"
        "return performance.now() - start; }"
    )
    assert app_boxes(page) == 3000
    assert spent < 1000
    assert page.locator(".node").count() < 1000


def app_boxes(page: Any) -> int:
    return page.evaluate("app.panes[0].items.length")


def hostile(result: Result) -> Result:
    made = drawn(result)
    drawing = made.drawing
    assert drawing is not None
    node = NodeFacts(HOSTILE, HOSTILE, HOSTILE, (1,), (), (0,), 0)
    block = replace(drawing.blocks[0], name=HOSTILE, kind=HOSTILE, branches=(HOSTILE,), sources=(HOSTILE,))
    blocks = (block, *drawing.blocks[1:])
    return replace(
        made,
        blocks=blocks,
        source=replace(made.source, name=HOSTILE, notes=(HOSTILE,)),
        refusals=(RefusalFacts(HOSTILE, HOSTILE, HOSTILE),),
        drawing=replace(drawing, before=(*drawing.before, node), blocks=blocks),
    )


def test_text_from_a_file_is_inert(opened: Open) -> None:
    page = opened(hostile(FUSED))
    page.locator("#blocks [data-block='0']").click()
    assert "window.ran=1" in page.locator("#block-title").inner_text()
    page.keyboard.press("Escape")
    page.locator("#search").fill("onerror")
    page.locator("#found button").first.wait_for()
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_no_markup_or_control_character_of_a_file_reaches_the_source() -> None:
    text = html_page(hostile(FUSED))
    assert text.count("<script") == 2
    assert "<img" not in text
    assert not {character for character in text if not character.isprintable() and character != "\n"}
    assert "49" not in text.partition("<main>")[0]


def test_a_script_that_is_not_ours_cannot_run_even_if_it_got_in(browser: Any, tmp_path: Any) -> None:
    text = html_page(drawn(FUSED)).replace(
        "</main>", "<script>window.ran=1</script><p onclick='window.ran=1'>x</p></main>"
    )
    path = tmp_path / "report.html"
    path.write_text(text)
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    assert page.evaluate("window.ran") is None
    page.close()


def test_pictures_have_words_and_controls_have_names(opened: Open) -> None:
    page = opened(drawn(FUSED))
    page.locator("#blocks [data-block='0']").click()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('svg[role=img], svg[role=application]')]"
        ".filter((one) => !one.getAttribute('aria-label')).length"
        " + [...document.querySelectorAll('button, input')]"
        ".filter((one) => !one.textContent.trim() && !one.labels?.length).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_lies_behind_it(opened: Open, scheme: str) -> None:
    page = opened(drawn(FUSED), color_scheme=scheme)
    ratios = page.evaluate(CONTRASTS)
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


# WCAG contrast of each text colour of the style on the page and on cards.
CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement), probe = document.createElement('span');
  document.body.append(probe);
  const rgb = (name) => {
    probe.style.color = style.getPropertyValue(name);
    return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  };
  const light = (name) => rgb(name).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const ink of ['--ink', '--faint', '--link', '--good', '--bad', '--warn']) {
    for (const page of ['--page', '--card']) {
      const [a, b] = [light(ink), light(page)].sort((x, y) => y - x);
      found[`${ink} on ${page}`] = (a + 0.05) / (b + 0.05);
    }
  }
  return found;
}"""


@pytest.mark.parametrize(
    ("path", "kind", "line"),
    [
        ("out.safetensors", "module", "from repconv_cli import load"),
        ("out.onnx", "onnx", "session = onnxruntime.InferenceSession('out.onnx')"),
        ("out.pt2", "program", "model = torch.export.load('out.pt2').module()"),
        ("out.safetensors", "weights alone", "model.load_state_dict(load_file('out.safetensors'))"),
    ],
)
def test_each_kind_of_output_tells_how_it_is_loaded(path: str, kind: str, line: str) -> None:
    output = OutputFacts(path, 1, "a" * 64, False)
    page = html_page(replace(FUSED, source=replace(FUSED.source, kind=kind), output=output))
    assert line in html.unescape(page)


def test_weights_of_a_known_family_have_their_blocks_on_the_page(opened: Open) -> None:
    unknown = Change(None, None)
    totals = Totals(unknown, unknown, unknown, Change(9_108_968, 8_309_384), unknown)
    page = opened(replace(LISTED, blocks=FUSED.blocks, totals=totals))
    assert page.locator("header .lead").inner_text() == "22 blocks can be fused: parameters −8.8 %."
    assert page.locator("#blocks tbody tr").count() == 22
    assert page.locator("#left").count() == 0
    assert page.locator("#use code").inner_text() == "repconv fuse repvgg_a0.pt OUT.safetensors"


@pytest.mark.parametrize("width", [360, 420, 1400])
def test_the_page_is_never_wider_than_the_window(opened: Open, width: int) -> None:
    page = opened(drawn(FUSED))
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
