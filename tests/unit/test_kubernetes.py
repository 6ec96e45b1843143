"""Following pods: an API server that lists, watches, refuses, trickles and dies."""

import json
import logging
import random
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.pods import kubernetes
from podspan.agent.pods.kubernetes import (
    Cluster,
    Lines,
    LineTooLong,
    PodWatch,
    cluster_of,
)
from podspan.agent.pods.pod import SAMPLING
from unit.api_server import (
    NODE,
    PATIENCE_S,
    TOKEN,
    ApiServer,
    certificate,
    line,
    pod,
    status,
    stream,
    write_token,
)

ROTATED = "another.one"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture
def server(folder):
    made = ApiServer(folder)
    yield made
    made.stop()


@contextmanager
def watching(cluster, **settings):
    watch = PodWatch(
        cluster, **{"first_backoff_s": 0.01, "max_backoff_s": 0.05, **settings}
    )
    try:
        yield watch
    finally:
        watch.close()
        assert not watch._thread.is_alive()


def names(watch):
    return {pod.name for pod in watch.pods().values()}


def until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.002)


def until_names(watch, *expected):
    until(lambda: names(watch) == set(expected))


def until_watched(server):
    server.wait(lambda: server.watches)


def requests(server, kind):
    return [
        query for query in server.requests if ("watch" in query) == (kind == "watch")
    ]


def test_pods_that_are_there_that_come_change_and_go(server):
    web, db = pod("web"), pod("db")
    server.put(web)
    with watching(server.cluster) as watch:
        until_names(watch, "web")
        server.put(db)
        until_names(watch, "web", "db")
        server.put(pod("web", annotations={SAMPLING: "12.5"}))
        until(lambda: watch.pods()["uid-of-web"].sampling == 12.5)
        server.delete(server.pods["uid-of-web"])
        until_names(watch, "db")
    assert len(requests(server, "list")) == 1
    assert len(requests(server, "watch")) == 1


def test_only_this_nodes_pods_that_have_not_ended_are_asked_for(server):
    with watching(server.cluster):
        until_watched(server)
    listed, watched = server.requests
    selector = f"spec.nodeName={NODE},status.phase!=Succeeded,status.phase!=Failed"
    assert listed == {
        "fieldSelector": selector,
        "limit": "500",
        "resourceVersion": "0",
    }
    assert watched.pop("timeoutSeconds").isdecimal()
    assert watched == {
        "fieldSelector": selector,
        "watch": "1",
        "allowWatchBookmarks": "true",
        "resourceVersion": "1000",
    }


def test_a_list_in_pages_is_read_to_its_end(server):
    server.page = 10
    expected = [f"web-{number}" for number in range(23)]
    for name in expected:
        server.put(pod(name))
    with watching(server.cluster, page_pods=10) as watch:
        until_names(watch, *expected)
    assert [query.get("continue") for query in requests(server, "list")] == [
        None,
        "10",
        "20",
    ]


def test_a_snapshot_does_not_change(server):
    server.put(pod("web"))
    with watching(server.cluster) as watch:
        until_names(watch, "web")
        snapshot = watch.pods()
        server.put(pod("db"))
        until_names(watch, "web", "db")
    assert [pod.name for pod in snapshot.values()] == ["web"]


def test_a_watch_that_ends_goes_on_from_the_last_bookmark(server):
    with watching(server.cluster) as watch:
        until_watched(server)
        server.put(pod("web"))
        server.bookmark()
        server.put(pod("db"))
        server.bookmark()
        until_names(watch, "web", "db")
        server.end_watches()
        server.put(pod("late"))
        until_names(watch, "web", "db", "late")
    assert len(requests(server, "list")) == 1
    versions = [query["resourceVersion"] for query in requests(server, "watch")]
    assert versions == ["1000", "1005"]


def test_a_version_too_old_is_listed_again_and_from_etcd(server, caplog):
    old = pod("old")
    server.put(old)
    with watching(server.cluster) as watch:
        until_names(watch, "old")
        until_watched(server)
        server.faults = [status(503)] * 3  # meanwhile:
        server.end_watches()
        server.delete(old)
        server.put(pod("new"))
        server.forget()
        until_names(watch, "new")
    assert [query["resourceVersion"] for query in requests(server, "list")] == ["0", ""]
    assert "410" not in caplog.text  # it happens, and nothing is lost


GONE = stream(line("ERROR", {"code": 410, "message": "too old"}))


