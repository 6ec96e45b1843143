"""Flags and variables become one Config, or one clear sentence."""

import dataclasses

import pytest
from podspan.agent import config, values
from podspan.agent.config import (
    OPTIONS,
    STATUS_ADDRESS,
    Config,
    parse,
)
from podspan.agent.errors import UsageError
from podspan.agent.values import Address, Secret

DEFAULTS = Config(
    zipkin=None,
    zipkin_headers_file=None,
    zipkin_headers=None,
    otlp=None,
    otlp_headers_file=None,
    otlp_headers=None,
    otlp_encoding="protobuf",
    tls_ca=None,
    tls_cert=None,
    tls_key=None,
    json=None,
    tree=False,
    store=False,
    store_address=Address("127.0.0.1", 9411, named=False),
    store_max_age=7 * 86400,
    store_max_size=2 * 2**30,
    data_dir=None,
    spool_size=512 * 2**20,
    spool_sync="batch",
    netns=(),
    span_ids="shared",
    sampling=100.0,
    unsampled="0",
    propagate=frozenset({"b3multi"}),
    no_tcp=False,
    tcp_interval=0,
    tags="istio",
    max_path=256,
    no_query=False,
    max_connections=16384,
    engine="auto",
    redirect_workers=1,
    inbound_source="auto",
    heartbeat_interval=0.25,
    guard_grace=2.0,
    status_address=STATUS_ADDRESS,
    log_level="info",
    ready_file=None,
)


def test_defaults():
    assert parse([], {}) == DEFAULTS


def test_every_field_of_the_config_is_an_option():
    fields = [field.name for field in dataclasses.fields(Config)]
    assert [option.field for option in OPTIONS] == fields


def test_flags():
    argv = ["--zipkin", "http://z:9411", "--json=-", "--netns", "a*", "--netns", "b"]
    argv += ["--max-connections", "10", "--log-level", "DEBUG", "--ready-file", "r"]
    argv += ["--span-ids", "child", "--sampling", "0.29", "--unsampled", "defer"]
    argv += ["--propagate", "b3, tracecontext,b3", "--tcp-interval", "60"]
    argv += ["--tags", "OTEL", "--max-path", "64", "--no-query"]
    argv += ["--heartbeat-interval", "0.5", "--guard-grace", "1.5"]
    argv += ["--engine", "redirect", "--redirect-workers", "2"]
    argv += ["--inbound-source", "loopback", "--status-address", "[::1]:9000"]
    argv += ["--otlp", "https://o", "--otlp-encoding", "json", "--tls-ca", "ca"]
    argv += ["--tls-cert", "c", "--tls-key", "k", "--otlp-headers-file", "o.h"]
    argv += ["--zipkin-headers-file", "z.h", "--store", "--store-address", ":9411"]
    argv += ["--store-max-age", "36h", "--store-max-size", "10G", "--data-dir", "d"]
    argv += ["--spool-size", "0", "--spool-sync", "never"]
    assert parse(argv, {}) == Config(
        zipkin="http://z:9411",
        zipkin_headers_file="z.h",
        zipkin_headers=None,
        otlp="https://o",
        otlp_headers_file="o.h",
        otlp_headers=None,
        otlp_encoding="json",
        tls_ca="ca",
        tls_cert="c",
        tls_key="k",
        json="-",
        tree=False,
        store=True,
        store_address=Address("0.0.0.0", 9411),
        store_max_age=36 * 3600,
        store_max_size=10 * 2**30,
        data_dir="d",
        spool_size=0,
        spool_sync="never",
        netns=("a*", "b"),
        span_ids="child",
        sampling=0.29,
        unsampled="defer",
        propagate=frozenset({"b3", "tracecontext"}),
        no_tcp=False,
        tcp_interval=60,
        tags="otel",
        max_path=64,
        no_query=True,
        max_connections=10,
        engine="redirect",
        redirect_workers=2,
        inbound_source="loopback",
        heartbeat_interval=0.5,
        guard_grace=1.5,
        status_address=Address("::1", 9000),
        log_level="debug",
        ready_file="r",
    )
    assert parse(["--tree"], {}).tree
    assert parse(["--no-tcp"], {}).no_tcp


def test_variables():
    environment = {
        "PODSPAN_ZIPKIN": "http://z:9411",
        "PODSPAN_TREE": "1",
        "PODSPAN_NETNS": "a*, b",
        "PODSPAN_MAX_CONNECTIONS": "10",
        "PODSPAN_JSON": "",
        "PODSPAN_NO_QUERY": "true",
        "PODSPAN_PROPAGATE": "tracecontext",
    }
    assert parse([], environment) == dataclasses.replace(
        DEFAULTS, zipkin="http://z:9411", tree=True, netns=("a*", "b"),
        max_connections=10, no_query=True, propagate=frozenset({"tracecontext"}),
    )  # fmt: skip


