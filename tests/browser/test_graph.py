"""The dependency graph: drawn, told, filtered, as a table."""

import itertools
import re

import pytest
from browser.conftest import NARROW, Store, free_port, now_us, size
from browser.traces import INJECTION, Trace, bookinfo, hostile
from playwright.sync_api import expect

NODES = ".graph-node"
EDGES = ".graph-edge"
NUMBERS = ".graph-numbers"
LINES = ".graph-table tbody tr"


def an_hour_of_pages():
    """Return 36 product pages, of which the ratings of 27 fail."""
    spans = []
    for number in range(36):
        at_us = now_us() - (60 + number) * 1_000_000
        status = 503 if number % 4 else 200
        spans += bookinfo(8000 + number, at_us, ratings_status=status)
    return spans


@pytest.fixture(scope="module")
def bookinfo_store(tmp_path_factory):
    """A store with Bookinfo and nothing else, to be read only."""
    store = Store(tmp_path_factory.mktemp("bookinfo") / "traces.db", free_port())
    store.start()
    try:
        store.post(an_hour_of_pages())
        yield store
    finally:
        store.stop()


@pytest.fixture
def graph(page, bookinfo_store):
    """The graph of Bookinfo."""
    page.goto(f"{bookinfo_store.url}/dependencies")
    expect(page.locator(NODES)).to_have_count(5)
    return page


def node(page, name):
    return page.locator(f"{NODES}[aria-label^='{name}:']")


def edge(page, parent, child):
    return page.locator(f"{EDGES}[aria-label^='{parent} calls {child}:']")


def numbers(page):
    names = page.locator(f"{NUMBERS} dt").all_text_contents()
    return dict(
        zip(names, page.locator(f"{NUMBERS} dd").all_text_contents(), strict=True)
    )


def test_services_stand_right_of_their_callers(graph, shoot):
    boxes = [
        node(graph, name).locator(".node-box").bounding_box()
        for name in ("istio-ingressgateway", "productpage", "reviews", "ratings")
    ]
    for caller, called in itertools.pairwise(boxes):
        assert caller["x"] + caller["width"] < called["x"]
    expect(graph.locator(EDGES)).to_have_count(4)
    expect(graph.locator(".graph-tools")).to_contain_text("5 services, 4 edges")
    shoot("graph")


def test_an_edge_is_coloured_by_its_share_of_errors(graph):
    expect(edge(graph, "productpage", "details")).to_have_class(re.compile(r"\bok\b"))
    expect(edge(graph, "reviews", "ratings")).to_have_class(re.compile(r"\berror\b"))


def test_hover_and_focus_tell_an_edges_numbers(graph, shoot):
    for look in ("hover", "focus"):
        graph.mouse.move(0, 0)
        expect(graph.locator(NUMBERS)).to_contain_text("Point at")
        getattr(edge(graph, "reviews", "ratings"), look)()
        expect(graph.locator(NUMBERS)).to_contain_text("reviews → ratings")
        told = numbers(graph)
        assert told["Calls"] == "36"
        assert told["Rate"] == "36/h"
        assert told["Errors"] == "27, 75 %"
        # The serving span: nine tenths of 12 ms, within what the store's steps allow.
        assert float(told["p95"].removesuffix(" ms")) == pytest.approx(10.8, rel=0.1)
    shoot("graph-edge")


def test_pressing_an_edge_keeps_its_numbers_and_leads_to_its_traces(graph):
    edge(graph, "reviews", "ratings").focus()
    graph.keyboard.press("Enter")
    node(graph, "details").hover()
    expect(graph.locator(NUMBERS)).to_contain_text("Called by 1 service")
    graph.mouse.move(0, 0)
    expect(graph.locator(NUMBERS)).to_contain_text("reviews → ratings")
    graph.get_by_role("link", name="Traces with this call").click()
    graph.wait_for_url(re.compile(r"/\?serviceName=reviews&remoteServiceName=ratings"))
    expect(graph.locator("li.trace")).to_have_count(36)


def test_pressing_a_service_leaves_it_and_its_neighbours(graph, shoot):
    node(graph, "reviews").click()
    expect(graph.locator(NODES)).to_have_count(3)
    expect(graph.locator(LINES)).to_have_count(2)
    expect(node(graph, "reviews")).to_have_attribute("aria-pressed", "true")
    graph.wait_for_url("**/dependencies?service=reviews")
    shoot("graph-service")
    graph.get_by_role("link", name="Traces with reviews").click()
    graph.wait_for_url(re.compile(r"/\?serviceName=reviews"))
    graph.go_back()
    expect(graph.locator(NODES)).to_have_count(3)
    graph.get_by_role("button", name="All services").click()
    expect(graph.locator(NODES)).to_have_count(5)
    graph.wait_for_url("**/dependencies")


def test_the_graph_is_used_by_keyboard(graph):
    node(graph, "reviews").focus()
    expect(graph.locator(NUMBERS)).to_contain_text("reviews")
    graph.keyboard.press("Enter")
    expect(graph.locator(NODES)).to_have_count(3)
    expect(node(graph, "reviews")).to_be_focused()
    graph.keyboard.press("Escape")
    expect(graph.locator(NODES)).to_have_count(5)


