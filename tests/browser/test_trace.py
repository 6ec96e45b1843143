"""The page of one trace: rows, bars, details, search, keys, size."""

import json
import re
from pathlib import Path
from random import Random

import pytest
from browser.conftest import now_us
from browser.traces import INJECTION, ODD, Trace, bookinfo, endpoint, hostile
from playwright.sync_api import expect

ROWS = ".wf-row"
DETAIL = ".detail"
AWAY = "ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET"


@pytest.fixture
def opened(page, store):
    """Post spans of one trace and open its page; returns the page."""

    def open_(spans, query=""):
        store.post(spans)
        page.goto(f"{store.url}/traces/{spans[0]['traceId']}{query}")
        expect(page.locator(ROWS).first).to_be_visible()
        return page

    return open_


def row(page, text):
    return page.locator(ROWS, has_text=text)


def selected(page):
    return page.locator(f"{ROWS}.selected")


def facts(scope):
    """Return what a list of facts says, by name."""
    names = scope.locator(".facts dt").all_text_contents()
    return dict(zip(names, scope.locator(".facts dd").all_text_contents(), strict=True))


def product_page(seed, **more):
    return bookinfo(seed, now_us() - 5_000_000, **more)


def odd_trace(seed):
    """Return an orphan, a cycle, a clock that differs, a span without time."""
    at_us = now_us() - 5_000_000
    trace = Trace(seed)
    root = trace.call("curl", "front", "get", at_us, 20_000)
    trace.call("front", "cart", "get", at_us + 2_000, 8_000, parent=root)
    for span in trace.spans[3:]:  # cart's own clock
        span["timestamp"] -= 5_000
        span["annotations"][0]["timestamp"] -= 5_000
    trace.call("ghost", "cart", "get", at_us + 6_000, 3_000, parent="dead000000000000")
    common = {"traceId": trace.trace_id, "localEndpoint": endpoint("ouroboros", 80)}
    loop = {**common, "timestamp": at_us + 11_000, "duration": 900}
    head, tail, timeless = "00000000000000aa", "00000000000000bb", "00000000000000cc"
    trace.spans += [
        {**loop, "id": head, "parentId": tail, "name": "head"},
        {**loop, "id": tail, "parentId": head, "name": "tail"},
        {**common, "id": timeless, "parentId": root, "name": "timeless"},
    ]
    return trace.spans


def large(seed, calls):
    """Return a trace of so many calls, four below each."""
    random = Random(seed)
    trace = Trace(seed, shared=True)
    at_us, total_us = now_us() - 60_000_000, 50_000_000
    ids = [trace.call("curl", "service-00", "get", at_us, total_us)]
    for number in range(1, calls):
        start = at_us + number * total_us // calls // 2
        called = f"service-{random.randrange(20):02}"
        lasts = random.randrange(500, 900_000)
        parent = ids[(number - 1) // 4]
        status = 500 if number % 501 == 500 else 200
        call = ("service-00", called, "get", start, lasts)
        ids.append(trace.call(*call, parent=parent, status=status))
    return trace.spans


# --- the head ---


def test_the_head_tells_what_the_trace_is(opened, shoot):
    page = opened(product_page(7001, duration_us=40_000, ratings_status=503))
    head = page.locator(".trace-head")
    expect(head.get_by_role("heading")).to_contain_text("productpage")
    expect(head.get_by_role("heading")).to_contain_text("GET /productpage/0")
    told = facts(head)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", told.pop("Started"))
    assert told == {
        "Duration": "40 ms",
        "Calls": "4",
        "Spans": "8",
        "Services": "5",
        "Depth": "3",
        "Errors": "6",
    }
    expect(head.locator(".service", has_text="ratings")).to_have_count(1)
    expect(page).to_have_title(re.compile("productpage.* · podspan"))
    shoot("trace")


def test_the_download_has_all_spans(opened):
    spans = product_page(7002)
    page = opened(spans)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download JSON").click()
    got = json.loads(Path(download.value.path()).read_text())
    assert sorted(span["id"] for span in got) == sorted(span["id"] for span in spans)
    assert download.value.suggested_filename == f"trace-{spans[0]['traceId']}.json"


# --- rows ---


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "child"])
def test_a_call_is_one_row_with_both_bars(opened, shared):
    page = opened(product_page(7003 + shared, shared=shared))
    expect(page.locator(ROWS)).to_have_count(4)
    expect(page.locator(f"{ROWS} .wf-bar.outer")).to_have_count(4)
    expect(page.locator(f"{ROWS} .wf-bar.inner")).to_have_count(4)
    levels = page.locator(ROWS).evaluate_all("all => all.map(one => one.ariaLevel)")
    assert levels == ["1", "2", "2", "3"]
    outer, inner = (
        page.locator(f"{ROWS} >> nth=0 >> .wf-bar.{kind}").bounding_box()
        for kind in ("outer", "inner")
    )
    assert outer["x"] < inner["x"]
    assert inner["x"] + inner["width"] < outer["x"] + outer["width"]


