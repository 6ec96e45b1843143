"""The command line: what options mean, and what is said to a person who errs."""

from ipaddress import ip_network

import pytest
from podspan.agent.errors import RedirectError, UsageError
from podspan.init import command, plan
from podspan.init.plan import EVERY, Family, Redirection


def parse(*options):
    return command._redirection(command._parser().parse_args(["plan", *options]))


def test_without_options_all_is_redirected_under_guard():
    assert parse() == Redirection()


def test_istios_options_mean_what_they_mean_to_istio():
    assert parse(
        *("-p", "16001", "-z", "16006"),
        *("-b", "80, 443,80", "-d", "15020"),
        *("-i", "10.0.0.0/8,fd00::/8", "-x", "10.96.0.1"),
        *("--guard", "none"),
    ) == Redirection(
        guard=None,
        outbound_port=16001,
        inbound_port=16006,
        include_inbound=(80, 443),
        exclude_inbound=(15020,),
        include_outbound=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
        exclude_outbound=(ip_network("10.96.0.1/32"),),
    )


def test_a_star_is_every_port_and_network_and_an_empty_list_none():
    assert parse("-b", "*", "-i", " * ").include_outbound == EVERY
    nothing = parse("-b", "", "-i", "")
    assert (nothing.include_inbound, nothing.include_outbound) == ((), ())


def test_an_address_with_host_bits_is_its_network():
    # As iptables reads it.
    assert parse("-i", "10.1.2.3/8").include_outbound == (ip_network("10.0.0.0/8"),)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        (["-p", "0"], "'0' is not a port"),
        (["-p", "65536"], "'65536' is not a port"),
        (["-b", "80,http"], "'http' is not a port"),
        (["-d", "²"], "'²' is not a port"),
        (["-i", "10.0.0.0/33"], "'10.0.0.0/33' is not an address"),
        (["-x", "example.org"], "'example.org' is not an address"),
        (["--guard", "relative/path"], "'relative/path'"),
        (["--guard", "/with a/space"], "'/with a/space'"),
        (["--guard", "/" + "x" * 511], "neither 'none' nor a full path"),
        (["--unknown"], "--unknown"),
    ],
)
def test_a_mistake_is_named_and_help_is_pointed_to(options, culprit):
    with pytest.raises(UsageError) as caught:
        command.main(["plan", *options])

    assert culprit in str(caught.value)
    assert "--help" in caught.value.hint


@pytest.mark.parametrize("seconds", ["-1", "soon", "inf", "nan"])
def test_a_wait_is_a_finite_number_of_seconds(seconds):
    with pytest.raises(UsageError, match="is not a number of seconds"):
        command.main(["apply", f"--require-agent={seconds}"])


def test_an_action_is_required():
    with pytest.raises(UsageError, match="ACTION"):
        command.main([])


def test_plan_prints_the_rules_of_both_families(capsys):
    assert command.main(["plan", "-p", "16001"]) == 0

    wanted = Redirection(outbound_port=16001)
    ipv4, ipv6 = (plan.render(plan.plan(wanted, family)) for family in Family)
    assert capsys.readouterr().out == f"# IPv4\n{ipv4}# IPv6\n{ipv6}"


def test_help_ends_with_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])

    assert ended.value.code == 0
    assert "podspan init apply --require-agent=60" in capsys.readouterr().out


def test_an_absent_guard_outside_a_bpf_file_system_says_how_to_get_there(tmp_path):
    line = command._absence(str(tmp_path / "podspan" / "redirect_guard"))

    assert "\n" not in line
    assert f"{tmp_path} is not a bpf file system" in line
    assert "nsenter" in line


def test_waiting_for_an_agent_ends_at_the_deadline(tmp_path):
    with pytest.raises(RedirectError) as caught:
        command._agent_is_there(str(tmp_path / "guard"), 0.01)

    assert "no agent within 0.01 s" in str(caught.value)
    assert caught.value.hint