def test_a_version_too_old_costs_no_waiting(server):
    server.faults = [None, GONE]
    with watching(server.cluster, first_backoff_s=3600.0):
        until_watched(server)
    assert len(requests(server, "list")) == 2


def test_a_version_too_old_again_and_again_does(server):
    server.faults = [None, GONE, None, GONE]
    started_s = time.monotonic()
    with watching(server.cluster, first_backoff_s=0.4):
        until_watched(server)
    assert time.monotonic() - started_s >= 0.2  # half of it is jitter


def test_410_as_an_answer_is_the_same(server):
    server.put(pod("web"))
    server.faults = [status(410, "Expired"), None]
    with watching(server.cluster) as watch:
        until_names(watch, "web")
    assert [query["resourceVersion"] for query in requests(server, "list")] == ["0", ""]


def test_an_event_cut_in_the_middle_comes_again_whole(server):
    web = pod("web")
    event = line("ADDED", web)
    with watching(server.cluster) as watch:
        until_watched(server)
        server.faults = [
            stream(event[:100], end=False),
            stream(event[:100]),
            stream(b"", end=False),
        ]
        server.end_watches()
        server.wait(lambda: not server.faults)
        server.put(web)
        until_names(watch, "web")
    assert len(requests(server, "list")) == 1


def test_an_event_that_trickles_is_put_together(server):
    def trickle(handler):
        handler.begin_stream()
        for byte in line("ADDED", pod("web")):
            handler.chunk(bytes([byte]))
        server.wait(lambda: server.stopping or names(watch) == {"web"})
        handler.close_connection = True

    with watching(server.cluster) as watch:
        until_watched(server)
        server.faults = [trickle]
        server.end_watches()
        until_names(watch, "web")
        with server.changed:
            server.changed.notify_all()


def test_a_list_that_trickles_is_given_up(server, caplog):
    ended = threading.Event()

    def trickle(handler):
        handler.send_response(200)
        handler.send_header("content-length", "1000000")
        handler.end_headers()
        while not ended.wait(0.01):
            handler.wfile.write(b" ")

    server.put(pod("web"))
    server.faults = [trickle]
    with watching(server.cluster, list_timeout_s=0.2) as watch:
        until_names(watch, "web")
    ended.set()
    assert "a list took over 0.2 s" in caplog.text


def test_several_events_in_one_chunk_are_several(server):
    events = line("ADDED", pod("a")) + line("ADDED", pod("b"))
    with watching(server.cluster) as watch:
        until_watched(server)
        server.say(events)
        until_names(watch, "a", "b")


@pytest.mark.parametrize(
    "garbage",
    [
        b"{not json\n",
        b"\n",
        b"null\n",
        b"[]\n",
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":{"metadata":{"name":"x"}}}\n',
        b'{"type":"ERROR","object":{"code":500,"message":"etcdserver: no\\nleader"}}\n',
        b'{"type":"ERROR","object":{}}\n',
    ],
)
def test_after_garbage_all_is_listed_again(server, caplog, garbage):
    server.put(pod("web"))
    with watching(server.cluster) as watch:
        until_names(watch, "web")
        until_watched(server)
        server.faults = [stream(garbage)]
        server.end_watches()
        server.wait(lambda: len(requests(server, "list")) == 2)
        until_watched(server)
        server.put(pod("db"))
        until_names(watch, "web", "db")
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]
    assert len(caplog.messages[0]) < 700


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"metadata": {}},
        {"metadata": {"resourceVersion": 7}, "items": []},
        {"metadata": {"resourceVersion": "7"}, "items": {}},
    ],
)
def test_a_list_that_is_none_is_asked_for_again(server, caplog, body):
    server.put(pod("web"))
    server.faults = [lambda handler: handler.answer(200, body)]
    with watching(server.cluster) as watch:
        until_names(watch, "web")
    assert "a list" in caplog.text


def test_null_is_an_empty_list_of_pods(server):
    # Go marshals an empty slice that was never made as null.
    body = {"metadata": {"resourceVersion": "1000"}, "items": None}
    server.faults = [lambda handler: handler.answer(200, body)]
    with watching(server.cluster) as watch:
        until_watched(server)
        server.put(pod("web"))
        until_names(watch, "web")


def test_an_event_without_end_is_not_kept(server, monkeypatch, caplog):
    monkeypatch.setattr(kubernetes, "MAX_EVENT_BYTES", 100_000)
    server.put(pod("web"))
    with watching(server.cluster) as watch:
        until_watched(server)
        server.faults = [stream(*[b"x" * 10_000] * 11)]
        server.end_watches()
        server.wait(lambda: len(requests(server, "list")) == 2)
        assert names(watch) == {"web"}
    assert "an event of over 100000 bytes" in caplog.text


