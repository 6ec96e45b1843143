"""What flags, variables and annotations mean, alone and against each other."""

import argparse
import grp
import pwd
from ipaddress import ip_network

import pytest
from podspan.agent.errors import UsageError
from podspan.init import options
from podspan.init.options import IGNORED, OPTIONS, TRAFFIC, Options, parse
from podspan.init.plan import EVERY, Redirection, Source

# The flags of istio-iptables 1.31 (tools/istio-iptables/pkg/cmd/root.go), and two of
# earlier versions that were in Istio's own pod templates.
ISTIO_FLAGS = {
    *("-p --envoy-port", "-z --inbound-capture-port", "-e --inbound-tunnel-port"),
    *("-u --proxy-uid", "-g --proxy-gid", "-m --istio-inbound-interception-mode"),
    *("-b --istio-inbound-ports", "-d --istio-local-exclude-ports"),
    *("-c --istio-exclude-interfaces", "-i --istio-service-cidr"),
    *("-x --istio-service-exclude-cidr", "-q --istio-outbound-ports"),
    *("-o --istio-local-outbound-ports-exclude", "-k --kube-virt-interfaces"),
    *("-t --istio-inbound-tproxy-mark", "-r --istio-inbound-tproxy-route-table"),
    *("-n --dry-run", "--iptables-probe-port", "--probe-timeout"),
    *("--skip-rule-apply", "--run-validation", "--redirect-dns", "--drop-invalid"),
    *("--dual-stack", "--capture-all-dns", "--network-namespace", "--cni-mode"),
    *("--reconcile", "--cleanup-only", "--force-apply", "--native-nftables"),
    *("--force-iptables-binary", "-f --restore-format", "--log_output_level"),
}


def redirection(*argv, **environment):
    return parse(["plan", *argv], environment).redirection


def test_every_flag_of_istio_is_there():
    ours = {" ".join(option.flags) for option in OPTIONS}

    assert ours >= ISTIO_FLAGS


def test_every_flag_of_istio_is_a_variable_as_well_but_the_outbound_port():
    variables = {option.long: option.names for option in OPTIONS}

    for flag in ISTIO_FLAGS - {"-p --envoy-port", "--log_output_level"}:
        long = flag.split()[-1]
        assert long.removeprefix("--").replace("-", "_").upper() in variables[long]
    assert variables["--envoy-port"] == ()
    assert redirection(ENVOY_PORT="tcp://10.96.0.7:80") == Redirection()


def test_names_are_given_once():
    flags = [flag for option in OPTIONS for flag in option.flags]
    variables = [name for option in OPTIONS for name in option.names]

    assert len(set(flags)) == len(flags)
    assert len(set(variables)) == len(variables)


def test_without_options_all_is_redirected_under_guard():
    assert parse(["apply"], {}) == Options("apply", Redirection())


def test_istios_options_mean_what_they_mean_to_istio():
    assert redirection(
        *("-p", "16001", "-z", "16006"),
        *("-b", "80, 443,80", "-d", "15020"),
        *("-i", "10.0.0.0/8,fd00::/8", "-x", "10.96.0.1"),
        *("-q", "3306", "-o", "53,25", "-c", "eth1", "-k", "k6t-eth0"),
        *("-u", "1337", "-g", "5,6", "--drop-invalid", "--guard", "none"),
        *("--iptables-probe-port", "16002"),
    ) == Redirection(
        guard=None,
        outbound_port=16001,
        inbound_port=16006,
        include_inbound=(80, 443),
        exclude_inbound=(15020,),
        include_outbound=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
        exclude_outbound=(ip_network("10.96.0.1/32"),),
        include_outbound_ports=(3306,),
        exclude_outbound_ports=(53, 25),
        exclude_interfaces=("eth1",),
        virtual_interfaces=("k6t-eth0",),
        exclude_users=(1337,),
        exclude_groups=(5, 6),
        drop_invalid=True,
        probe_port=16002,
    )


def test_istios_own_command_line_is_understood():
    # The arguments of istio-init in Istio's injection template, without the command.
    given = parse(
        [
            *("apply", "-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT"),
            *("-i", "*", "-x", "", "-b", "*", "-d", "15090,15021,15020"),
            *("--log_output_level=default:info",),
        ],
        {},
    )

    assert given.redirection == Redirection(
        exclude_users=(1337,), exclude_inbound=(15090, 15021, 15020)
    )
    assert len(given.warnings) == 1