def test_the_table_has_the_same_and_sorts(graph):
    expect(graph.locator(LINES)).to_have_count(4)
    line = graph.locator(LINES, has_text="ratings")
    expect(line).to_contain_text("75 %")
    graph.get_by_role("button", name="Called").click()
    called = graph.locator(f"{LINES} td:nth-child(2)")
    expect(called).to_have_text(["details", "productpage", "ratings", "reviews"])
    graph.get_by_role("button", name="Called").click()
    expect(called).to_have_text(["reviews", "ratings", "productpage", "details"])
    line.hover()
    expect(edge(graph, "reviews", "ratings")).to_have_class(re.compile("near"))


def test_the_range_is_asked_for_and_in_the_address(graph):
    with graph.expect_request("**/edges*lookback=900000") as asked:
        graph.get_by_label("Range").select_option("Last 15 minutes")
    assert "endTs=" in asked.value.url
    graph.wait_for_url("**/dependencies?lookback=900000")
    expect(edge(graph, "reviews", "ratings")).to_have_attribute(
        "aria-label", re.compile("2.4/min")
    )


def test_an_address_says_range_end_and_service(page, bookinfo_store):
    end_ms = now_us() // 1000
    query = f"endTs={end_ms}&lookback=7200000&service=ratings"
    with page.expect_request(f"**/edges?endTs={end_ms}&lookback=7200000"):
        page.goto(f"{bookinfo_store.url}/dependencies?{query}")
    expect(page.locator(NODES)).to_have_count(2)
    expect(page.get_by_label("Range")).to_have_value("here")
    expect(page.get_by_label("Service", exact=True)).to_have_value("ratings")


def test_zoom_and_fit(graph):
    drawing = graph.locator(".graph-svg")
    fitted = drawing.get_attribute("viewBox")
    graph.get_by_role("button", name="Zoom in").click()
    assert drawing.get_attribute("viewBox") != fitted
    box = drawing.bounding_box()
    graph.mouse.move(box["x"] + 20, box["y"] + 20)
    graph.mouse.down()
    graph.mouse.move(box["x"] + 120, box["y"] + 60, steps=3)
    graph.mouse.up()
    graph.get_by_role("button", name="Fit").click()
    assert drawing.get_attribute("viewBox") == fitted


def test_names_from_the_network_are_text(page, empty_store, shoot):
    empty_store.post(hostile(8100, now_us() - 5_000_000))
    page.goto(f"{empty_store.url}/dependencies")
    expect(page.locator(NODES)).to_have_count(3)
    expect(page.locator(LINES).first).to_contain_text(INJECTION)
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Dependencies · podspan"
    shoot("graph-hostile")


def test_no_calls_are_told_with_a_way_on(page, empty_store, shoot):
    page.goto(f"{empty_store.url}/dependencies")
    expect(page.locator(".state-empty")).to_contain_text("No service called another")
    shoot("graph-empty")
    two_days_us = 2 * 86_400_000_000
    empty_store.post(bookinfo(8101, now_us() - two_days_us))
    page.get_by_role("button", name="Last 7 days").click()
    expect(page.locator(NODES)).to_have_count(5)


def test_an_unknown_service_is_told_with_a_way_on(page, empty_store):
    empty_store.post(bookinfo(8102, now_us() - 5_000_000))
    page.goto(f"{empty_store.url}/dependencies?service=nobody")
    expect(page.locator(".state-empty")).to_contain_text("nobody neither called")
    page.locator(".state-empty").get_by_role("button", name="All services").click()
    expect(page.locator(NODES)).to_have_count(5)


def test_a_store_that_is_away_is_told_and_can_be_asked_again(graph, complaints):
    complaints.expected.append("ERR_CONNECTION_REFUSED")
    graph.route("**/edges*", lambda route: route.abort("connectionrefused"))
    graph.get_by_role("button", name="Refresh").click()
    expect(graph.get_by_role("alert")).to_contain_text("does not answer")
    graph.unroute("**/edges*")
    graph.get_by_role("button", name="Try again").click()
    expect(graph.locator(NODES)).to_have_count(5)


def test_too_many_edges_to_draw_are_in_the_table(page, empty_store):
    trace = Trace(8103)
    for number in range(1_100):
        at_us = now_us() - 60_000_000 + number
        trace.call("hub", f"leaf-{number:04}", "get", at_us, 1_000)
    for span in trace.spans:  # each a trace, so that the store takes them as such
        span.pop("parentId", None)
    empty_store.post(trace.spans)
    page.goto(f"{empty_store.url}/dependencies")
    expect(page.locator(LINES)).to_have_count(1_100)
    expect(page.locator(EDGES)).to_have_count(0)
    page.get_by_label("Service", exact=True).select_option("leaf-0007")
    expect(page.locator(EDGES)).to_have_count(1)


def test_a_narrow_screen_does_not_scroll_sideways(graph):
    size(graph, NARROW)
    expect(graph.locator(LINES).first).to_be_visible()
    assert graph.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_of_services_too_many_to_be_read_the_page_says_what_to_do(page, empty_store):
    spans = []
    for number in range(200):
        trace = Trace(20_000 + number)
        at_us = now_us() - 60_000_000
        trace.call("web", f"service-{number}", "op", at_us, 5_000)
        spans += trace.spans
    empty_store.post(spans)
    page.goto(f"{empty_store.url}/dependencies")
    expect(page.locator(NUMBERS)).to_contain_text("zoom in, or choose a service")