def test_bars_stand_where_their_time_is(opened):
    page = opened(product_page(7006, duration_us=40_000))
    grid = page.locator(".wf-grid").bounding_box()
    ratings = row(page, "ratings").locator(".wf-bar.outer").bounding_box()
    # It began after 20 of 40 milliseconds, and lasted 12.
    assert (ratings["x"] - grid["x"]) / grid["width"] == pytest.approx(0.5, abs=0.01)
    assert ratings["width"] / grid["width"] == pytest.approx(0.3, abs=0.01)


def test_names_from_the_network_are_text(opened, complaints, shoot):
    page = opened(hostile(7007, now_us() - 5_000_000))
    row(page, ODD).first.click()
    expect(page.locator(DETAIL)).to_contain_text(INJECTION)
    assert page.locator("main img, main script").count() == 0
    assert "owned" not in page.title().split("·")[-1]
    page.get_by_role("searchbox").fill("<script>")
    expect(page.locator(".trace-found")).to_have_text("1 of 1")
    shoot("trace-hostile")


def test_orphans_cycles_clocks_and_missing_times_are_told(opened, shoot):
    page = opened(odd_trace(7008))
    notes = page.locator(".trace-notes")
    for text in ("1 call with a parent", "1 cycle", "Clocks differ", "1 span without"):
        expect(notes).to_contain_text(text)
    expect(row(page, "ghost")).to_contain_text("parent missing")
    expect(row(page, "head")).to_contain_text("cycle")
    expect(row(page, "cart").first).to_contain_text("clock")
    expect(row(page, "timeless")).to_contain_text("no time")
    row(page, "ghost").click()
    expect(page.locator(DETAIL)).to_contain_text("span dead000000000000, is not in")
    shoot("trace-odd")


def test_collapsing_hides_what_is_below_and_says_how_much(opened):
    page = opened(product_page(7009))
    reviews = row(page, "reviews").first
    reviews.locator(".wf-toggle").click()
    expect(page.locator(ROWS)).to_have_count(3)
    expect(reviews).to_contain_text("+1")
    expect(reviews).to_have_attribute("aria-expanded", "false")
    page.get_by_role("button", name="Collapse all").click()
    expect(page.locator(ROWS)).to_have_count(1)
    page.get_by_role("button", name="Expand all").click()
    expect(page.locator(ROWS)).to_have_count(4)


def test_the_critical_path_can_be_taken_away(opened):
    page = opened(product_page(7010))
    shown = page.locator(".wf-path[d^='M']")
    button = page.get_by_role("button", name="Critical path")
    expect(shown).to_have_count(4)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(shown).to_have_count(0)
    page.keyboard.press("c")
    expect(shown).to_have_count(4)


