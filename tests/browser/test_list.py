"""The list of traces: what is found, how it is narrowed, what is said when it fails."""

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from browser.conftest import NARROW, SCREENSHOTS, now_us, size
from browser.traces import INJECTION, ODD, bookinfo
from playwright.sync_api import expect

ROWS = "li.trace"
AWAY = "ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET"


@pytest.fixture
def listed(page, store):
    """The list as one comes to it, with its 61 traces."""
    page.goto(store.url)
    expect(page.locator(ROWS)).to_have_count(61)
    return page


def query(page):
    return {name: text for name, [text] in parse_qs(urlsplit(page.url).query).items()}


def durations(page):
    return page.locator(".trace-duration .bar").evaluate_all(
        "bars => bars.map(bar => Number(bar.style.getPropertyValue('--share')))"
    )


def test_a_row_says_where_a_trace_began_and_what_it_cost(listed, shoot):
    row = listed.locator(ROWS, has_text="6 errors").first
    expect(row).to_contain_text("istio-ingressgateway")
    expect(row).to_contain_text("productpage.default.svc.cluster.local:9080/*")
    expect(row).to_contain_text("8 spans")
    expect(row).to_contain_text("6 errors")
    expect(row).to_contain_text("500")
    expect(row.locator(".trace-services")).to_contain_text("ratings1")
    shoot("list")


def test_filters_are_in_the_address_and_come_back_from_it(listed):
    listed.get_by_label("Service", exact=True).fill("ratings")
    listed.get_by_label("Min duration").fill("1.5ms")
    listed.get_by_label("Max duration").fill("0.2s")
    listed.get_by_label("Errors only").check()
    listed.get_by_label("Tags and annotations").fill("http.status_code=503")
    listed.get_by_role("button", name="Find traces").click()
    listed.wait_for_url(re.compile("503"))
    assert query(listed) == {
        "serviceName": "ratings",
        "minDuration": "1500",
        "maxDuration": "200000",
        "annotationQuery": "http.status_code=503 and error",
    }
    found = listed.locator(ROWS).count()
    assert 0 < found < 61
    listed.reload()
    expect(listed.locator(ROWS)).to_have_count(found)
    expect(listed.get_by_label("Min duration")).to_have_value("1.5ms")
    expect(listed.get_by_label("Max duration")).to_have_value("200ms")
    expect(listed.get_by_label("Errors only")).to_be_checked()
    tags = listed.get_by_label("Tags and annotations")
    expect(tags).to_have_value("http.status_code=503")


def test_back_undoes_a_search(listed):
    listed.get_by_label("Errors only").check()
    expect(listed.locator(ROWS)).to_have_count(9)
    listed.go_back()
    expect(listed.locator(ROWS)).to_have_count(61)
    expect(listed.get_by_label("Errors only")).not_to_be_checked()
    listed.go_forward()
    expect(listed.locator(ROWS)).to_have_count(9)


def test_a_duration_without_sense_is_not_searched_for(listed):
    field = listed.get_by_label("Min duration")
    for text in ("5", "fast", "1.5 parsecs", "-1ms"):
        field.fill(text)
        field.press("Enter")
        expect(field).to_have_attribute("aria-invalid", "true")
        assert query(listed) == {}
    field.fill("5ms")
    expect(field).to_have_attribute("aria-invalid", "true")
    field.press("Enter")
    expect(field).not_to_have_attribute("aria-invalid", "true")
    listed.wait_for_url(re.compile("minDuration=5000"))
    field.fill("fast")
    listed.get_by_role("button", name="Clear").click()
    expect(field).to_have_value("")
    expect(field).not_to_have_attribute("aria-invalid", "true")


