"""What all pages share: navigation, themes, keyboard, format, the rules of the CSP."""

import re
from pathlib import Path

import pytest
from browser.conftest import NARROW, size
from playwright.sync_api import expect

VIEWER = Path(__file__).parents[2] / "agent/store/viewer"
TEXTS = ("text", "muted", "accent", "error", "warn", "ok")
SURFACES = ("bg", "panel", "raised", "hover")
# WCAG 2.2, 1.4.3 and 1.4.11
READABLE = 4.5
VISIBLE = 3.0


@pytest.fixture
def shell(page, store):
    page.goto(store.url)
    expect(page.locator("li.trace").first).to_be_visible()
    return page


def luminance(rgb):
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def colours(page, names):
    """Return the tokens' colours as the browser paints them."""
    texts = page.evaluate(
        """names => names.map(name => {
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.setProperty("color", `var(--${name})`);
            const colour = getComputedStyle(probe).color;
            probe.remove();
            return colour;
        })""",
        list(names),
    )
    return {
        name: tuple(int(part) for part in re.findall(r"\d+", text)[:3])
        for name, text in zip(names, texts, strict=True)
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_badges_and_edges_have_contrast_on_every_surface(shell, scheme):
    least = {(text, surface): READABLE for text in TEXTS for surface in SURFACES}
    least |= {
        ("error", "error-soft"): READABLE,
        ("warn", "warn-soft"): READABLE,
        ("ok", "ok-soft"): READABLE,
        ("on-accent", "accent"): READABLE,
        ("focus", "panel"): VISIBLE,
        ("focus", "bg"): VISIBLE,
        ("line-strong", "panel"): VISIBLE,
    }
    shell.emulate_media(color_scheme=scheme)
    found = colours(shell, sorted({name for pair in least for name in pair}))
    got = {pair: contrast(*(found[name] for name in pair)) for pair in least}
    bad = {pair: ratio for pair, ratio in got.items() if ratio < least[pair]}
    assert bad == {}


def test_navigation_changes_page_title_and_place_without_loading_again(shell):
    shell.evaluate("window.same = true")
    shell.get_by_role("link", name="Live").click()
    expect(shell).to_have_title("Live · podspan")
    expect(shell.get_by_role("link", name="Live")).to_have_attribute(
        "aria-current", "page"
    )
    expect(shell.locator("main")).to_be_focused()
    shell.go_back()
    expect(shell).to_have_title("Traces · podspan")
    expect(shell.locator("li.trace").first).to_be_visible()
    assert shell.evaluate("window.same")


def test_back_returns_to_where_the_list_was_read(shell):
    row = shell.locator("li.trace").nth(40)
    expect(row).not_to_be_in_viewport()
    row.scroll_into_view_if_needed()
    # Playwright's own click scrolls first.
    shell.get_by_role("link", name="Live").evaluate("link => link.click()")
    expect(shell).to_have_title("Live · podspan")
    shell.go_back()
    expect(row).to_be_in_viewport()


def test_leaving_a_page_ends_what_it_asked_for(shell):
    asked = []
    shell.clock.install()
    shell.get_by_role("link", name="Live").click()
    expect(shell.locator(".tail-state")).to_have_text("Live")
    with shell.expect_request("**/api/podspan/v1/tail*"):
        shell.clock.run_for(2_000)
    shell.get_by_role("link", name="Traces").click()
    expect(shell.locator("li.trace").first).to_be_visible()
    shell.on("request", lambda request: asked.append(request.url))
    shell.clock.run_for(10_000)
    assert shell.evaluate("fetch('/health').then(answer => answer.ok)")
    assert [url for url in asked if "/tail" in url] == []


def test_an_address_without_a_page_says_so(shell):
    shell.evaluate("history.pushState(null, '', '/nothing')")
    shell.evaluate("dispatchEvent(new PopStateEvent('popstate'))")
    expect(shell.locator("main")).to_contain_text("There is no such page")


def test_a_page_whose_script_does_not_come_can_be_tried_again(shell, complaints):
    complaints.expected.append("ERR_FAILED")
    shell.route("**/static/tail.js", lambda route: route.abort())
    shell.get_by_role("link", name="Live").click()
    expect(shell.locator("main")).to_contain_text("does not answer")
    shell.unroute("**/static/tail.js")
    shell.get_by_role("button", name="Try again").click()
    expect(shell.locator(".tail-state")).to_have_text("Live")


def test_a_trace_id_typed_in_the_header_is_opened(shell, complaints):
    complaints.expected.append("404")  # no such trace
    shell.get_by_label("Trace id").fill("  00000000000000AB ")
    shell.get_by_label("Trace id").press("Enter")
    shell.wait_for_url("**/traces/00000000000000ab")


def test_the_theme_is_chosen_and_kept(shell):
    button = shell.get_by_role("button", name=re.compile("Theme"))
    expect(button).to_have_text("Theme: auto")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    shell.reload()
    expect(shell.locator("html")).to_have_attribute("data-theme", "dark")
    dark = colours(shell, ["bg"])["bg"]
    assert luminance(dark) < 0.05


def test_help_lists_the_keys_and_closes_by_escape(shell, shoot):
    shell.keyboard.press("?")
    dialog = shell.get_by_role("dialog")
    expect(dialog).to_contain_text("next, previous trace")
    expect(dialog).to_contain_text("go to the filter")
    shoot("help")
    shell.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_slash_goes_to_the_filter_and_writes_nothing(shell):
    shell.keyboard.press("/")
    service = shell.get_by_label("Service", exact=True)
    expect(service).to_be_focused()
    expect(service).to_have_value("")
    shell.keyboard.type("?/jr")
    expect(service).to_have_value("?/jr")
    expect(shell.get_by_role("dialog")).to_be_hidden()


def test_tab_reaches_every_control_in_order_with_a_visible_ring(shell):
    shell.keyboard.press("Tab")
    expect(shell.locator(".skip")).to_be_focused()
    seen = []
    for _ in range(24):
        shell.keyboard.press("Tab")
        seen.append(
            shell.evaluate(
                """() => {
                    const element = document.activeElement;
                    const row = element.closest(".choice label, .trace") ?? element;
                    const name = element.labels?.[0]?.textContent;
                    const { outlineStyle } = getComputedStyle(row);
                    return [(name || element.textContent).trim(), outlineStyle];
                }"""
            )
        )
    names = [name for name, _ in seen]
    order = ["podspan", "Traces", "Service", "Errors only", "Find traces", "Newest"]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert [name for name, outline in seen if outline != "solid"] == []


def test_nothing_is_wider_than_a_telephone(page, store):
    size(page, NARROW)
    for path in ("/", "/tail", "/?endTs=1600000000000"):
        page.goto(store.url + path)
        expect(page.locator("main .panel").first).to_be_visible()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= NARROW[0], path


def test_no_script_makes_markup_and_no_page_has_style_or_handlers_of_its_own():
    for path in VIEWER.glob("*.js"):
        text = path.read_text()
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\("
        assert not re.search(forbidden, text), path
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), path
    page = (VIEWER / "index.html").read_text()
    assert not re.search(r"\s(style|on\w+)=|<style|<script>|//[a-z]+\.(?!w3\.)", page)


FORMATTED = [
    ("duration(0)", "0 µs"),
    ("duration(870)", "870 µs"),
    ("duration(999.6)", "1 ms"),
    ("duration(1234)", "1.23 ms"),
    ("duration(12345)", "12.3 ms"),
    ("duration(999499)", "999 ms"),
    ("duration(999500)", "1 s"),
    ("duration(59_949_000)", "59.9 s"),
    ("duration(59_950_000)", "1 min"),
    ("duration(125_000_000)", "2 min 5 s"),
    ("duration(3_900_000_000)", "1 h 5 min"),
    ("duration(-1500)", "\N{MINUS SIGN}1.5 ms"),
    ("duration(undefined)", "\N{EN DASH}"),
    ("parseDuration('1.5ms')", 1500),
    ("parseDuration(' 200 us ')", 200),
    ("parseDuration('7µs')", 7),
    ("parseDuration('2S')", 2_000_000),
    ("parseDuration('1m')", 60_000_000),
    ("exactDuration(1500)", "1.5ms"),
    ("exactDuration(2_000_000)", "2s"),
    ("exactDuration(999)", "999us"),
    ("time(1_577_876_400_001_000)", "2020-01-01 11:00:00.001"),
    ("time(2 ** 63)", "unknown time"),
    ("clock(2 ** 63)", "\N{EN DASH}"),
    ("ago(1_000_000, 63_000)", "1 min ago"),
    ("count(1204, 'span')", "1,204 spans"),
    ("count(1, 'span')", "1 span"),
    ("statusClass('404')", "warn"),
    ("statusClass('<b>')", ""),
    ("Number.isNaN(parseDuration('5'))", True),
    ("serviceHue('reviews') === serviceHue('reviews')", True),
]


def test_numbers_and_times_are_written_and_read_as_people_do(shell):
    names = {expression.split("(")[0] for expression, _ in FORMATTED} - {"Number.isNaN"}
    got = shell.evaluate(
        f"""async () => {{
            const {{ {", ".join(names)} }} = await import("/static/format.js");
            return [{", ".join(expression for expression, _ in FORMATTED)}];
        }}"""
    )
    assert got == [wanted for _, wanted in FORMATTED]
