"""The viewer's pure modules, in node: trees of traces, critical paths, drawn graphs."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
VIEWER = HERE.parents[1] / "agent" / "store" / "viewer"
MODULES = ("critical_path", "graph_layout", "hop_times", "trace_model")

T0 = 1_700_000_000_000_000


class Node:
    """A node process that has the modules loaded."""

    def __init__(self, folder):
        for name in MODULES:
            shutil.copy(VIEWER / f"{name}.js", folder)
        shutil.copy(HERE / "pure_modules.mjs", folder)
        # What a browser knows from the script's type.
        (folder / "package.json").write_text('{"type": "module"}')
        self._process = subprocess.Popen(
            ["node", folder / "pure_modules.mjs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def ask(self, question, **about):
        self._questions.write(json.dumps({"question": question, **about}) + "\n")
        self._questions.flush()
        answer = self._answers.readline()
        assert answer, "node ended: see its stderr above"
        return json.loads(answer)

    def close(self):
        self._questions.close()
        self._process.wait(timeout=30)
        self._answers.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    if shutil.which("node") is None:
        pytest.skip("no node: apt install nodejs")
    node = Node(tmp_path_factory.mktemp("viewer"))
    yield node
    node.close()


def span(span_id, parent_id="", kind="", at=0, lasts=0, service="a", **more):
    made = {
        "traceId": "7" * 16,
        "id": span_id,
        "name": "get",
        "timestamp": T0 + at,
        "duration": lasts,
        "localEndpoint": {"serviceName": service},
        **more,
    }
    if parent_id:
        made["parentId"] = parent_id
    if kind:
        made["kind"] = kind
    return made


def client(span_id, parent_id="", **more):
    return span(span_id, parent_id, "CLIENT", **more)


def server(span_id, parent_id="", **more):
    return span(span_id, parent_id, "SERVER", **more)


def shape(trace):
    """Return (depth, indexes of the spans) of every row."""
    return [(row["depth"], row["spans"]) for row in trace["rows"]]


# --- rows ---


def test_halves_that_share_an_id_are_one_row(node):
    spans = [
        client("1", at=0, lasts=100, service="curl"),
        server("1", at=10, lasts=80, service="front", shared=True),
        client("2", "1", at=20, lasts=50, service="front"),
        server("2", "1", at=30, lasts=30, service="back", shared=True),
    ]
    trace = node.ask("trace", spans=spans)
    assert shape(trace) == [(0, [0, 1]), (1, [2, 3])]
    assert [row["caller"] for row in trace["rows"]] == ["curl", "front"]
    assert [row["service"] for row in trace["rows"]] == ["front", "back"]


def test_a_server_that_is_the_clients_only_server_child_is_in_its_row(node):
    spans = [
        client("1", at=0, lasts=100),
        server("2", "1", at=10, lasts=80, service="front"),
        client("3", "2", at=20, lasts=50, service="front"),
        server("4", "3", at=30, lasts=30, service="back"),
    ]
    assert shape(node.ask("trace", spans=spans)) == [(0, [0, 1]), (1, [2, 3])]


def test_two_servers_of_one_client_are_rows_below_it(node):
    spans = [
        client("1", at=0, lasts=100),
        server("2", "1", at=10, lasts=20),
        server("3", "1", at=40, lasts=20),
    ]
    assert shape(node.ask("trace", spans=spans)) == [(0, [0]), (1, [1]), (1, [2])]


def test_what_shares_an_id_is_called_by_the_server_of_its_own_service(node):
    spans = [
        client("1", at=0, lasts=100),
        server("1", at=5, lasts=90, service="first", shared=True),
        server("1", at=6, lasts=80, service="second", shared=True),
        client("2", "1", at=20, lasts=10, service="second"),
    ]
    trace = node.ask("trace", spans=spans)
    assert shape(trace) == [(0, [0]), (1, [1]), (1, [2]), (2, [3])]
    assert trace["rows"][3]["parent"] == 2


def test_a_call_to_who_has_no_span_is_named_by_the_remote_endpoint(node):
    spans = [client("1", lasts=10, remoteEndpoint={"serviceName": "mysql"})]
    (row,) = node.ask("trace", spans=spans)["rows"]
    assert (row["caller"], row["service"]) == ("a", "mysql")


def test_siblings_are_in_the_order_of_time(node):
    spans = [
        span("1", lasts=100),
        span("4", "1", at=50),
        span("2", "1", at=10),
        span("3", "1", at=10),
    ]
    assert shape(node.ask("trace", spans=spans)) == [
        (0, [0]),
        (1, [2]),
        (1, [3]),
        (1, [1]),
    ]


def test_a_parent_that_is_missing_leaves_an_orphan_that_says_so(node):
    spans = [span("1", lasts=9), span("2", "8", at=1), span("3", "2", at=2)]
    trace = node.ask("trace", spans=spans)
    assert [row["trouble"] for row in trace["rows"]] == ["", "orphan", ""]
    assert trace["orphanCount"] == 1
    assert trace["rows"][2]["parent"] == 1


def test_the_earliest_of_a_cycle_is_its_top_and_says_so(node):
    spans = [span("1", "3", at=5), span("2", "1", at=2), span("3", "2", at=9)]
    trace = node.ask("trace", spans=[*spans, span("4", "3", at=0)])
    assert shape(trace) == [(0, [1]), (1, [2]), (2, [3]), (2, [0])]
    assert [row["trouble"] for row in trace["rows"]] == ["cycle", "", "", ""]


def test_a_span_that_is_its_own_parent_is_a_root(node):
    trace = node.ask("trace", spans=[span("1", "1")])
    assert [row["trouble"] for row in trace["rows"]] == [""]


def test_a_span_without_time_stands_at_its_parent(node):
    untimed = span("2", "1")
    del untimed["timestamp"], untimed["duration"]
    trace = node.ask("trace", spans=[untimed, span("1", at=7, lasts=9)])
    assert [row["startUs"] - T0 for row in trace["rows"]] == [7, 7]
    assert trace["untimedCount"] == 1


def test_a_service_has_its_count_of_spans_and_errors(node):
    spans = [
        span("1", tags={"error": "false"}),  # it is there: Zipkin's rule
        span("2", "1"),
        span("3", "1", service="b"),
    ]
    trace = node.ask("trace", spans=spans)
    assert trace["services"] == [
        {"name": "a", "spanCount": 2, "errorCount": 1},
        {"name": "b", "spanCount": 1, "errorCount": 0},
    ]
    assert trace["errorCount"] == 1


# --- clocks ---


@pytest.mark.parametrize(
    ("at", "lasts", "skew"),
    [
        (10, 80, 0),  # within
        (-1, 100, 0),  # rounding
        (-50, 80, -60),  # would have begun before it was asked
        (60, 80, 50),  # would have answered after the answer had come
        (10, 200, 0),  # outlasts its client: it gave up
        (-30, 200, -30),
    ],
)
def test_the_servers_clock_is_ahead_by(node, at, lasts, skew):
    spans = [client("1", lasts=100), server("2", "1", at=at, lasts=lasts)]
    assert node.ask("trace", spans=spans)["skewUs"] == skew


def test_skew_is_not_corrected(node):
    spans = [client("1", at=50, lasts=100), server("2", "1", at=0, lasts=80)]
    trace = node.ask("trace", spans=spans)
    assert trace["startUs"] == T0
    assert trace["rows"][0]["startUs"] == T0


# --- the critical path ---


def path(trace):
    return [
        (step["span"], step["startUs"] - T0, step["endUs"] - T0)
        for step in trace["path"]
    ]


def test_the_path_goes_through_the_child_that_finished_last(node):
    spans = [
        span("1", at=0, lasts=100),
        span("2", "1", at=10, lasts=60),
        span("3", "1", at=20, lasts=70),  # 20 to 90
        span("4", "1", at=2, lasts=10),  # 2 to 12, before what the path waits for
    ]
    assert path(node.ask("trace", spans=spans)) == [
        ("1", 0, 2),
        ("4", 2, 12),
        ("1", 12, 20),
        ("3", 20, 90),
        ("1", 90, 100),
    ]


def test_the_path_tells_network_from_server(node):
    spans = [client("1", lasts=100), server("2", "1", at=10, lasts=80)]
    assert path(node.ask("trace", spans=spans)) == [
        ("1", 0, 10),
        ("2", 10, 90),
        ("1", 90, 100),
    ]


def test_a_child_that_outlasts_its_parent_counts_until_the_parents_end(node):
    spans = [span("1", lasts=100), span("2", "1", at=60, lasts=500)]
    assert path(node.ask("trace", spans=spans)) == [("1", 0, 60), ("2", 60, 100)]


def test_a_server_with_another_clock_is_on_the_path_all_the_same(node):
    spans = [
        client("1", lasts=100),
        server("2", "1", at=-1000, lasts=80, service="b"),
        client("3", "2", at=-990, lasts=20, service="b"),
    ]
    trace = node.ask("trace", spans=spans)
    assert path(trace) == [
        ("1", 0, 10),
        ("2", 10, 20),
        ("3", 20, 40),
        ("2", 40, 90),
        ("1", 90, 100),
    ]
    assert {step["shiftUs"] for step in trace["path"]} == {0, 1010}


# --- whatever the spans say ---

ids = st.sampled_from([f"{number:x}" for number in range(1, 9)])


@st.composite
def any_span(draw):
    made = {"traceId": "7" * 16, "id": draw(ids), "name": draw(st.text(max_size=3))}
    optional = {
        "parentId": ids,
        "kind": st.sampled_from(["CLIENT", "SERVER", "PRODUCER", "CONSUMER"]),
        "timestamp": st.integers(T0, T0 + 200),
        "duration": st.integers(1, 200),
        "shared": st.booleans(),
        "localEndpoint": st.fixed_dictionaries(
            {}, optional={"serviceName": st.sampled_from("abc"), "port": st.just(80)}
        ),
        "tags": st.dictionaries(
            st.sampled_from(["error", "podspan.connect_us", "podspan.wait_us"]),
            st.sampled_from(["", "5", "-5", "1e9", "x"]),
        ),
    }
    for key, values in optional.items():
        if draw(st.booleans()):
            made[key] = draw(values)
    return made


traces = st.lists(any_span(), min_size=1, max_size=24)


@settings(max_examples=200, deadline=None)
@given(spans=traces)
@example(spans=[client("1", "2", lasts=5), server("2", "1", at=-9, lasts=3)])
def test_every_span_is_in_one_row_and_parents_come_first(node, spans):
    trace = node.ask("trace", spans=spans)
    rows = trace["rows"]
    placed = sorted(number for row in rows for number in row["spans"])
    assert placed == list(range(len(spans)))
    for index, row in enumerate(rows):
        parent = row["parent"]
        if parent is None:
            assert row["depth"] == 0
            continue
        assert parent < index < row["endIndex"] <= rows[parent]["endIndex"]
        assert row["depth"] == rows[parent]["depth"] + 1


@settings(max_examples=200, deadline=None)
@given(spans=traces, data=st.data())
def test_the_order_in_which_spans_come_does_not_matter(node, spans, data):
    def told(these):
        rows = node.ask("trace", spans=these)["rows"]
        return [
            (row["depth"], row["trouble"], [these[number] for number in row["spans"]])
            for row in rows
        ]

    # Two spans that differ in nothing that orders them may change places.
    by_order = {(s["id"], s.get("kind"), s.get("timestamp")): s for s in spans}.values()
    alone = list(by_order)
    assert told(alone) == told(data.draw(st.permutations(alone)))


@settings(max_examples=200, deadline=None)
@given(spans=traces)
def test_the_path_fills_the_roots_duration_without_overlap(node, spans):
    trace = node.ask("trace", spans=spans)
    first = spans[trace["rows"][trace["root"]]["spans"][0]]
    steps = trace["path"]
    took = sum(step["endUs"] - step["startUs"] for step in steps)
    assert took == first.get("duration", 0)
    assert all(step["startUs"] < step["endUs"] for step in steps)
    for before, after in itertools.pairwise(steps):
        assert before["endUs"] == after["startUs"]


@settings(max_examples=200, deadline=None)
@given(spans=traces)
def test_the_parts_of_a_hop_are_never_negative(node, spans):
    for row in node.ask("trace", spans=spans)["rows"]:
        if row["hop"]:
            assert all(part["us"] >= 0 for part in row["hop"]["parts"])


@settings(max_examples=100, deadline=None)
@given(spans=traces, closed=st.sets(st.integers(0, 23)))
def test_a_collapsed_row_hides_what_is_below_it_and_nothing_else(node, spans, closed):
    trace = node.ask("trace", spans=spans, collapsed=sorted(closed))
    rows = trace["rows"]

    def hidden(index):
        parent = rows[index]["parent"]
        return parent is not None and (parent in closed or hidden(parent))

    expected = [index for index in range(len(rows)) if not hidden(index)]
    assert trace["visible"] == expected


# --- what rows tell ---


def test_a_hop_seen_at_both_ends_adds_up_to_connecting_and_the_clients_duration(node):
    spans = [
        client("1", lasts=100, tags={"podspan.connect_us": "30"}),
        server(
            "2",
            "1",
            at=10,
            lasts=80,
            tags={
                "podspan.request_us": "5",
                "podspan.wait_us": "60",
                "podspan.response_us": "15",
            },
        ),
    ]
    (row,) = node.ask("trace", spans=spans)["rows"]
    parts = {part["part"]: part["us"] for part in row["hop"]["parts"]}
    assert parts == {
        "connect": 30,
        "request": 5,
        "network": 20,
        "wait": 60,
        "response": 15,
    }
    assert row["hop"]["totalUs"] == sum(parts.values()) == 130
    assert row["hop"]["networkUs"] == 20


def test_a_hop_seen_at_the_client_only_does_not_tell_network_from_server(node):
    tags = {"podspan.request_us": "5", "podspan.wait_us": "80"}
    (row,) = node.ask("trace", spans=[client("1", lasts=100, tags=tags)])["rows"]
    parts = [(part["part"], part["us"]) for part in row["hop"]["parts"]]
    assert parts == [("request", 5), ("waitSeen", 80), ("rest", 15)]
    assert row["hop"]["networkUs"] is None


def test_a_server_of_another_tracer_is_all_wait(node):
    spans = [client("1", lasts=100), server("2", "1", at=10, lasts=80)]
    (row,) = node.ask("trace", spans=spans)["rows"]
    parts = [(part["part"], part["us"]) for part in row["hop"]["parts"]]
    assert parts == [("network", 20), ("wait", 80)]


def test_a_server_that_outlasts_its_client_says_how_much(node):
    spans = [client("1", lasts=100), server("2", "1", at=10, lasts=180)]
    (row,) = node.ask("trace", spans=spans)["rows"]
    assert row["hop"]["networkUs"] == -80


def test_connecting_is_part_of_a_tcp_connections_duration(node):
    tags = {"podspan.connect_us": "30", "podspan.first_response_us": "20"}
    (row,) = node.ask("trace", spans=[client("1", lasts=100, tags=tags)])["rows"]
    parts = [(part["part"], part["us"]) for part in row["hop"]["parts"]]
    assert parts == [("connect", 30), ("firstResponse", 20), ("rest", 50)]
    assert row["hop"]["totalUs"] == 100


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ({"http.method": "GET", "http.url": "http://a:80/x?y=1"}, "GET /x?y=1"),
        ({"http.method": "GET", "http.url": "http://a"}, "GET /"),
        (
            {"http.request.method": "PUT", "url.path": "/x", "url.query": "y=1"},
            "PUT /x?y=1",
        ),
        ({"http.method": "GET", "http.path": "/x"}, "GET /x"),
        ({"http.method": "GET"}, "get"),
        ({}, "get"),
    ],
)
def test_an_operation_is_method_and_path_where_tags_tell(node, tags, told):
    (row,) = node.ask("trace", spans=[span("1", tags=tags)])["rows"]
    assert row["operation"] == told


@pytest.mark.parametrize("query", ["REVIEWS", "http.url=x", "reviews-v1", "beef", "ss"])
def test_search_finds_names_ids_tags_and_annotations(node, query):
    spans = [
        span("1"),
        span(
            "beef",
            "1",
            service="reviews-v1",
            tags={"http.url": "x"},
            annotations=[{"timestamp": T0, "value": "ss"}],
        ),
    ]
    assert node.ask("trace", spans=spans, query=query)["found"] == [1]


def test_search_for_nothing_finds_nothing(node):
    assert node.ask("trace", spans=[span("1")], query="  ")["found"] == []


def test_the_row_of_a_span_is_found_by_either_half(node):
    spans = [client("1", lasts=100), server("2", "1", at=10, lasts=80)]
    assert [node.ask("trace", spans=spans, wanted=i)["wanted"] for i in "129"] == [
        0,
        0,
        None,
    ]


# --- size ---


@pytest.mark.parametrize(
    "parent_of",
    [
        pytest.param(lambda number: number - 1, id="chain"),
        pytest.param(lambda number: 0, id="fan"),
        pytest.param(lambda number: (number - 1) // 4, id="tree"),
    ],
)
def test_10_000_calls_have_their_rows(node, parent_of):
    spans = []
    for number in range(10_000):
        parent = f"{parent_of(number) + 1:x}" if number else ""
        at, lasts = number, 30_000 - 2 * number
        spans.append(client(f"{number + 1:x}", parent, at=at, lasts=lasts))
        half = server(f"{number + 1:x}", parent, at=at, lasts=lasts - 1, shared=True)
        spans.append(half)
    trace = node.ask("trace", spans=spans)
    assert len(trace["rows"]) == 10_000
    print(f"\n20,000 spans to rows and path: {trace['tookMs']:.0f} ms")


def test_10_000_spans_with_one_id_have_their_rows(node):
    spans = [server("1", "1", at=number, lasts=5) for number in range(10_000)]
    trace = node.ask("trace", spans=spans)
    assert len(trace["rows"]) == 10_000
    print(f"\n10,000 spans with one id: {trace['tookMs']:.0f} ms")


# --- the graph ---


def edges(*pairs):
    return [{"parent": parent, "child": child} for parent, child in pairs]


def places(drawing):
    return {node["name"]: (node["x"], node["y"]) for node in drawing["nodes"]}


NODE_WIDTH = 164
BOOKINFO = edges(
    ("gateway", "productpage"),
    ("productpage", "details"),
    ("productpage", "reviews"),
    ("reviews", "ratings"),
)


def test_callers_stand_left_of_what_they_call(node):
    x = {name: at[0] for name, at in places(node.ask("layout", edges=BOOKINFO)).items()}
    assert x["gateway"] < x["productpage"] < x["reviews"] < x["ratings"]
    assert x["details"] == x["reviews"]


def test_no_edges_draw_nothing(node):
    drawing = node.ask("layout", edges=[])
    assert (drawing["nodes"], drawing["edges"]) == ([], [])


def test_an_edge_that_closes_a_cycle_goes_back(node):
    drawing = node.ask("layout", edges=edges(("a", "b"), ("b", "c"), ("c", "a")))
    back = [edge["edge"] for edge in drawing["edges"] if edge["back"]]
    assert back == edges(("c", "a"))
    (line,) = [edge["points"] for edge in drawing["edges"] if edge["back"]]
    assert line[0][0] > line[-1][0]


def test_a_service_that_calls_itself_has_a_loop(node):
    drawing = node.ask("layout", edges=edges(("a", "a")))
    assert len(drawing["nodes"]) == len(drawing["edges"]) == 1


names = st.sampled_from("abcdefgh")
graphs = st.lists(st.tuples(names, names), unique=True, max_size=30)


@settings(max_examples=100, deadline=None)
@given(pairs=graphs, data=st.data())
def test_the_same_edges_give_the_same_drawing(node, pairs, data):
    drawing = node.ask("layout", edges=edges(*pairs))
    shuffled = data.draw(st.permutations(pairs))
    again = node.ask("layout", edges=edges(*shuffled))
    del drawing["tookMs"], again["tookMs"]
    assert drawing == again


@settings(max_examples=100, deadline=None)
@given(pairs=graphs)
def test_services_do_not_overlap_and_edges_end_at_them(node, pairs):
    drawing = node.ask("layout", edges=edges(*pairs))
    at = {node["name"]: node for node in drawing["nodes"]}
    assert set(at) == {name for pair in pairs for name in pair}
    for one, other in itertools.combinations(at.values(), 2):
        apart = one["y"] + one["height"] <= other["y"]
        apart = apart or other["y"] + other["height"] <= one["y"]
        assert one["x"] != other["x"] or apart
    for one in at.values():
        assert 0 <= one["x"] <= drawing["width"] - NODE_WIDTH
        assert 0 <= one["y"] <= drawing["height"] - one["height"]
    assert len(drawing["edges"]) == len(pairs)
    for line in drawing["edges"]:
        ends = line["edge"]["parent"], line["edge"]["child"]
        for name, (x, y) in zip(
            ends, (line["points"][0], line["points"][-1]), strict=True
        ):
            assert at[name]["x"] <= x <= at[name]["x"] + NODE_WIDTH
            assert at[name]["y"] <= y <= at[name]["y"] + at[name]["height"]


def test_edges_at_a_service_do_not_lie_upon_each_other(node):
    fan = edges(*(("hub", name) for name in "abcdefgh"), ("gateway", "hub"))
    drawing = node.ask("layout", edges=fan)
    leaving = [
        line["points"][0][1]
        for line in drawing["edges"]
        if line["edge"]["parent"] == "hub"
    ]
    distances = [b - a for a, b in itertools.pairwise(sorted(leaving))]
    assert min(distances) >= 13


def test_a_tree_has_no_crossing_edges(node):
    tree = edges(*((f"{n // 3:02}", f"{n:02}") for n in range(1, 40)))
    drawing = node.ask("layout", edges=tree)
    at = places(drawing)
    for one, other in itertools.combinations(drawing["edges"], 2):
        (a, b), (c, d) = (
            (at[line["edge"]["parent"]], at[line["edge"]["child"]])
            for line in (one, other)
        )
        if a[0] == c[0]:
            assert (a[1] - c[1]) * (b[1] - d[1]) >= 0


def test_300_services_and_2000_edges_are_laid_out(node):
    random = Random(1)
    names = [f"s{number:03}" for number in range(300)]
    pairs = {tuple(random.choices(names, k=2)) for _ in range(2_000)}
    many = edges(*sorted(pairs))
    drawing = node.ask("layout", edges=many)
    assert len(drawing["edges"]) == len(many)
    took = drawing["tookMs"]
    print(f"\n{len(drawing['nodes'])} services, {len(many)} edges: {took:.0f} ms")


def test_a_neighbourhood_is_who_calls_whom_is_called_and_what_is_between(node):
    all_edges = [*BOOKINFO, *edges(("details", "reviews"), ("ratings", "mongo"))]
    near = node.ask("neighbourhood", edges=all_edges, service="productpage")
    assert near == [*BOOKINFO[:3], *edges(("details", "reviews"))]