def test_a_token_that_was_replaced_is_read_again(server, caplog):
    server.put(pod("web"))
    server.token = ROTATED
    with watching(server.cluster) as watch:
        until(lambda: "HTTP 401 Unauthorized" in caplog.text)
        write_token(server.cluster.token_file, ROTATED)
        until_names(watch, "web")
    assert "is the service account's token mounted" in caplog.text


def test_a_watch_that_the_old_token_opened_is_opened_with_the_new_one(server):
    with watching(server.cluster) as watch:
        until_watched(server)
        server.token = ROTATED
        write_token(server.cluster.token_file, ROTATED)
        server.end_watches()
        server.put(pod("web"))
        until_names(watch, "web")
    assert len(requests(server, "list")) == 1


def test_a_missing_token_is_said_and_waited_for(server, caplog):
    server.cluster.token_file.unlink()
    server.put(pod("web"))
    with watching(server.cluster) as watch:
        until(lambda: "No such file" in caplog.text)
        write_token(server.cluster.token_file, TOKEN)
        until_names(watch, "web")


def test_a_token_that_is_none_is_not_sent_and_not_logged(server, caplog):
    server.cluster.token_file.write_text("secret\nmore")
    with watching(server.cluster):
        until(lambda: "no token in" in caplog.text)
    assert server.requests == []
    assert "secret" not in caplog.text


def test_a_role_without_watch_is_said_with_what_to_do(server, caplog):
    server.put(pod("web"))
    denied = 'pods is forbidden: User "x" cannot watch resource "pods"'
    server.faults = [None, *[status(403, denied)] * 5]
    with watching(server.cluster) as watch:
        until_names(watch, "web")
        server.wait(lambda: not server.faults)
        until_watched(server)
    assert len(requests(server, "list")) == 1
    assert len(caplog.messages) == 1
    assert f"error='HTTP 403 {denied}'" in caplog.text
    assert "the service account needs the verbs list and watch on pods" in caplog.text


def test_another_trouble_is_said_at_once_and_the_same_one_later(server, caplog):
    server.faults = [status(401)] * 3 + [status(403)] * 3
    with watching(server.cluster):
        until_watched(server)
    said = [text.partition("error=")[2][:10] for text in caplog.messages]
    assert said == ["'HTTP 401'", "'HTTP 403'"]