def test_switches_are_written_as_in_go():
    assert redirection("--drop-invalid").drop_invalid
    assert redirection("--drop-invalid=true").drop_invalid
    assert not redirection("--drop-invalid=false").drop_invalid
    assert redirection(DROP_INVALID="t").drop_invalid


def test_a_star_is_every_port_and_network_and_an_empty_list_none():
    assert redirection("-b", "*", "-i", " * ").include_outbound == EVERY
    nothing = redirection("-b", "", "-i", "")
    assert (nothing.include_inbound, nothing.include_outbound) == ((), ())


def test_an_empty_variable_is_an_empty_list_or_unset():
    nothing = redirection(ISTIO_INBOUND_PORTS="", ISTIO_SERVICE_CIDR="")
    assert (nothing.include_inbound, nothing.include_outbound) == ((), ())
    assert redirection(INBOUND_CAPTURE_PORT="", DROP_INVALID="") == Redirection()


def test_an_address_with_host_bits_is_its_network():
    # As iptables reads it.
    assert redirection("-i", "10.1.2.3/8").include_outbound == (
        ip_network("10.0.0.0/8"),
    )


def test_names_of_users_and_groups_are_looked_up():
    user, group = pwd.getpwuid(0), grp.getgrgid(0)

    wanted = redirection("-u", user.pw_name, "-g", group.gr_name)

    assert (wanted.exclude_users, wanted.exclude_groups) == ((0,), (0,))


def test_chosen_groups_beat_excluded_ones_as_in_istio():
    given = parse(
        ["apply", "-g", "1"],
        {
            "ISTIO_OUTBOUND_OWNER_GROUPS": "101,202",
            "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "888",
        },
    )

    assert given.redirection.include_groups == (101, 202)
    assert given.redirection.exclude_groups == (1,)
    assert "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE" in given.warnings[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5), ("0.5", 0.5), ("5s", 5), ("500ms", 0.5), ("1m30s", 90), ("1h", 3600)],
)
def test_times_are_seconds_or_gos(text, seconds):
    assert parse(["apply", "--probe-timeout", text], {}).probe_timeout == seconds


def test_a_bare_require_agent_waits_its_default():
    assert parse(["apply", "--require-agent"], {}).require_agent == 30
    assert parse(["apply"], {"PODSPAN_REQUIRE_AGENT": "60"}).require_agent == 60


@pytest.fixture
def podinfo(tmp_path):
    """Write annotations as the downward API does; return the option that reads them."""

    def write(**annotations):
        path = tmp_path / "annotations"
        path.write_text(
            "".join(
                f'{name.replace("__", "/")}="{value}"\n'
                for name, value in annotations.items()
            )
        )
        return f"--annotations-file={path}"

    return write


def traffic(**annotations):
    return {TRAFFIC + name: value for name, value in annotations.items()}


def test_annotations_mean_what_they_mean_to_istio(podinfo):
    file = podinfo(
        **traffic(
            includeOutboundIPRanges="10.0.0.0/8",
            excludeOutboundIPRanges="10.96.0.1/32",
            includeInboundPorts="80",
            excludeInboundPorts="22",
            includeOutboundPorts="3306",
            excludeOutboundPorts="25",
            excludeInterfaces="eth1",
            kubevirtInterfaces="old",
        ),
        **{
            "istio.io/reroute-virtual-interfaces": "k6t-eth0",
            "sidecar.istio.io/interceptionMode": "REDIRECT",
            "status.sidecar.istio.io/port": "15020",
        },
    )

    given = parse(["apply", file], {})

    assert given.redirection == Redirection(
        include_inbound=(80,),
        exclude_inbound=(22, 15020),
        include_outbound=(ip_network("10.0.0.0/8"),),
        exclude_outbound=(ip_network("10.96.0.1/32"),),
        include_outbound_ports=(3306,),
        exclude_outbound_ports=(25,),
        exclude_interfaces=("eth1",),
        virtual_interfaces=("k6t-eth0",),
    )
    assert given.warnings == ()


