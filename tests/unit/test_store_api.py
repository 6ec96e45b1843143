"""Zipkin's API, ours, and the viewer's files, over HTTP and a real database.

Statuses, defaults and texts of /api/v2/ are those of Zipkin 3.6.1's server.
"""

import gzip
import json
import time
from pathlib import Path

import pytest
from podspan.agent.store import viewer_files
from podspan.agent.store.zipkin_v2 import parse_json
from prometheus_client.parser import text_string_to_metric_families
from unit.store_server import running_store
from unit.test_store_zipkin_v2 import EXAMPLES, proto_message

NOW_US = time.time_ns() // 1000
NOW_MS = NOW_US // 1000


@pytest.fixture
def store(tmp_path):
    with running_store(tmp_path) as store:
        yield store


def span(trace, number, parent=0, service="web", remote="", **more):
    made = {
        "traceId": f"{trace:016x}",
        "id": f"{number:016x}",
        "timestamp": NOW_US - 1_000_000 + number,
        "localEndpoint": {"serviceName": service},
        **more,
    }
    if parent:
        made["parentId"] = f"{parent:016x}"
    if remote:
        made["remoteEndpoint"] = {"serviceName": remote}
    return made


SHOP = [
    span(1, 1, service="web", kind="SERVER", name="get /", duration=9000),
    span(
        1, 2, 1, service="web", remote="cart", kind="CLIENT", name="get", duration=5000
    ),
    span(
        1,
        3,
        2,
        service="cart",
        kind="SERVER",
        name="get",
        duration=4000,
        tags={"error": "500", "http.method": "GET"},
    ),
]
OTHER = [span(2, 1, service="mail", kind="SERVER", name="send", duration=10)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Two traces, which no test changes."""
    with running_store(tmp_path_factory.mktemp("shop")) as shop:
        assert shop.post(SHOP + OTHER).status == 202
        yield shop


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_zipkins_examples_round_trip(store, example):
    body = example.read_bytes()
    assert store.post(body).status == 202
    spans = json.loads(body)
    answer = store.get(f"/api/v2/trace/{spans[0]['traceId']}")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == spans


@pytest.mark.parametrize("body", [b"", b"[]", b" [ ] "])
def test_no_spans_are_accepted(store, body):
    answer = store.post(body)
    assert (answer.status, answer.body) == (202, b"")


def test_gzip_is_unpacked(store):
    body = json.dumps(OTHER).encode()
    members = gzip.compress(body[:20]) + gzip.compress(body[20:])
    assert store.post(members, Content_Encoding="gzip").status == 202
    assert store.get("/api/v2/services").json == ["mail"]


@pytest.mark.parametrize("form", ["application/x-protobuf", "application/protobuf"])
def test_protobuf_is_read(store, form):
    body = proto_message({"trace_id": b"\1", "id": b"\2", "name": "x"})
    assert store.post(body, Content_Type=form).status == 202
    assert store.get("/api/v2/trace/1").json == [
        {"traceId": "0" * 14 + "01", "id": "0" * 14 + "02", "name": "x"}
    ]


@pytest.mark.parametrize(
    "form", ["", "application/json; charset=utf-8", "Application/JSON"]
)
def test_json_is_read_under_its_names(store, form):
    assert store.post(OTHER, Content_Type=form).status == 202


def test_one_bad_span_keeps_none_of_its_message(store):
    answer = store.post([*OTHER, {"traceId": "1"}])
    assert answer.status == 400
    assert answer.text == "Missing: id: span 1 of the list\n"
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert store.get("/api/v2/services").json == []


def test_names_are_sorted(shop):
    assert shop.get("/api/v2/services").json == ["cart", "mail", "web"]
    assert shop.get("/api/v2/spans?serviceName=Web").json == ["get", "get /"]
    assert shop.get("/api/v2/remoteServices?serviceName=web").json == ["cart"]
    assert shop.get("/api/v2/spans?serviceName=").json == []


def test_names_are_cached_once_there_are_more_than_three_services(store):
    store.post([span(1, n, service=name) for n, name in enumerate("abc", 1)])
    assert "Cache-Control" not in store.get("/api/v2/services").headers
    store.post([span(1, 4, service="d")])
    for path in ("/api/v2/services", "/api/v2/spans?serviceName=a"):
        caching = store.get(path).headers["Cache-Control"]
        assert caching == "max-age=300, must-revalidate"


def found(store, query):
    return sorted(
        {int(span["traceId"], 16) for trace in store.get(query).json for span in trace}
    )


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [1, 2]),
        ("serviceName=CART", [1]),
        ("serviceName=web&remoteServiceName=cart", [1]),
        ("serviceName=cart&remoteServiceName=cart", []),
        ("spanName=send", [2]),
        ("spanName=all", [1, 2]),
        ("annotationQuery=error", [1]),
        ("annotationQuery=error%20and%20http.method%3DGET", [1]),
        ("annotationQuery=http.method=PUT", []),
        ("minDuration=5000", [1]),
        ("minDuration=5&maxDuration=10", [2]),
        ("minDuration=&endTs=", [1, 2]),
        (f"endTs={NOW_MS - 3_600_000}", []),
        (f"endTs={NOW_MS + 86_400_000 * 3}", []),
        (f"endTs={NOW_MS + 86_400_000 * 3}&lookback={86_400_000 * 4}", [1, 2]),
        ("serviceName=web&serviceName=mail", [1]),
        ("limit=%2B5&unknown=1", [1, 2]),
    ],
)
def test_search(shop, query, expected):
    assert found(shop, f"/api/v2/traces?{query}") == expected


def test_search_returns_whole_traces_and_ten_by_default(store):
    store.post([span(n, k) for n in range(1, 13) for k in (1, 2)])
    traces = store.get("/api/v2/traces").json
    assert [len(trace) for trace in traces] == [2] * 10
    assert len(store.get("/api/v2/traces?limit=12").json) == 12


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/api/v2/traces?limit=0", "limit <= 0"),
        ("/api/v2/traces?limit=ten", "limit is no integer: 'ten'"),
        ("/api/v2/traces?endTs=0", "endTs <= 0"),
        ("/api/v2/traces?endTs=1.5", "endTs is no integer: '1.5'"),
        ("/api/v2/traces?lookback=-1", "lookback <= 0"),
        (f"/api/v2/traces?lookback={2**63}", f"lookback is no integer: '{2**63}'"),
        ("/api/v2/traces?minDuration=0", "minDuration <= 0"),
        ("/api/v2/traces?maxDuration=5", "maxDuration is only valid with minDuration"),
        ("/api/v2/traces?minDuration=9&maxDuration=5", "maxDuration < minDuration"),
        ("/api/v2/spans", "Mandatory parameter is missing: serviceName"),
        ("/api/v2/remoteServices", "Mandatory parameter is missing: serviceName"),
        ("/api/v2/dependencies", "Mandatory parameter is missing: endTs"),
        ("/api/v2/dependencies?endTs=", "endTs <= 0"),
        ("/api/v2/dependencies?endTs=1&lookback=0", "lookback <= 0"),
        ("/api/v2/autocompleteValues", "Mandatory parameter is missing: key"),
        ("/api/v2/autocompleteValues?key=", "key was empty"),
        ("/api/v2/trace/0", "traceId is all zeros"),
        ("/api/v2/trace/A", "traceId should be lower-hex encoded with no prefix"),
        ("/api/v2/traceMany", "Mandatory parameter is missing: traceIds"),
        ("/api/v2/traceMany?traceIds=", "traceIds parameter is empty"),
        (
            "/api/v2/traceMany?traceIds=a",
            "Use /api/v2/trace/{traceId} endpoint to retrieve a single trace",
        ),
        ("/api/v2/traceMany?traceIds=a,0a", "redundant traceId: 000000000000000a"),
        ("/api/v2/traceMany?traceIds=a,", "traceId is empty"),
        ("/api/podspan/v1/tail?after=-1", "after < 0"),
        ("/api/podspan/v1/summaries?limit=0", "limit <= 0"),
        ("/api/podspan/v1/edges", "Mandatory parameter is missing: endTs"),
    ],
)
def test_what_is_asked_wrongly_is_told(shop, target, reason):
    answer = shop.get(target)
    assert (answer.status, answer.text) == (400, f"{reason}\n")


def test_a_trace_by_its_id(shop):
    assert shop.get("/api/v2/trace/1").json == parse_json(json.dumps(SHOP).encode())
    answer = shop.get("/api/v2/trace/ff")
    assert (answer.status, answer.text) == (404, "00000000000000ff not found\n")


def test_many_traces_at_once(shop):
    traces = shop.get("/api/v2/traceMany?traceIds=2,1,ff").json
    assert sorted(map(len, traces)) == [1, 3]
    assert shop.get("/api/v2/traceMany?traceIds=fe,ff").json == []


def test_dependencies(shop):
    assert shop.get(f"/api/v2/dependencies?endTs={NOW_MS}").json == [
        {"parent": "web", "child": "cart", "callCount": 1, "errorCount": 1}
    ]
    before_ms = NOW_MS - 3_600_000
    assert shop.get(f"/api/v2/dependencies?endTs={before_ms}&lookback=1000").json == []


def test_no_errors_are_not_told(store):
    store.post([span(1, 1, remote="db", kind="CLIENT")])
    assert store.get(f"/api/v2/dependencies?endTs={NOW_MS}").json == [
        {"parent": "web", "child": "db", "callCount": 1}
    ]


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("/api/v2/autocompleteKeys", "/api/v2/autocompleteValues"),
        ("/api/podspan/v1/keys", "/api/podspan/v1/values"),
    ],
)
def test_autocomplete(shop, keys, values):
    assert shop.get(keys).json == ["error", "http.method"]
    assert shop.get(f"{values}?key=http.method").json == ["GET"]
    assert shop.get(f"{values}?key=unknown").json == []


def test_the_api_is_under_zipkin_too(shop):
    assert shop.get("/zipkin/api/v2/services").json == ["cart", "mail", "web"]
    assert shop.get("/zipkin/api/v2/trace/2").status == 200


@pytest.mark.parametrize("path", ["/config.json", "/zipkin/config.json"])
def test_the_configuration_that_zipkins_viewer_wants(shop, path):
    config = shop.get(path).json
    assert config["queryLimit"] == 10
    assert config["searchEnabled"] is True
    assert config["dependency"]["enabled"] is True


def test_edges_have_latencies(shop):
    assert shop.get(f"/api/podspan/v1/edges?endTs={NOW_MS}").json == [
        {
            "parent": "web",
            "child": "cart",
            "callCount": 1,
            "errorCount": 1,
            "p50Us": 4000,
            "p95Us": 4000,
            "p99Us": 4000,
        }
    ]


def test_summaries(shop):
    [summary] = shop.get("/api/podspan/v1/summaries?serviceName=cart").json
    assert summary == {
        "traceId": "0" * 15 + "1",
        "timestamp": SHOP[0]["timestamp"],
        "duration": 9000,
        "spanCount": 3,
        "errorCount": 1,
        "root": {"serviceName": "web", "name": "get /", "kind": "SERVER"},
        "services": [
            {"serviceName": "web", "spanCount": 2, "errorCount": 0},
            {"serviceName": "cart", "spanCount": 1, "errorCount": 1},
        ],
        "tags": {},
    }


def test_the_tail_begins_now_and_goes_on_from_its_cursor(store):
    start = store.get("/api/podspan/v1/tail").json
    assert (start["spans"], start["skipped"]) == ([], 0)
    store.post([span(3, n) for n in (1, 2, 3)])
    first = store.get(f"/api/podspan/v1/tail?after={start['cursor']}&limit=3").json
    assert [int(each["id"], 16) for each in first["spans"]] == [1, 2, 3]
    rest = store.get(f"/api/podspan/v1/tail?after={first['cursor']}").json
    assert (rest["spans"], rest["cursor"]) == ([], first["cursor"])


def test_health_and_info(shop):
    assert shop.get("/health").json["status"] == "UP"
    assert shop.get("/info").json["podspan"]["version"]


def test_metrics_are_prometheus(store):
    store.post(SHOP + OTHER)
    store.get("/nowhere")
    answer = store.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, sample.labels.get("code")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["podspan_store_spans_received_total", None] == 4
    assert samples["podspan_store_messages_total", None] == 1
    assert samples["podspan_store_spans", None] == 4
    assert samples["podspan_store_requests_total", "202"] == 1
    assert samples["podspan_store_requests_total", "404"] == 1


def test_a_database_that_fails_is_503(store, tmp_path):
    for path in tmp_path.glob("traces.db*"):
        path.write_bytes(b"\xff" * 65536)
    answers = [store.get("/api/v2/trace/1"), store.get("/health"), store.post(OTHER)]
    assert [answer.status for answer in answers] == [503, 503, 503]
    assert "traces.db" in answers[0].text
    assert answers[1].json["status"] == "DOWN"


def test_trouble_is_logged_once_however_often_senders_try(store, caplog):
    store.database.close()
    assert [store.post(OTHER).status for _ in range(3)] == [503, 503, 503]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/v2/services", "HEAD, GET"),
        ("DELETE", "/api/v2/spans", "HEAD, GET, POST"),
        ("POST", "/api/v2/traces", "HEAD, GET"),
        ("OPTIONS", "/api/v2/spans", "HEAD, GET, POST"),
        ("PATCH", "/api/v2/trace/1", "HEAD, GET"),
        ("TRACE", "/", "HEAD, GET"),
        ("BREW", "/health", "HEAD, GET"),
    ],
)
def test_other_methods_are_told_which_there_are(shop, method, path, allowed):
    answer = shop.ask(method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)


def test_head_is_get_without_a_body(shop):
    answer = shop.ask("HEAD", "/api/v2/services")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == str(len('["cart","mail","web"]'))


# Browsers


def test_another_sites_page_may_not_write(store):
    ours = f"http://127.0.0.1:{store.port}"
    assert store.post(OTHER, Origin=ours).status == 202
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert store.post(OTHER, Origin=origin).status == 403


def test_another_sites_page_may_not_read(shop):
    answer = shop.get("/api/v2/traces", Origin="http://evil.example")
    assert not [name for name in answer.headers if name.startswith("Access-Control")]
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9411", 200),
        ("[::1]:9411", 200),
        ("localhost", 200),
        ("podspan.localhost:1", 200),
        ("zipkin:9411", 200),
        ("host.docker.internal:9411", 200),
        ("evil.example:9411", 421),
        ("evil.example.", 421),
        ("[evil", 421),
        ("a@b.example", 421),
    ],
)
def test_on_loopback_a_host_is_local(shop, host, status):
    assert shop.get("/api/v2/services", Host=host).status == status


# The viewer


@pytest.fixture
def viewer(tmp_path, monkeypatch):
    folder = tmp_path / "viewer"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "app.js").write_text("export {};")
    (folder / ".hidden.js").write_text("secret")
    (folder / "notes.txt").write_text("secret")
    monkeypatch.setattr(viewer_files, "FOLDER", folder)


@pytest.mark.parametrize(
    "path",
    ["/", "/traces/463ac35c9f6413ad", "/dependencies", "/tail", "/?serviceName=a"],
)
def test_the_viewers_addresses_are_one_page(shop, viewer, path):
    answer = shop.get(path)
    assert (answer.status, answer.text) == (200, "<!doctype html>")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_file_is_sent_again_only_if_it_changed(shop, viewer):
    first = shop.get("/static/app.js")
    assert first.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    again = shop.get("/static/app.js", If_None_Match=f'"x", W/{tag}')
    assert (again.status, again.body) == (304, b"")
    (viewer_files.FOLDER / "app.js").write_text("export const changed = 1;")
    assert shop.get("/static/app.js", If_None_Match=tag).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/none.js",
        "/static/notes.txt",
        "/static/.hidden.js",
        "/static/../api.py",
        "/static/..%2fapi.py",
        "/static/%2e%2e/%2e%2e/__init__.py",
        "/static//etc/passwd",
        "/static/app.js/",
        "/traces/",
        "/traces/a/b",
        "/nowhere",
        "/index.html",
    ],
)
def test_nothing_but_the_viewers_files_is_served(shop, viewer, path):
    assert shop.get(path).status == 404


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ("/zipkin", "/"),
        ("/zipkin/", "/"),
        ("/zipkin/?serviceName=a&limit=5", "/?serviceName=a&limit=5"),
        ("/zipkin/traces/463ac35c9f6413ad", "/traces/463ac35c9f6413ad"),
        ("/zipkin/dependency", "/dependencies"),
        ("/zipkin/dependency/?endTs=1", "/dependencies?endTs=1"),
    ],
)
def test_links_to_zipkins_viewer_lead_here(shop, path, to):
    answer = shop.get(path)
    assert (answer.status, answer.headers["Location"]) == (302, to)


def test_the_package_has_no_file_the_viewer_cannot_be_sent():
    for path in Path(viewer_files.FOLDER).glob("*"):
        assert path.suffix in viewer_files.CONTENT_TYPES
