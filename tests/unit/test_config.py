"""Flags and variables become one Config, or one clear sentence."""

import dataclasses

import pytest
from podspan.agent import config
from podspan.agent.config import OPTIONS, Config, parse
from podspan.agent.errors import UsageError

DEFAULTS = Config(
    zipkin=None,
    json=None,
    tree=False,
    netns=(),
    max_connections=16384,
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
    assert parse(argv, {}) == Config(
        zipkin="http://z:9411",
        json="-",
        tree=False,
        netns=("a*", "b"),
        max_connections=10,
        log_level="debug",
        ready_file="r",
    )
    assert parse(["--tree"], {}).tree


def test_variables():
    environment = {
        "PODSPAN_ZIPKIN": "http://z:9411",
        "PODSPAN_TREE": "1",
        "PODSPAN_NETNS": "a*, b",
        "PODSPAN_MAX_CONNECTIONS": "10",
        "PODSPAN_JSON": "",
    }
    assert parse([], environment) == dataclasses.replace(
        DEFAULTS, zipkin="http://z:9411", tree=True, netns=("a*", "b"),
        max_connections=10,
    )  # fmt: skip


def test_a_flag_beats_its_variable():
    environment = {"PODSPAN_NETNS": "a,b", "PODSPAN_LOG_LEVEL": "nonsense"}
    made = parse(["--netns", "c", "--log-level", "error"], environment)
    assert made.netns == ("c",)
    assert made.log_level == "error"


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
        (["--log-level", "loud"], "debug, info, warning, error", "--help"),
        (["--zipkin", "z:9411"], "not an http or https URL: 'z:9411'", "http://"),
        (["--zipkin", "http://"], "not a URL", "http://"),
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
        assert option.flag in text
        assert option.variable in text
    assert text.index("examples:") > text.index(OPTIONS[-1].flag)
    assert config.wants_help(["--zipkin", "-h"])
    assert not config.wants_help(["--zipkin"])


def test_facts_name_every_setting():
    assert "max_connections=16384" in DEFAULTS.facts()
    assert DEFAULTS.facts().count("=") == len(OPTIONS)
