"""The pure parts of vagrant/vm: arguments, the command's script, the initramfs."""

import importlib.machinery
import importlib.util
import lzma
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

VAGRANT = Path(__file__).parents[2] / "vagrant"


def load(name: str, file: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(VAGRANT / file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


initramfs = load("initramfs", "initramfs.py")
kernels = load("kernels", "kernels.py")
vm = load("vm_command", "vm")

ARGUMENTS = [
    ["plain"],
    ["two  spaces", "it's", '"quoted"', "$HOME `id` \\"],
    ["a line\nanother", "", "*", "ünïcödé"],
    ["--", "-x"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_reach_the_command_as_they_are(arguments):
    command = ["printf", r"%s\0", *arguments]
    script = vm.command_script(vm.parse(["run", "--", *command]).command, {})
    out = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True)
    assert out.stdout.decode().split("\0")[:-1] == arguments


def test_only_what_steers_a_test_run_is_passed_on():
    environment = {"CI": "true", "PYTEST_ADDOPTS": "-x  -v", "SECRET": "s"}
    script = vm.command_script(["env"], environment)
    assert "PYTEST_ADDOPTS='-x  -v'\n" in script
    assert "CI=true\n" in script
    assert "SECRET" not in script


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--kernel", "5.4", "--", "true"], "5.4"),
        (["run", "--forward", "99999", "--", "true"], "99999 is not a port"),
        (["run", "--forward", "http", "--", "true"], "http"),
        (["run"], "no command"),
        (["run", "--"], "no command"),
        (["halt", "--", "true"], "halt"),
    ],
)
def test_a_wrong_argument_is_one_line_a_hint_and_exit_2(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        vm.parse(arguments)
    line, hint, *rest = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert complaint in line
    assert hint.startswith("hint: ")
    assert not rest


def test_the_archive_is_what_cpio_unpacks(tmp_path):
    cpio = ["busybox", "cpio", "-idm"]
    data = initramfs.archive(
        folders=["bin", "dev"],
        links={"bin/sh": "busybox"},
        files={"bin/busybox": b"\x7fELF" * 5, "empty": b"", "a/odd": b"123"},
    )
    (tmp_path / "a").mkdir()
    subprocess.run(cpio, input=data, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "bin/busybox").read_bytes() == b"\x7fELF" * 5
    assert (tmp_path / "bin/busybox").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/sh").readlink() == Path("busybox")
    assert (tmp_path / "empty").read_bytes() == b""
    assert (tmp_path / "a/odd").read_bytes() == b"123"
    assert (tmp_path / "dev").is_dir()


def test_modules_load_after_what_they_need(tmp_path):
    kernel = kernels.Kernel(version="6.0", root=tmp_path)
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").write_text(
        "fs/9p/9p.ko.xz: net/9pnet.ko.xz fs/netfs.ko.xz\n"
        "net/9pnet.ko.xz:\n"
        "fs/netfs.ko.xz:\n"
        "net/9pnet_virtio.ko.xz: net/9pnet.ko.xz\n"
    )
    order = kernel.closure(["virtio_pci", "9pnet_virtio", "9p"])
    assert [file.name for file in order] == [
        "9pnet.ko.xz",
        "9pnet_virtio.ko.xz",
        "netfs.ko.xz",
        "9p.ko.xz",
    ]


def test_a_compressed_module_is_unpacked(tmp_path):
    packed = tmp_path / "a.ko.xz"
    packed.write_bytes(lzma.compress(b"code"))
    plain = tmp_path / "b.ko"
    plain.write_bytes(b"code")
    assert kernels.read_module(packed) == kernels.read_module(plain) == b"code"


def test_the_package_list_has_a_package_a_line():
    text = (VAGRANT / "packages.txt").read_text()
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert all(len(words) <= 1 for words in lines)
    assert ["python3-bpfcc"] in lines