def test_the_names_of_deep_rows_are_in_sight(opened, shoot):
    trace, parent = Trace(7028, shared=True), ""
    for depth in range(60):
        at_us = now_us() - 5_000_000 + depth
        names = (f"level-{depth}", f"level-{depth + 1}")
        lasts = 100_000 - 2 * depth
        parent = trace.call(*names, "get", at_us, lasts, parent=parent)
    page = opened(trace.spans, f"?span={parent}")
    last = row(page, "level-60")
    expect(last).to_contain_text("59")  # rows this deep say so
    service = last.locator(".wf-service").bounding_box()
    names = last.locator(".wf-name").bounding_box()
    assert service["x"] + service["width"] < names["x"] + names["width"]
    shoot("trace-deep")


# --- details ---


def test_details_tell_tags_ends_annotations_link_and_where_the_time_went(opened, shoot):
    page = opened(product_page(7011, duration_us=40_000))
    row(page, "ratings").click()
    detail = page.locator(DETAIL)
    expect(detail.get_by_role("heading").first).to_contain_text("GET /ratings/0")
    told = facts(detail)
    assert told["Duration"] == "12 ms"
    assert told["Starts at"] == "+20 ms"
    assert told["On the critical path"] == "12 ms, 30 %"
    hops = detail.get_by_role("region", name="Where the time went")
    expect(hops.locator("tr", has_text="network")).to_contain_text("1.2 ms")
    expect(hops.locator("tr", has_text="server's wait")).to_contain_text("10.8 ms")
    expect(hops.locator("tr", has_text="connect")).to_contain_text("300 µs")
    annotations = detail.get_by_role("region", name="Annotations")
    expect(annotations.locator("li")).to_have_text(["+31.4 msss"])
    expect(annotations.locator(".moments-line i")).to_have_count(1)
    linked = detail.get_by_role("region", name="How it was linked")
    expect(linked).to_contain_text("reviews: GET /reviews/0")
    expect(linked).to_contain_text("By the thread that sent it")
    for half in ("Client", "Server"):
        tags = detail.get_by_role("region", name=f"{half} span").locator(".tags")
        expect(tags.locator("tr", has_text="http.status_code")).to_contain_text("200")
        expect(tags.locator("tr", has_text="http.path")).to_contain_text("/ratings/0")
    expect(detail).to_contain_text("ratings · 10.1.2.3:9080")
    shoot("trace-detail")


def test_a_tag_is_copied(opened):
    page = opened(product_page(7012))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row(page, "ratings").click()
    line = page.locator(f"{DETAIL} .tags tr", has_text="http.url").first
    line.hover()
    line.get_by_role("button", name="Copy http.url").click()
    expect(line).to_contain_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "http://ratings:9080/ratings/0"


def test_a_tag_leads_to_the_traces_that_have_it(opened):
    page = opened(product_page(7013))
    row(page, "ratings").click()
    line = page.locator(f"{DETAIL} .tags tr", has_text="http.path").first
    line.hover()
    line.get_by_role("link", name="Traces with this http.path").click()
    page.wait_for_url("**/?*annotationQuery=http.path%3D%2Fratings%2F0*")


def test_the_parent_is_a_step_away(opened):
    page = opened(product_page(7014))
    row(page, "ratings").click()
    page.get_by_role("button", name=re.compile("reviews: GET")).click()
    expect(selected(page)).to_contain_text("reviews")
    expect(page.locator(".detail-title")).to_contain_text("/reviews/0")


# --- keys ---