def test_a_flag_beats_its_variable():
    environment = {"PODSPAN_NETNS": "a,b", "PODSPAN_LOG_LEVEL": "nonsense"}
    made = parse(["--netns", "c", "--log-level", "error"], environment)
    assert made.netns == ("c",)
    assert made.log_level == "error"


@pytest.mark.parametrize(
    ("text", "percent"),
    [("0", 0), ("0.01", 0.01), ("1.5", 1.5), ("33.33", 33.33), ("100.00", 100)],
)
def test_a_sampling_rate_is_a_percentage_to_the_hundredth(text, percent):
    assert parse(["--sampling", text], {}).sampling == percent


def test_a_grace_of_exactly_three_intervals_is_enough():
    made = parse(["--heartbeat-interval", "0.1", "--guard-grace", "0.3"], {})
    assert (made.heartbeat_interval, made.guard_grace) == (0.1, 0.3)


@pytest.mark.parametrize(
    "text",
    ["-1", "100.01", "0.001", "1e1", "1.", ".5", "nan", "50%", "101", "1_0", "٣"],
)
def test_what_is_no_sampling_rate(text):
    with pytest.raises(UsageError, match="use 0 to 100"):
        parse([f"--sampling={text}"], {})


@pytest.mark.parametrize(
    ("argv", "what", "hint"),
    [
        (["--jsn", "x"], "unknown option '--jsn'", "did you mean --json?"),
        (["--zzz"], "unknown option '--zzz'", "podspan agent --help"),
        (["--zip", "http://z"], "unknown option '--zip'", "--zipkin"),
        (["extra"], "unknown argument 'extra'", "--help"),
        (["--json"], "--json: expected one argument", "--help"),
        (["--json", ""], "bad value '' for --json: it is empty", "--help"),
        (["--max-connections", "0"], "'0' for --max-connections", "--help"),
        (["--max-connections", "1_0"], "'1_0' for --max-connections", "--help"),
        (["--max-connections", "9999999"], "from 1 to 1048576", "--help"),
        (["--span-ids", "own"], "use one of shared, child", "--help"),
        (["--unsampled", "1"], "use one of 0, defer", "--help"),
        (["--propagate", "b3,jaeger"], "b3multi, b3, tracecontext", "--help"),
        (["--propagate", ","], "use one or more of b3multi", "--help"),
        (["--tags", "envoy"], "use one of istio, otel", "--help"),
        (["--max-path", "0"], "use a number from 1 to 256", "--help"),
        (["--max-path", "257"], "use a number from 1 to 256", "--help"),
        (["--tcp-interval", "-1"], "use a number from 0 to 86400", "--help"),
        (["--tcp-interval", "1", "--no-tcp"], "--no-tcp for none", "leave one off"),
        (["--heartbeat-interval", "0.09"], "use 0.1 to 60 seconds", "--help"),
        (["--heartbeat-interval", "61"], "use 0.1 to 60 seconds", "--help"),
        (["--heartbeat-interval", "1e0"], "three decimals at most", "--help"),
        (["--guard-grace", "0.2"], "use 0.3 to 600 seconds", "--help"),
        (["--guard-grace", "601"], "use 0.3 to 600 seconds", "--help"),
        (["--guard-grace", "nan"], "three decimals at most", "--help"),
        (
            ["--guard-grace", "0.749"],
            "--guard-grace 0.749 is less than 3 times --heartbeat-interval 0.25",
            "--guard-grace 0.75 or more",
        ),
        (["--heartbeat-interval", "0.667"], "is less than 3 times", "2.001 or more"),
        (["--log-level", "loud"], "debug, info, warning, error", "--help"),
        (["--zipkin", "z:9411"], "not an http or https URL: 'z:9411'", "http://"),
        (["--zipkin", "http://"], "not a URL", "http://"),
        (["--otlp-headers-file", "h"], "nothing without --otlp", "leave it off"),
        (["--zipkin-headers-file", "h"], "nothing without --zipkin", "leave it off"),
        (["--tls-ca", "f"], "nothing without an https backend", "leave it off"),
        (["--otlp", "https://o", "--tls-key", "f"], "only together", "named twice"),
        (["--otlp-encoding", "thrift"], "use one of protobuf, json", "--help"),
        (["--store-address", "none"], "use ADDR:PORT or [IPV6]:PORT", "--help"),
        (["--store-max-age", "0d"], "use a time such as 90s", "--help"),
        (["--store-max-age", "7"], "use a time such as 90s", "--help"),
        (["--store-max-size", "2GB"], "use a size such as 1048576", "--help"),
        (["--store-max-size", "0"], "use at least 16MiB", "--help"),
        (["--spool-sync", "always"], "use one of never, segment, batch", "--help"),
        (["--json", "-", "--tree"], "both write to standard output", "--json spans"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(argv, what, hint):
    with pytest.raises(UsageError) as caught:
        parse(argv, {})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [("TREE", "maybe"), ("LOG_LEVEL", "loud"), ("MAX_CONNECTIONS", "-1")],
)
def test_a_bad_variable_is_named(name, text):
    with pytest.raises(UsageError, match=f"PODSPAN_{name}"):
        parse([], {f"PODSPAN_{name}": text})


def test_help_names_every_flag_and_variable_and_ends_with_examples():
    text = config.help_text()
    for option in OPTIONS:
        assert option.secret or f"  {option.flag} " in f"{text} "
        assert option.variable in text
    assert text.index("examples:") > text.index(OPTIONS[-1].flag)
    assert config.wants_help(["--zipkin", "-h"])
    assert not config.wants_help(["--zipkin"])


def test_secrets_come_by_variable_only_and_are_shown_nowhere():
    environment = {"PODSPAN_OTLP_HEADERS": "authorization=Bearer hunter2"}
    made = parse(["--otlp", "http://o"], environment)
    assert made.otlp_headers == Secret("authorization=Bearer hunter2")
    assert "hunter2" not in made.facts() + repr(made)
    assert "otlp_headers='(set)'" in made.facts()


@pytest.mark.parametrize(
    ("argv", "said", "hint"),
    [
        (["--otlp-headers", "a=hunter2"], "lists processes", "PODSPAN_OTLP_HEADERS,"),
        (["--otlp-headers=a=hunter2"], "lists processes", "--otlp-headers-file"),
        (["--otlp-header=a=hunter2"], "option '--otlp-header'$", "-headers-file?"),
    ],
)
def test_a_secret_among_the_arguments_is_not_repeated(argv, said, hint):
    with pytest.raises(UsageError, match=said) as caught:
        parse(argv, {})
    assert hint in caught.value.hint
    assert "hunter2" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], True),
        (["--zipkin", "http://z"], False),
        (["--otlp", "http://o"], False),
        (["--json", "x"], False),
        (["--tree"], False),
        (["--tree", "--store"], True),
    ],
)
def test_the_store_is_where_traces_go_without_a_place(argv, wanted):
    assert parse(argv, {}).wants_store is wanted