def test_an_empty_annotation_includes_nothing_and_no_status_port_is_zero(podinfo):
    file = podinfo(
        **traffic(includeOutboundIPRanges="", includeInboundPorts=""),
        **{"status.sidecar.istio.io/port": "0"},
    )

    wanted = redirection(file)

    assert (wanted.include_inbound, wanted.include_outbound) == ((), ())
    assert wanted.exclude_inbound == ()


def test_flag_beats_variable_beats_annotation_beats_default(podinfo):
    file = podinfo(**traffic(includeInboundPorts="3"))

    assert redirection("-b", "1", file, ISTIO_INBOUND_PORTS="2").include_inbound == (1,)
    assert redirection(file, ISTIO_INBOUND_PORTS="2").include_inbound == (2,)
    assert redirection(file, ISTIO_INBOUND_PORTS="").include_inbound == ()
    assert redirection(file).include_inbound == (3,)
    assert redirection().include_inbound == EVERY


def test_the_file_of_annotations_is_a_variable_as_well(podinfo):
    file = podinfo(**traffic(includeInboundPorts="3")).partition("=")[2]

    assert redirection(PODSPAN_ANNOTATIONS_FILE=file).include_inbound == (3,)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"INVALID_DROP": "true"}, {"drop_invalid": True}),
        ({"DROP_INVALID": "true", "INVALID_DROP": "false"}, {}),
        ({"PODSPAN_GUARD": "none"}, {"guard": None}),
        ({"PODSPAN_INBOUND_SOURCE": "loopback"}, {"source": Source.LOOPBACK}),
        (
            {"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.0/8"},
            {"loopback": ip_network("127.0.0.0/8")},
        ),
        ({"ISTIO_OUTBOUND_OWNER_GROUPS": "*"}, {}),
    ],
)
def test_variables_that_are_not_named_after_a_flag(environment, wanted):
    assert redirection(**environment) == Redirection(**wanted)


def test_istios_other_name_of_dual_stack():
    assert parse(["apply"], {"ISTIO_DUAL_STACK": "true"}).dual_stack is True
    assert parse(["apply"], {"DUAL_STACK": "false"}).dual_stack is False
    assert parse(["apply"], {}).dual_stack is None


@pytest.mark.parametrize(
    "option", [each for each in IGNORED if each.ignored], ids=lambda each: each.long
)
def test_what_has_no_meaning_here_is_taken_and_said(option):
    value = "1" if option.metavar else "true"

    given = parse(["apply", f"{option.flags[0]}={value}"], {})

    assert given.redirection == Redirection()
    [warning] = given.warnings
    assert option.ignored in warning
    assert option.long in warning
    for name in option.names:
        assert parse(["apply"], {name: value}).warnings


def test_a_switch_that_is_off_is_not_worth_a_warning():
    assert parse(["apply", "--redirect-dns=false"], {}).warnings == ()
    assert parse(["apply"], {"ISTIO_META_DNS_CAPTURE": "false"}).warnings == ()


def test_an_annotation_that_istio_has_not_is_said(podinfo):
    file = podinfo(**traffic(excludeInboundPort="22"), other="x")

    [warning] = parse(["apply", file], {}).warnings

    assert "excludeInboundPort does nothing" in warning


@pytest.mark.parametrize("mode", ["TPROXY", "NONE", "none", "OTHER"])
def test_a_mode_that_we_are_asked_for_and_have_not_is_refused(mode):
    for argv, environment in (
        (["-m", mode], {}),
        ([], {"ISTIO_INBOUND_INTERCEPTION_MODE": mode}),
    ):
        with pytest.raises(UsageError, match=f"mode {mode}") as caught:
            parse(["apply", *argv], environment)
        assert caught.value.hint