def test_retry_after_is_kept(server):
    server.put(pod("web"))
    server.faults = [status(429, "too many", retry_after="1")]
    started_s = time.monotonic()
    with watching(server.cluster) as watch:
        until_names(watch, "web")
    assert time.monotonic() - started_s >= 1.0
    assert len(requests(server, "list")) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        ("-1", 0),
        ("9" * 30, 300),
        ("\u0661", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after(text, seconds):
    assert kubernetes._retry_after_s(text) == seconds


def test_a_watch_that_ends_at_once_again_and_again_is_slowed_down(server, caplog):
    server.faults = [None, *[stream()] * 5]
    with watching(server.cluster):
        server.wait(lambda: not server.faults)
        until_watched(server)
    assert caplog.text.count("the server ended the watch at once") == 1


def test_an_api_server_that_comes_late(folder, caplog):
    caplog.set_level(logging.INFO)
    gone = ApiServer(folder)
    gone.stop()
    with watching(gone.cluster) as watch:
        until(lambda: "Connection refused" in caplog.text)
        assert names(watch) == set()
        late = ApiServer(folder, gone.port)
        late.put(pod("web"))
        try:
            until_names(watch, "web")
            late.bookmark()
            until(lambda: "tells us of pods again" in caplog.text)
            warnings = [
                entry for entry in caplog.records if entry.levelname == "WARNING"
            ]
        finally:
            late.stop()
    assert len(warnings) == 1  # however many tries there were
    text = warnings[0].getMessage()
    assert "hint='is the API server up" in text
    assert f"url={gone.cluster.url} node={NODE} known=0" in text
    assert "object at 0x" not in text


def test_an_api_server_that_restarts_leaves_the_pods_known(folder):
    first = ApiServer(folder)
    first.put(pod("web"))
    with watching(first.cluster) as watch:
        until_names(watch, "web")
        first.stop()
        assert names(watch) == {"web"}
        second = ApiServer(folder, first.port)
        second.oldest = 2000
        second.version = 3000
        second.put(pod("db"))
        try:
            until_names(watch, "db")
        finally:
            second.stop()


def test_a_server_that_another_ca_vouches_for_learns_no_token(server, tmp_path, caplog):
    _, other = certificate(tmp_path)
    with watching(replace(server.cluster, ca_file=other)):
        until(lambda: "certificate verify failed" in caplog.text)
    assert server.requests == []


def test_a_ca_that_was_replaced_is_read_again(server, tmp_path, caplog):
    server.put(pod("web"))
    own = server.cluster.ca_file.read_text()
    ca_file = tmp_path / "ca.crt"
    with watching(replace(server.cluster, ca_file=ca_file)) as watch:
        until(lambda: "No such file" in caplog.text)
        ca_file.write_text(own)
        until_names(watch, "web")


def test_a_malformed_annotation_is_said_once_per_value(server, caplog):
    def annotated(text):
        return pod("web", annotations={SAMPLING: text})

    with watching(server.cluster) as watch:
        until_watched(server)
        server.put(annotated("all"))
        server.put(annotated("all"))  # its status changed, say
        server.put(annotated("12%"))
        server.put(annotated("12"))
        until(lambda: "uid-of-web" in watch.pods())
        until(lambda: watch.pods()["uid-of-web"].sampling == 12)
    assert [text.partition(" hint=")[0] for text in caplog.messages] == [
        "pods: annotation ignored: pod=default/web podspan.io/sampling='all'",
        "pods: annotation ignored: pod=default/web podspan.io/sampling='12%'",
    ]


def test_close_leaves_no_connection(server):
    with watching(server.cluster) as watch:
        until_watched(server)
        assert len(watch._http.pools) == 1
    assert len(watch._http.pools) == 0


def test_close_of_a_watch_that_waits_takes_no_time(server):
    with watching(server.cluster) as watch:
        until_watched(server)
        started_s = time.monotonic()
        watch.close()
        assert time.monotonic() - started_s < kubernetes.CLOSE_S


def test_close_between_two_tries_takes_no_time(server, caplog):
    server.faults = [status(503, retry_after="300")]
    with watching(server.cluster) as watch:
        until(lambda: caplog.messages)
        started_s = time.monotonic()
        watch.close()
        assert time.monotonic() - started_s < kubernetes.CLOSE_S


def test_what_is_not_read_is_not_kept():
    text = json.dumps({"items": [pod("web", labels={"app": "a", "x": "y" * 1000})]})
    [kept] = kubernetes._decode(text.encode())["items"]
    assert kept["metadata"]["labels"] == {"app": "a"}
    assert "managedFields" not in kept["metadata"]
    assert kept["spec"] == {}


@given(st.lists(st.binary(max_size=5).filter(lambda b: b"\n" not in b)), st.integers())
def test_lines_are_the_same_however_they_are_cut(lines, seed):
    rng = random.Random(seed)
    text = b"".join(part + b"\n" for part in lines)
    found: list[bytes] = []
    feed, at = Lines(100), 0
    while at < len(text):
        size = rng.randint(1, 7)
        found += feed.feed(text[at : at + size])
        at += size
    assert found == lines


def test_a_line_of_the_most_bytes_is_one_and_of_one_more_is_none():
    assert list(Lines(3).feed(b"abc\nabc")) == [b"abc"]
    with pytest.raises(LineTooLong):
        list(Lines(3).feed(b"abc\nabcd"))


IN_POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "KUBERNETES_SERVICE_PORT": "6443",
    "NODE_NAME": NODE,
}


def test_a_pod_finds_its_cluster_in_the_environment():
    mounted = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    assert cluster_of(IN_POD) == Cluster(
        "https://10.96.0.1:6443", NODE, mounted / "token", mounted / "ca.crt"
    )


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("10.96.0.1", "443", "https://10.96.0.1:443"),
        ("fd00::1", "6443", "https://[fd00::1]:6443"),
        ("kubernetes.default", "", "https://kubernetes.default:443"),
    ],
)
def test_the_url_of_the_api(host, port, url):
    where = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    cluster = cluster_of({**IN_POD, **where})
    assert cluster is not None
    assert cluster.url == url


def test_outside_of_a_cluster_there_is_none_and_nothing_to_say(caplog):
    assert cluster_of({}) is None
    assert cluster_of({"NODE_NAME": NODE}) is None
    assert caplog.messages == []


def test_a_pod_that_does_not_know_its_node_is_told_how(caplog):
    assert cluster_of({**IN_POD, "NODE_NAME": ""}) is None
    assert "hint='set it from spec.nodeName" in caplog.text
