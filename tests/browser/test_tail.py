"""The live tail: spans as they arrive, paused, filtered, bounded, counted."""

import pytest
from browser.conftest import now_us
from browser.traces import bookinfo, hostile
from playwright.sync_api import expect

ROWS = "li.span"
AWAY = "ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET"


@pytest.fixture
def tail(live_store, page):
    """The live page, once it has its place in the stream."""
    with page.expect_response("**/api/podspan/v1/tail*"):
        page.goto(f"{live_store.url}/tail")
    expect(page.locator(".tail-state")).to_have_text("Live")
    return page


def test_spans_appear_as_they_arrive_newest_first(tail, live_store, shoot):
    expect(tail.locator("main")).to_contain_text("Waiting for spans")
    shoot("tail-waiting")
    live_store.post(bookinfo(1, now_us(), ratings_status=503))
    expect(tail.locator(ROWS)).to_have_count(8)
    live_store.post(hostile(2, now_us()))
    expect(tail.locator(ROWS)).to_have_count(12)
    expect(tail.locator(ROWS).last).to_contain_text("productpage")
    expect(tail.locator(f"{ROWS}.failed")).to_have_count(6)
    assert tail.locator("img").count() == 0
    shoot("tail")


def test_a_span_opens_its_trace_at_that_span(tail, live_store):
    spans = bookinfo(1, now_us())
    live_store.post(spans)
    expect(tail.locator(ROWS)).to_have_count(8)
    tail.keyboard.press("j")
    last = spans[-1]
    expect(tail.locator(ROWS).first.locator("a")).to_be_focused()
    tail.keyboard.press("Enter")
    tail.wait_for_url(f"**/traces/{last['traceId']}?span={last['id']}")


def test_only_what_contains_the_text_is_shown(tail, live_store):
    live_store.post(bookinfo(1, now_us()) + hostile(2, now_us()))
    expect(tail.locator(ROWS)).to_have_count(12)
    tail.keyboard.press("/")
    tail.keyboard.type("http.path=/ratings/0")
    expect(tail.locator(ROWS)).to_have_count(2)
    assert tail.url.endswith("?q=http.path%3D%2Fratings%2F0")
    live_store.post(bookinfo(3, now_us()))
    expect(tail.locator(ROWS)).to_have_count(4)
    expect(tail.locator("main")).to_contain_text("20 seen")
    tail.reload()
    expect(tail.get_by_role("searchbox")).to_have_value("http.path=/ratings/0")


def test_pausing_holds_still_and_resuming_catches_up(tail, live_store, shoot):
    tail.get_by_role("button", name="Pause").click()
    expect(tail.locator(".tail-state")).to_have_text("Paused")
    live_store.post(bookinfo(1, now_us()))
    shoot("tail-paused")
    expect(tail.locator(ROWS)).to_have_count(0)
    tail.locator("main").focus()
    tail.keyboard.press("p")
    expect(tail.locator(ROWS)).to_have_count(8)


def test_rows_are_bounded_and_what_is_passed_over_is_counted(tail, live_store):
    live_store.post([span for seed in range(200) for span in bookinfo(seed, now_us())])
    expect(tail.locator("main")).to_contain_text("200 seen · 1,400 skipped")
    for first, seen in ((200, 400), (225, 600)):
        seeds = range(first, first + 25)
        live_store.post([span for seed in seeds for span in bookinfo(seed, now_us())])
        expect(tail.locator("main")).to_contain_text(f"{seen} seen")
    expect(tail.locator(ROWS)).to_have_count(500)
    # No more are kept either: what is filtered comes back from there.
    tail.get_by_role("searchbox").fill("nothing has this text")
    expect(tail.locator(ROWS)).to_have_count(0)
    tail.get_by_role("searchbox").fill("")
    expect(tail.locator(ROWS)).to_have_count(500)


def test_a_store_that_is_away_is_said_and_followed_again(
    tail, live_store, complaints, shoot
):
    complaints.expected.append(AWAY)
    live_store.post(bookinfo(1, now_us()))
    expect(tail.locator(ROWS)).to_have_count(8)
    live_store.stop()
    expect(tail.locator(".tail-state")).to_contain_text("does not answer")
    shoot("tail-away")
    expect(tail.locator(ROWS)).to_have_count(8)
    live_store.start()
    expect(tail.locator(".tail-state")).to_have_text("Live")