def test_a_pods_annotation_of_the_mode_is_met_half_way(podinfo):
    mode = "sidecar.istio.io/interceptionMode"

    none = parse(["apply", podinfo(**{mode: "NONE"})], {})
    assert "NONE" in none.unwanted
    tproxy = parse(["apply", podinfo(**{mode: "TPROXY"})], {})
    assert not tproxy.unwanted
    assert tproxy.redirection.source is Source.TRANSPARENT
    assert "REDIRECT is used" in tproxy.warnings[0]
    with pytest.raises(UsageError, match="mode OTHER"):
        parse(["apply", podinfo(**{mode: "OTHER"})], {})


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["-p", "0"], "-p/--envoy-port: '0' is not a port"),
        (["-p", "65536"], "'65536' is not a port"),
        (["-b", "80,http"], "'http' is not a port"),
        (["-d", "²"], "'²' is not a port"),
        (["-i", "10.0.0.0/33"], "'10.0.0.0/33' is not an address"),
        (["-x", "example.org"], "'example.org' is not an address"),
        (["-x", "*"], "'*' is not an address"),
        (["-c", "a/b"], "'a/b' is not the name of an interface"),
        (["-c", "sixteen-letters-"], "'sixteen-letters-' is not the name"),
        (["-k", "eth0 -j"], "'eth0 -j' is not the name"),
        (["-k", "!eth0"], "'!eth0' is not the name"),
        (["-u", "nobody-has-that-name"], "give the number"),
        (["-g", "4294967295"], "'4294967295' is not a user or group number"),
        (["-g", ",".join(map(str, range(65)))], "65 groups are more than 64"),
        (["--guard", "relative/path"], "'relative/path'"),
        (["--guard", "/with a/space"], "'/with a/space'"),
        (["--guard", "/" + "x" * 511], "neither 'none' nor a full path"),
        (["--inbound-source", "client"], "'client' is none of"),
        (["--force-iptables-binary", "nftables"], "'nftables' is none of"),
        (["--drop-invalid=yes"], "'yes' is neither true nor false"),
        (["--probe-timeout", "-1"], "'-1'"),
        (["--probe-timeout", "soon"], "'soon' is not a number of seconds"),
        (["--probe-timeout", "5s5"], "'5s5' is not"),
        (["--require-agent=inf"], "'inf' is not a number of seconds"),
        (["--require-agent=nan"], "'nan' is not a number of seconds"),
        (["-p", "15006"], "ports have to differ"),
        (["--iptables-probe-port", "15001"], "ports have to differ"),
        (["--annotations-file", "/does/not/exist"], "No such file"),
        (["--istio-inbound-port", "80"], "unknown argument '--istio-inbound-port'"),
        (["--unknown"], "--unknown"),
    ],
)
def test_a_mistake_is_named_and_help_is_pointed_to(argv, culprit):
    with pytest.raises(UsageError) as caught:
        parse(["plan", *argv], {})

    assert culprit in str(caught.value)
    assert caught.value.hint


def test_a_mistake_in_a_variable_or_an_annotation_is_named_as_such(podinfo):
    with pytest.raises(UsageError, match="variable ISTIO_INBOUND_PORTS: 'http'"):
        parse(["apply"], {"ISTIO_INBOUND_PORTS": "http"})
    file = podinfo(**traffic(excludeInboundPorts="ssh"))
    with pytest.raises(UsageError, match=r"annotation .*InboundPorts: 'ssh'"):
        parse(["apply", file], {})


def test_a_file_that_is_none_of_the_downward_api_is_named(tmp_path):
    file = tmp_path / "annotations"
    file.write_text("key: value\n")

    with pytest.raises(UsageError, match=f"{file}: line 1 is not") as caught:
        parse(["apply", "--annotations-file", str(file)], {})

    assert "metadata.annotations" in caught.value.hint


def test_an_action_is_required():
    with pytest.raises(UsageError, match="ACTION"):
        parse([], {})


@pytest.mark.parametrize("action", ["apply", "plan"])
def test_help_names_every_flag_and_variable_and_ends_with_examples(action, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([action, "--help"], {})

    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in OPTIONS:
        assert all(flag in text for flag in option.flags)
    assert "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE" in text
    assert "podspan init apply --require-agent=60" in text
    assert text.rstrip().endswith(options.EXAMPLES.rstrip())


def test_the_parser_gives_no_defaults_of_its_own():
    # Else a default would beat a variable.
    given = vars(options._parser().parse_args(["apply"]))

    assert {name: value for name, value in given.items() if value is not None} == {
        "action": "apply"
    }
    assert argparse.SUPPRESS not in given.values()


def test_a_gate_that_was_asked_for_is_refused_beside_virtual_interfaces():
    with pytest.raises(UsageError, match="--gate on"):
        parse(["apply", "--gate", "on", "-k", "eth1"], {})
    assert not parse(["apply", "-k", "eth1"], {}).redirection.gated