def test_arrows_walk_and_fold_the_tree(opened):
    page = opened(product_page(7015))
    expect(page.get_by_role("tree")).to_be_focused()
    expect(selected(page)).to_contain_text("productpage")
    for key, where, rows in [
        ("ArrowDown", "/details/0", 4),
        ("ArrowDown", "/reviews/0", 4),
        ("ArrowRight", "/ratings/0", 4),
        ("ArrowLeft", "/reviews/0", 4),
        ("ArrowLeft", "/reviews/0", 3),
        ("ArrowLeft", "/productpage/0", 3),
        ("End", "/reviews/0", 3),
        ("ArrowRight", "/reviews/0", 4),
        ("ArrowUp", "/details/0", 4),
        ("Home", "/productpage/0", 4),
    ]:
        page.keyboard.press(key)
        expect(selected(page).locator(".wf-operation")).to_have_text(f"GET {where}")
        expect(page.locator(ROWS)).to_have_count(rows)
        active = page.get_by_role("tree").get_attribute("aria-activedescendant")
        assert selected(page).get_attribute("id") == active


def test_enter_opens_details_and_escape_leaves_them(opened):
    page = opened(product_page(7016))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".detail-title")).to_be_focused()
    expect(page.locator(".detail-title")).to_contain_text("/details/0")
    page.keyboard.press("Escape")
    expect(page.locator(DETAIL)).to_be_hidden()
    expect(page.get_by_role("tree")).to_be_focused()


def test_search_counts_hits_and_goes_round_them(opened, shoot):
    page = opened(product_page(7017))
    page.keyboard.press("/")
    page.keyboard.type("reviews")
    found = page.locator(".trace-found")
    expect(found).to_have_text("1 of 2")  # its own call, and where it is the caller
    page.keyboard.press("Enter")
    expect(found).to_have_text("2 of 2")
    page.keyboard.press("Escape")
    expect(page.get_by_role("searchbox")).to_have_value("")
    page.keyboard.type("reviews")
    expect(found).to_have_text(re.compile("of 2"))
    page.get_by_role("tree").focus()
    for key, where in [("n", "1 of 2"), ("n", "2 of 2"), ("N", "1 of 2")]:
        page.keyboard.press(key)
        expect(found).to_have_text(where)
    expect(page.locator(f"{ROWS}.hit")).to_have_count(2)
    shoot("trace-search")


def test_a_hit_below_a_collapsed_row_is_shown(opened):
    page = opened(product_page(7018))
    page.get_by_role("button", name="Collapse all").click()
    page.get_by_role("searchbox").fill("http.path=/ratings/0")
    expect(selected(page)).to_contain_text("ratings")


def test_e_goes_to_the_next_error(opened):
    page = opened(product_page(7019, ratings_status=503))
    for where in ("/reviews/0", "/ratings/0", "/productpage/0"):
        page.keyboard.press("e")
        expect(selected(page)).to_contain_text(where)


# --- time ---


def test_zoom_to_a_call_and_back(opened):
    page = opened(product_page(7020))
    row(page, "ratings").click()
    page.keyboard.press("z")
    grid = page.locator(".wf-grid").bounding_box()
    bar = row(page, "ratings").locator(".wf-bar.outer").bounding_box()
    assert bar["width"] == pytest.approx(grid["width"], abs=2)
    page.get_by_role("button", name="Whole trace").click()
    bar = row(page, "ratings").locator(".wf-bar.outer").bounding_box()
    assert bar["width"] < grid["width"] / 2


def test_a_drag_over_the_minimap_zooms(opened):
    page = opened(product_page(7021))
    box = page.locator(".minimap").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=4)
    page.mouse.up()
    expect(page.get_by_role("button", name="Whole trace")).to_be_visible()
    first = page.locator(".wf-tick").first
    expect(first).to_have_text("20 ms")
    page.locator(".minimap").dblclick()
    expect(first).to_have_text("0")


# --- the address ---


def test_the_address_says_which_call_and_what_is_searched(opened):
    spans = product_page(7022)
    page = opened(spans)
    row(page, "ratings").click()
    page.get_by_role("searchbox").fill("reviews")
    page.wait_for_url(re.compile(r"\?span=[0-9a-f]{16}&q=reviews$"))
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.get_by_role("searchbox")).to_have_value("reviews")
    expect(page.locator(f"{ROWS}.hit")).to_have_count(2)
    expect(page.locator(DETAIL)).to_be_visible()


