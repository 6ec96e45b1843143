"""The command: what it prints, and what it says to a person who errs."""

import pytest
from podspan.agent.errors import RedirectError, UsageError
from podspan.init import command, namespace, plan
from podspan.init.plan import Family, Redirection


def printed(wanted, families=tuple(Family)):
    return "".join(
        f"# IPv{family.value}\n"
        + plan.render(plan.plan(wanted, family))
        + plan.render_routing(wanted.source, family)
        for family in families
    )


def test_plan_prints_the_rules_of_both_families(capsys):
    assert command.main(["plan", "-p", "16001"]) == 0

    assert capsys.readouterr().out == printed(Redirection(outbound_port=16001))


def test_a_dry_run_prints_and_writes_the_rules_and_needs_nothing(
    capsys, monkeypatch, tmp_path
):
    path = tmp_path / "rules"
    monkeypatch.setenv("DRY_RUN_FILE_PATH", str(path))
    monkeypatch.setattr(command, "_require_capabilities", pytest.fail)
    monkeypatch.setattr(namespace, "enter", pytest.fail)

    assert command.main(["apply", "-n", "--network-namespace", "/nowhere"]) == 0

    text = capsys.readouterr().out
    assert text == printed(Redirection())
    assert path.read_text() == text


def test_a_dry_run_of_a_removal_prints_no_rules(capsys):
    assert command.main(["apply", "--dry-run", "--cleanup-only"]) == 0

    assert "would be removed" in capsys.readouterr().out


def test_a_pod_that_wants_no_redirection_has_no_rules(capsys, tmp_path):
    file = tmp_path / "annotations"
    file.write_text('sidecar.istio.io/interceptionMode="NONE"\n')

    assert command.main(["plan", "--annotations-file", str(file)]) == 0

    assert "nothing would be installed" in capsys.readouterr().out


def test_a_dry_runs_file_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DRY_RUN_FILE_PATH", str(tmp_path))

    with pytest.raises(UsageError, match=str(tmp_path)):
        command.main(["apply", "--dry-run"])


def test_what_does_nothing_is_warned_of(caplog, capsys):
    command.main(["plan", "--redirect-dns"])

    assert "--redirect-dns does nothing here: podspan leaves DNS alone" in caplog.text


def test_a_namespace_that_is_none_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot enter") as caught:
        namespace.enter(str(tmp_path / "missing"))

    assert "/proc/PID/ns/net" in caught.value.hint


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