def test_names_are_suggested_and_one_is_chosen_by_keyboard(listed):
    service = listed.get_by_label("Service", exact=True)
    service.press_sequentially("RATE")
    listed.keyboard.press("Backspace")
    options = listed.locator(".suggestions li")
    expect(options).to_have_text(["ratings"])
    listed.keyboard.press("ArrowDown")
    listed.keyboard.press("Enter")
    expect(service).to_have_value("ratings")
    listed.wait_for_url(re.compile("serviceName=ratings"))
    listed.get_by_label("Operation").click()
    expect(options).to_have_text(["ratings.default.svc.cluster.local:9080/*"])
    listed.get_by_label("Operation").press("Escape")
    expect(options).to_have_count(0)


def test_tags_are_suggested_key_first_then_its_values(listed, shoot):
    tags = listed.get_by_label("Tags and annotations")
    tags.press_sequentially("error and http.st")
    expect(listed.locator(".suggestions li")).to_have_text(["http.status_code="])
    listed.keyboard.press("ArrowDown")
    listed.keyboard.press("Enter")
    values = listed.locator(".suggestions li")
    expect(values.filter(has_text="503")).to_be_visible()
    shoot("list-suggestions")
    values.filter(has_text="503").click()
    expect(tags).to_have_value("error and http.status_code=503")
    listed.wait_for_url(re.compile("annotationQuery="))


def test_an_absolute_range_of_time_finds_what_is_in_it(listed, shoot):
    listed.get_by_label("Time", exact=True).select_option("custom")
    listed.get_by_role("textbox", name="From").fill("2020-01-01T10:00:00")
    listed.get_by_label("To", exact=True).fill("2020-01-01T12:00:00")
    listed.get_by_label("To", exact=True).press("Enter")
    expect(listed.locator(".state-empty")).to_contain_text("in that range of time")
    assert query(listed) == {"lookback": "7200000", "endTs": "1577880000000"}
    shoot("list-empty")
    listed.get_by_role("button", name="Look at any time").click()
    expect(listed.locator(ROWS)).to_have_count(61)


def test_sorting_is_by_what_is_asked_for(listed):
    listed.get_by_label("Longest").check()
    shares = durations(listed)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    listed.get_by_label("Errors", exact=True).check()
    expect(listed.locator(ROWS).first).to_contain_text("6 errors")
    listed.get_by_label("Most spans").check()
    expect(listed.locator(ROWS).last).to_contain_text("4 spans")
    assert query(listed) == {"sort": "spans"}


def test_rows_are_walked_by_keys_and_enter_opens_one(listed):
    listed.keyboard.press("j")
    listed.keyboard.press("ArrowDown")
    listed.keyboard.press("k")
    listed.keyboard.press("j")
    second = listed.locator(".trace-link").nth(1)
    expect(second).to_be_focused()
    href = second.get_attribute("href")
    listed.keyboard.press("Enter")
    listed.wait_for_url(f"**{href}")


def test_names_from_the_network_stay_text(listed):
    expect(listed.locator(ROWS, has_text=INJECTION)).to_have_count(1)
    expect(listed.locator(".trace-services", has_text=ODD)).to_have_count(1)
    assert listed.locator("img").count() == 0
    assert listed.title() == "Traces · podspan"


def test_a_brushed_rectangle_narrows_time_and_duration(listed, shoot):
    box = listed.locator(".plot").bounding_box()
    listed.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    listed.mouse.down()
    listed.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 90, steps=4)
    shoot("list-brush")
    listed.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 90)
    listed.mouse.up()
    listed.wait_for_url(re.compile("minDuration"))
    assert set(query(listed)) == {"endTs", "lookback", "minDuration", "maxDuration"}
    expect(listed.locator(ROWS)).not_to_have_count(61)
    expect(listed.locator(ROWS).first).to_be_visible()
    expect(listed.get_by_label("Time", exact=True)).to_have_value("custom")


def test_a_line_brushed_along_the_time_narrows_only_that(listed):
    box = listed.locator(".plot").bounding_box()
    listed.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    listed.mouse.down()
    listed.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 61, steps=4)
    listed.mouse.up()
    listed.wait_for_url(re.compile("endTs"))
    assert set(query(listed)) == {"endTs", "lookback"}
    expect(listed.locator(ROWS)).not_to_have_count(61)