@pytest.mark.parametrize(
    ("argv", "span_ids"),
    [
        (["--otlp", "http://o"], "child"),
        (["--otlp", "http://o", "--zipkin", "http://z"], "shared"),
        (["--otlp", "http://o", "--store"], "shared"),
        (["--otlp", "http://o", "--span-ids", "shared"], "shared"),
        (["--zipkin", "http://z"], "shared"),
    ],
)
def test_ids_are_not_shared_where_only_otlp_is_spoken(argv, span_ids):
    assert parse(argv, {}).span_ids == span_ids


def test_a_key_in_a_url_is_not_shown():
    made = parse(["--otlp", "https://o/v1/traces?key=hunter2"], {})
    assert "otlp='https://o/v1/traces'" in made.facts()
    made = parse(["--otlp", "HTTPS://o/v1/traces?key=hunter2", "--tls-ca", "f"], {})
    assert "hunter2" not in made.facts()


def test_facts_name_every_setting():
    assert "max_connections=16384" in DEFAULTS.facts()
    assert DEFAULTS.facts().count("=") == len(OPTIONS)


def test_a_list_is_shown_as_it_is_written():
    config_ = parse(["--propagate", "tracecontext,b3"], {})
    assert "propagate='b3,tracecontext'" in config_.facts()
    assert "PODSPAN_PROPAGATE, b3multi]" in " ".join(config.help_text().split())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:15025", Address("0.0.0.0", 15025)),
        (":8080", Address("0.0.0.0", 8080)),
        ("localhost:80", Address("localhost", 80)),
        ("[::]:1", Address("::", 1)),
        ("none", None),
        ("", None),
    ],
)
def test_a_status_address(text, address):
    assert values.address(text) == address
    assert parse(["--status-address", text], {}).status_address == address


@pytest.mark.parametrize(
    "text", ["15025", "::1", "a:b", "a:65536", "a:0", "[::1]", "[:1", "a:"]
)
def test_what_is_no_status_address_is_refused(text):
    with pytest.raises(UsageError, match="--status-address"):
        parse(["--status-address", text], {})


def test_a_status_address_is_shown_as_it_is_written():
    assert str(Address("::1", 9000)) == "[::1]:9000"
    assert "status_address='127.0.0.1:15025'" in DEFAULTS.facts()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("64K", 65536), ("64MiB", 2**26), ("2GiB", 2**31)],
)
def test_a_size(text, size):
    assert values.size(text) == size
    assert values.size(values.size_text(size)) == size


@pytest.mark.parametrize(
    ("text", "age_s"), [("90s", 90), ("15m", 900), ("12h", 43200), ("7d", 604800)]
)
def test_an_age(text, age_s):
    assert values.age(text) == age_s
    assert values.age_text(age_s) == text
