"""Istio's metrics from exchanges, as Prometheus reads them."""

import threading
from dataclasses import replace

import pytest
from podspan.agent import istio_metrics, workloads
from podspan.agent.exchange import End, Exchange, Protocol
from podspan.agent.istio_metrics import BOUNDS, RequestMetrics
from podspan.agent.metrics import Format, exposition
from podspan.agent.pods.names import ServiceNames
from unit.kernel_struct import exchange_record
from unit.test_metrics import PARSERS
from unit.test_names import Time
from unit.test_workloads import HOST, RATINGS, REVIEWS, of_pod

TRACE = "463ac35c9f6413ad48485a3953bb6124"  # exchange_record's
PODS = {
    REVIEWS: of_pod("reviews", "10.1.0.1"),
    RATINGS: of_pod("ratings", "10.1.0.2"),
}
TO_RATINGS = {
    "source_workload": "reviews-v1",
    "source_canonical_service": "reviews",
    "source_canonical_revision": "v1",
    "source_workload_namespace": "shop",
    "source_principal": "unknown",
    "source_app": "reviews",
    "source_version": "v1",
    "source_cluster": "unknown",
    "destination_workload": "ratings-v1",
    "destination_canonical_service": "ratings",
    "destination_canonical_revision": "v1",
    "destination_workload_namespace": "shop",
    "destination_principal": "unknown",
    "destination_app": "ratings",
    "destination_version": "v1",
    "destination_cluster": "unknown",
    "destination_service": "ratings.shop.svc.cluster.local",
    "destination_service_name": "ratings",
    "destination_service_namespace": "shop",
    "response_flags": "-",
}
HTTP = {"request_protocol": "http", "response_code": "200", "grpc_response_status": ""}


class Metrics:
    """What was observed, told in either format."""

    def __init__(self, directory, **options):
        names = ServiceNames(directory, pods_by_netns=lambda: PODS)
        self.clock = Time()
        self.requests = RequestMetrics(names, now_s=self.clock, **options)

    def observe(self, *exchanges):
        for exchange in exchanges:
            self.requests.observe(exchange)

    def samples(self, name, form=Format.OPENMETRICS):
        text = "".join(exposition(self.requests.families(), form))
        families = PARSERS[form](text)
        return [one for each in families for one in each.samples if one.name == name]

    def sample(self, name):
        [found] = self.samples(name)
        return found

    def total(self, name, **labels):
        found = self.samples(name)
        return sum(o.value for o in found if labels.items() <= o.labels.items())


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "netns")


def client(**fields):
    fields = {"netns": REVIEWS, "peer_addr": "10.1.0.2", "host": b"ratings", **fields}
    return Exchange.from_kernel(exchange_record(local_addr="10.1.0.1", **fields))


def server(**fields):
    ends = {"netns": RATINGS, "local_addr": "10.1.0.2", "peer_addr": "10.1.0.1"}
    fields = {"role": 2, "host": b"ratings:9080", **ends, **fields}
    return Exchange.from_kernel(exchange_record(**fields))


def stream(**fields):
    """A stream of HTTP/2, as a worker tells of it."""
    return replace(client(), protocol=Protocol.HTTP2, **fields)


def connection(end=End.CLOSED_HERE, **fields):
    return client(protocol=2, end=int(end), status=0, host=b"", **fields)


def test_a_request_seen_from_both_ends(metrics):
    metrics.observe(client(), server())
    source, destination = metrics.samples("istio_requests_total")
    assert source.labels == {
        **TO_RATINGS,
        **HTTP,
        "reporter": "source",
        "connection_security_policy": "unknown",
    }
    assert destination.labels == {
        **TO_RATINGS,
        **HTTP,
        "reporter": "destination",
        "connection_security_policy": "none",
    }
    assert (source.value, destination.value) == (1, 1)


def test_a_peer_that_is_not_known_is_what_istio_writes(metrics):
    metrics.observe(client(peer_addr="10.96.0.1", host=b"10.96.0.1"))
    labels = metrics.sample("istio_requests_total").labels
    assert {key: labels[key] for key in labels if key.startswith("destination")} == {
        **{key: "unknown" for key in TO_RATINGS if key.startswith("destination")},
        "destination_canonical_revision": "latest",
    }


def test_unsampled_requests_count_and_are_no_examples(metrics):
    metrics.observe(client(flags=0), client(flags=2))
    sample = metrics.sample("istio_requests_total")
    assert (sample.value, sample.exemplar) == (2, None)
    buckets = metrics.samples("istio_request_duration_milliseconds_bucket")
    assert not any(one.exemplar for one in buckets)