def test_a_point_shows_its_trace_and_a_click_opens_it(listed):
    point = listed.locator(".dot.failed").first
    point.hover(force=True)
    expect(listed.locator(".tip")).to_contain_text("6 errors")
    expect(listed.locator("li.pointed")).to_have_count(1)
    href = listed.locator("li.pointed .trace-link").get_attribute("href")
    listed.screenshot(path=SCREENSHOTS / "list-point.png")
    point.click(force=True)
    listed.wait_for_url(f"**{href}")


def test_points_are_walked_by_keys_on_either_scale(listed, shoot):
    listed.get_by_label("Linear").check()
    shoot("list-linear")
    assert query(listed) == {"scale": "linear"}
    listed.locator(".scatter").focus()
    listed.keyboard.press("End")
    listed.keyboard.press("ArrowLeft")
    expect(listed.locator(".tip")).to_contain_text(re.compile(r"ms · \d spans20"))
    expect(listed.locator(".scatter [role=status]")).to_contain_text("ms")
    href = listed.locator("li.pointed .trace-link").get_attribute("href")
    listed.keyboard.press("Enter")
    listed.wait_for_url(f"**{href}")


def test_the_limit_is_said_where_it_cuts(page, store):
    page.goto(f"{store.url}/?limit=20")
    expect(page.locator(ROWS)).to_have_count(20)
    expect(page.locator(".found")).to_contain_text("there may be more")


def test_a_store_without_spans_says_where_to_send_them(empty_store, page, shoot):
    page.goto(empty_store.url)
    expect(page.locator(".state-empty")).to_contain_text(
        f"{empty_store.url}/api/v2/spans"
    )
    shoot("list-no-spans")
    empty_store.post(bookinfo(1, now_us() - 1_000_000))
    page.get_by_role("button", name="Look again").click()
    expect(page.locator(ROWS)).to_have_count(1)


def test_a_store_that_is_away_is_asked_until_it_is_back(
    live_store, page, complaints, shoot
):
    complaints.expected.append(AWAY)
    live_store.post(bookinfo(1, now_us() - 1_000_000))
    page.goto(live_store.url)
    expect(page.locator(ROWS).first).to_be_visible()
    live_store.stop()
    page.keyboard.press("r")
    expect(page.locator(".state-error")).to_contain_text("does not answer")
    shoot("list-away")
    live_store.start()
    expect(page.locator(ROWS).first).to_be_visible()


def test_what_the_store_refuses_is_said_in_its_words(page, store, complaints, shoot):
    complaints.expected.append("400")
    page.route(
        "**/api/podspan/v1/summaries*",
        lambda route: route.fulfill(status=400, body="minDuration is odd"),
    )
    page.goto(store.url)
    expect(page.locator(".state-error")).to_contain_text("minDuration is odd")
    shoot("list-refused")


def test_an_old_search_never_replaces_a_newer_one(listed):
    """The first answer comes after the second is shown."""
    held = []

    def hold(route):
        held.append(route)

    listed.route(re.compile("summaries.*serviceName=details"), hold)
    service = listed.get_by_label("Service", exact=True)
    service.fill("details")
    service.press("Enter")
    listed.wait_for_url(re.compile("serviceName=details"))
    service.fill(INJECTION)
    service.press("Enter")
    expect(listed.locator(ROWS)).to_have_count(1)
    held[0].fulfill(json=[])
    assert listed.evaluate("fetch('/health').then(answer => answer.ok)")
    expect(listed.locator(".found")).to_contain_text("1 trace")


def test_a_narrow_screen_shows_the_rest_of_the_filters_on_demand(listed):
    size(listed, NARROW)
    operation = listed.get_by_label("Operation")
    expect(operation).to_be_hidden()
    listed.get_by_role("button", name="More").click()
    expect(operation).to_be_visible()
    listed.goto(f"{listed.url}?spanName=none")
    expect(operation).to_have_value("none")
    expect(operation).to_be_visible()