def test_an_address_with_a_servers_span_opens_its_call(opened):
    spans = product_page(7023)
    server = next(s for s in spans if "ratings" in s["localEndpoint"]["serviceName"])
    page = opened(spans, f"?span={server['id']}")
    expect(selected(page)).to_contain_text("ratings")
    expect(page.locator(DETAIL)).to_contain_text(server["id"])


def test_an_address_with_an_unknown_span_says_so(opened):
    page = opened(product_page(7024), "?span=00000000000000ff")
    expect(page.locator(".trace-notes")).to_contain_text("00000000000000ff is not")


# --- states ---


def test_an_unknown_trace_can_be_asked_for_again(page, store, complaints, shoot):
    complaints.expected.append("404")
    spans = product_page(7025)
    page.goto(f"{store.url}/traces/{spans[0]['traceId']}")
    expect(page.locator(".state-empty")).to_contain_text(spans[0]["traceId"])
    shoot("trace-unknown")
    store.post(spans)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(ROWS)).to_have_count(4)


def test_what_is_no_trace_id_is_said(page, store, complaints):
    complaints.expected.append("400")
    page.goto(f"{store.url}/tail")
    page.get_by_label("Trace id").fill("zz")
    page.keyboard.press("Enter")
    expect(page.locator(".state-error")).to_contain_text("“zz” is no trace id")
    page.get_by_role("link", name="All traces").click()
    expect(page).to_have_title("Traces · podspan")


def test_a_store_that_is_away_is_told_and_can_be_asked_again(
    page, empty_store, complaints
):
    complaints.expected.append(AWAY)
    spans = product_page(7026)
    empty_store.post(spans)
    page.goto(f"{empty_store.url}/tail")
    expect(page).to_have_title("Live · podspan")
    page.route("**/api/v2/trace/*", lambda route: route.abort("connectionrefused"))
    page.get_by_label("Trace id").fill(spans[0]["traceId"])
    page.keyboard.press("Enter")
    expect(page.locator(".state-error")).to_contain_text("does not answer")
    page.unroute("**/api/v2/trace/*")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(ROWS)).to_have_count(4)


# --- size ---

# Scrolls by so many pixels 100 times, and takes the time of every frame.
SCROLL = """
async (step) => {
  const tree = document.querySelector(".waterfall");
  const frame = () => new Promise(requestAnimationFrame);
  const times = [];
  let most = 0;
  let last = await frame();
  for (let number = 0; number < 100; number += 1) {
    tree.scrollTop += step;
    const now = await frame();
    times.push(now - last);
    last = now;
    most = Math.max(most, document.querySelectorAll(".wf-row").length);
  }
  times.sort((one, other) => one - other);
  return {most, median: times[50], slowest: times.at(-1), end: tree.scrollTop};
}
"""
ROW_PX = 28


def test_of_10_000_spans_only_the_rows_in_sight_are_elements(opened, shoot):
    page = opened(large(7027, 5_000))
    assert facts(page.locator(".trace-head"))["Spans"] == "10,000"
    for rows in (3, 49):  # as a wheel does; and to the end
        scrolled = page.evaluate(SCROLL, rows * ROW_PX)
        print(
            f"\n5,000 rows, {rows} a frame: median frame {scrolled['median']:.1f} ms, "
            f"slowest {scrolled['slowest']:.1f} ms, at most {scrolled['most']} elements"
        )
        assert scrolled["most"] < 100
    assert scrolled["end"] > 4_900 * ROW_PX
    page.keyboard.press("End")
    expect(selected(page)).to_be_in_viewport()
    page.keyboard.press("Home")
    expect(selected(page)).to_be_in_viewport()
    page.keyboard.press("e")
    expect(selected(page)).to_contain_text("500")
    expect(selected(page)).to_be_in_viewport()
    assert page.locator(ROWS).count() < 100
    shoot("trace-large")