def test_the_newest_sampled_request_is_its_buckets_example(metrics):
    metrics.observe(client(trace_id_low=1), client(), client(flags=0))
    took_us = (client().response_last_ns - client().request_first_ns) // 1000
    buckets = metrics.samples("istio_request_duration_milliseconds_bucket")
    [(le, exemplar)] = [(o.labels["le"], o.exemplar) for o in buckets if o.exemplar]
    assert exemplar.labels == {"trace_id": TRACE}
    assert exemplar.value == took_us / 1000 == 4.2
    assert le == "5.0"
    assert float(exemplar.timestamp) == metrics.clock.now_s
    requests = metrics.sample("istio_requests_total")
    assert (requests.value, requests.exemplar.labels) == (3, {"trace_id": TRACE})


def test_examples_are_bounded(metrics, monkeypatch):
    monkeypatch.setattr(istio_metrics, "MAX_EXEMPLARS", 2)
    first = client().request_first_ns
    for ms in (1, 20, 300, 1):
        metrics.observe(client(response_last_ns=first + ms * 1_000_000))
    buckets = metrics.samples("istio_request_duration_milliseconds_bucket")
    assert [o.labels["le"] for o in buckets if o.exemplar] == ["1.0", "25.0"]


def test_an_observation_is_in_the_bucket_whose_bound_it_is(metrics):
    first = client().request_first_ns
    for ms in (0, 0.5, 0.500001, 1, 3_600_000, 3_600_001):
        metrics.observe(client(response_last_ns=first + int(ms * 1_000_000)))
    values = {
        one.labels["le"]: one.value
        for one in metrics.samples("istio_request_duration_milliseconds_bucket")
    }
    assert len(values) == len(BOUNDS) + 1
    assert (values["0.5"], values["1.0"], values["5.0"]) == (2, 4, 4)
    assert (values["3.6e+06"], values["+Inf"]) == (5, 6)
    assert metrics.total("istio_request_duration_milliseconds_count") == 6
    assert metrics.total("istio_request_duration_milliseconds_sum") == 7_200_003.0


def test_bodies_are_measured(metrics):
    metrics.observe(client(request_bytes=7, response_bytes=3000), client())
    assert metrics.total("istio_request_bytes_sum") == 7
    assert metrics.total("istio_response_bytes_sum") == 3000 + client().response_bytes
    assert metrics.total("istio_request_bytes_bucket", le="0.5") == 1
    assert metrics.total("istio_request_bytes_bucket", le="10.0") == 2
    assert metrics.total("istio_response_bytes_count") == 2


def test_impossible_sizes_end_nothing(metrics):
    metrics.observe(*[client(request_bytes=2**64 - 1)] * 2, client())
    metrics.observe(*[connection(response_bytes=2**64 - 1)] * 2)
    assert metrics.total("istio_requests_total") == 3
    assert metrics.total("istio_tcp_connections_closed_total") == 2


@pytest.mark.parametrize("end", ["request_first_ns", "response_last_ns"])
def test_without_both_moments_there_is_no_duration(metrics, end):
    metrics.observe(client(**{end: 0}))
    assert metrics.total("istio_requests_total") == 1
    assert metrics.total("istio_request_duration_milliseconds_count") == 0
    assert metrics.total("istio_response_bytes_count") == 1


def test_what_ended_without_a_response_has_code_0_and_says_why(metrics):
    metrics.observe(client(status=0, end=int(End.CLOSED_THERE)))
    labels = metrics.sample("istio_requests_total").labels
    assert (labels["response_code"], labels["response_flags"]) == ("0", "UC")


@pytest.mark.parametrize(
    ("told", "protocol", "status"),
    [
        ("", "http", ""),
        ("0", "grpc", "0"),
        ("14", "grpc", "14"),
        ("1x", "grpc", "unknown"),
    ],
)
def test_grpc(metrics, told, protocol, status):
    metrics.observe(stream(grpc_status=told))
    labels = metrics.sample("istio_requests_total").labels
    assert labels["request_protocol"] == protocol
    assert labels["grpc_response_status"] == status
    assert labels["response_code"] == "200"


def test_a_tcp_connection(metrics):
    metrics.observe(connection(request_bytes=10, response_bytes=400))
    for name, value in (
        ("sent_bytes", 400),
        ("received_bytes", 10),
        ("connections_opened", 1),
        ("connections_closed", 1),
    ):
        sample = metrics.sample(f"istio_tcp_{name}_total")
        assert sample.value == value
    assert sample.labels == {
        **TO_RATINGS,
        "destination_service": "unknown",  # as Istio's client, where none is configured
        "destination_service_name": "unknown",
        "reporter": "source",
        "request_protocol": "tcp",
        "connection_security_policy": "unknown",
    }
    assert metrics.samples("istio_requests_total") == []


