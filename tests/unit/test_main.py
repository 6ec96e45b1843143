"""The command: what it prints and the code it exits with."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from podspan.agent import __main__ as command
from podspan.agent import errors
from podspan.agent.__main__ import COMMANDS, Command, main


def test_help(capsys):
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert all(name in out for name in COMMANDS)
        assert "examples:" in out
        assert err == ""


def test_every_command_of_the_readme_is_there(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    named = set(re.findall(r"(?:^|`|bin/)podspan ([a-z]+)", readme, re.MULTILINE))
    assert {"agent", "store", "replay"} <= named <= set(COMMANDS)
    for name in named:
        with suppress(SystemExit):  # argparse's own --help
            main([name, "--help"])
        assert f"usage: podspan {name}" in capsys.readouterr().out


def test_help_of_the_agent(capsys):
    assert main(["agent", "--help"]) == 0
    assert "--zipkin URL" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("podspan ")


@pytest.mark.parametrize(
    ("argv", "err"),
    [
        ([], "podspan: no command given\nhint: podspan --help lists the commands\n"),
        (
            ["agnt"],
            "podspan: unknown command 'agnt'\n"
            "hint: did you mean agent? podspan --help lists the commands\n",
        ),
        (
            ["--frob"],
            "podspan: unknown option '--frob'\n"
            "hint: podspan --help lists the commands\n",
        ),
        (
            ["agent", "--jsn"],
            "podspan: unknown option '--jsn'\n"
            "hint: did you mean --json? podspan agent --help lists the options\n",
        ),
    ],
)
def test_wrong_usage(capsys, argv, err):
    assert main(argv) == 2
    assert capsys.readouterr() == ("", err)


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (errors.NoPrivilege("no root", "use sudo"), 1, "no root\nhint: use sudo\n"),
        (errors.ExportError("disk full"), 1, "disk full\n"),
        (errors.UsageError("what?"), 2, "what?\n"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_an_error_is_a_line_a_hint_and_a_code(monkeypatch, capsys, error, code, err):
    def fail(argv):
        raise error

    monkeypatch.setitem(COMMANDS, "agent", Command("", fail))
    assert main(["agent"]) == code
    assert capsys.readouterr().err == (f"podspan: {err}" if err else "")


def test_every_error_keeps_its_hint_and_its_evidence():
    rejected = errors.ProgramRejected("no", "why", log="R1 invalid mem access")
    assert (str(rejected), rejected.hint, rejected.log[:2]) == ("no", "why", "R1")
    redirect = errors.RedirectError("no", command="iptables -L", stderr="?")
    assert (redirect.command, redirect.stderr) == ("iptables -L", "?")
    tree = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    assert all(issubclass(cls, errors.PodspanError) for cls in tree)
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in tree)


def test_arguments_after_the_command_are_its_own(monkeypatch):
    monkeypatch.setitem(COMMANDS, "init", Command("", len))
    assert main(["init", "plan", "--help", "--version"]) == 3


def run_podspan(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_and_other_commands_load_neither_bcc_nor_an_http_client():
    done = run_podspan(
        "import sys\n"
        "from podspan.agent.__main__ import main\n"
        "main(['agent', '--help'])\n"
        "print([m for m in ('bcc', 'urllib3', 'podspan.agent.service')"
        " if m in sys.modules])\n"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_enough_is_no_failure():
    done = run_podspan(
        "import os, sys\n"
        "from podspan.agent import __main__ as command\n"
        "read, write = os.pipe()\n"
        "os.close(read)\n"
        "os.dup2(write, 1)\n"
        "def flood(argv):\n"
        "    print('x' * 100_000, flush=True)\n"
        "command.COMMANDS['agent'] = command.Command('', flood)\n"
        "sys.exit(command.main(['agent']))\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_is_what_the_console_script_runs():
    assert command.main is main