def test_a_long_tcp_connection_is_opened_and_closed_once(metrics):
    part = connection(End.INTERVAL, request_bytes=1)
    opened, closed = (f"istio_tcp_connections_{what}_total" for what in TURNS)
    metrics.observe(part, part)
    assert (metrics.total(opened), metrics.total(closed)) == (1, 0)
    metrics.observe(connection(request_bytes=1), part, connection(sock=5))
    assert (metrics.total(opened), metrics.total(closed)) == (3, 2)
    assert metrics.total("istio_tcp_received_bytes_total") == 4


TURNS = ("opened", "closed")


def test_parted_connections_are_bounded_and_counted_once(metrics, monkeypatch):
    monkeypatch.setattr(istio_metrics, "MAX_PARTED", 1)
    for sock in (1, 2):
        metrics.observe(connection(End.INTERVAL, sock=sock), connection(sock=sock))
        metrics.observe(connection(End.INTERVAL, sock=9))
    for what in TURNS:
        expected = 3 if what == "opened" else 2
        assert metrics.total(f"istio_tcp_connections_{what}_total") == expected


def test_a_tcp_servers_connection_may_carry_tls(metrics):
    metrics.observe(server(protocol=2, end=int(End.CLOSED_THERE)))
    labels = metrics.sample("istio_tcp_connections_closed_total").labels
    assert labels["connection_security_policy"] == "unknown"
    assert labels["destination_service"] == "ratings"  # the canonical one, as Istio


def test_a_connection_that_failed_has_istios_flag(metrics):
    metrics.observe(connection(End.CONNECT_FAILED))
    labels = metrics.sample("istio_tcp_connections_opened_total").labels
    assert labels["response_flags"] == "UF"


def test_an_end_of_unknown_role_reports_nothing(metrics):
    metrics.observe(client(role=0))
    assert metrics.samples("istio_requests_total") == []


def test_series_are_bounded_and_what_is_beyond_is_counted(tmp_path):
    metrics = Metrics(tmp_path, max_series=3)
    metrics.observe(*(client(status=code) for code in (200, 201, 202, 203, 204)))
    metrics.observe(connection(), client(status=200))
    assert len(metrics.samples("istio_requests_total")) == 3
    assert metrics.total("istio_requests_total") == 4
    assert metrics.samples("istio_tcp_sent_bytes_total") == []
    assert metrics.requests.losses() == {"metrics_series": 3, "metrics_services": 0}
    dropped = metrics.total("podspan_metrics_dropped_total", reason="metrics_series")
    assert dropped == 3


def test_what_is_idle_gives_its_place_to_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(istio_metrics, "MAX_EXEMPLARS", 2)
    metrics = Metrics(tmp_path, max_series=2)
    metrics.observe(client(status=200), client(status=201))
    metrics.clock.now_s += istio_metrics.IDLE_S + 1
    metrics.observe(client(status=201), client(status=202), client(status=203))
    found = metrics.samples("istio_requests_total")
    assert {one.labels["response_code"] for one in found} == {"201", "202"}
    assert all(one.exemplar for one in found)
    assert metrics.total("istio_requests_total") == 3


def test_hosts_that_strangers_make_up_are_bounded(metrics, monkeypatch):
    monkeypatch.setattr(workloads, "MAX_HOSTS", 10)
    for number in range(1000):
        stranger = {"peer_addr": f"192.0.2.{number % 250}"}
        metrics.observe(server(host=b"h%d" % number, **stranger))
    metrics.observe(server())
    found = metrics.samples("istio_requests_total")
    services = {one.labels["destination_service_name"] for one in found}
    assert services == {*(f"h{number}" for number in range(10)), "ratings"}
    assert sum(one.value for one in found) == 1001
    assert metrics.requests.losses()["metrics_services"] == 990


def test_hostile_texts_stay_in_their_label(metrics):
    host = 'a"}1,b="é\'{'.encode()
    metrics.observe(client(host=host, peer_addr="10.9.9.9"))
    for form in Format:
        [sample] = metrics.samples("istio_requests_total", form)
        assert sample.labels["destination_service"] == host.decode()


def test_reading_while_counting(metrics):
    """Each histogram is whole at any moment, or the parser refuses it."""
    done = threading.Event()

    def count():
        for number in range(4000):
            metrics.observe(
                client(status=number % 20, netns=(REVIEWS, HOST)[number % 2])
            )
        done.set()

    thread = threading.Thread(target=count)
    thread.start()
    reads = 0
    while not done.is_set() or not reads:
        metrics.samples("istio_requests_total")
        reads += 1
    thread.join()
    assert metrics.total("istio_requests_total") == 4000
