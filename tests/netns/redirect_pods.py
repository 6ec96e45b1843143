"""Two pods with rules, and where connections between them really go."""

import select
import socket
import struct
import sys
from contextlib import ExitStack
from ipaddress import ip_address

from podspan.agent.kernel.guard import Want
from podspan.init.plan import INBOUND_PORT, OUTBOUND_PORT

SERVICE_PORT = 8080
OTHER_PORT = 8081
SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same
SO_MARK = 36

NEVER_STALE_NS = 2**62  # 146 years: not even a heartbeat of 0 is stale by age
DEADLINE_S = 20

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

EVERYTHING = (Want(inbound=False, port=None), Want(inbound=True, port=None))


class Pods:
    """A client and a server namespace with listeners, and who accepted what."""

    def __init__(self, version, client, server):
        self.version = version
        self.client = client
        self.server = server
        self.client_address = client.ipv4 if version == 4 else client.ipv6
        self.server_address = server.ipv4 if version == 4 else server.ipv6
        self.loopback = "127.0.0.1" if version == 4 else "::1"
        self._stack = ExitStack()
        self._listeners = {}

    def __enter__(self):
        for name, namespace in (("client", self.client), ("server", self.server)):
            with namespace.inside():
                for port in (OUTBOUND_PORT, INBOUND_PORT, SERVICE_PORT, OTHER_PORT):
                    listener = self._stack.enter_context(self._socket())
                    listener.bind(("", port))
                    listener.listen()
                    self._listeners[listener] = (name, port)
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def connect(
        self, namespace=None, address=None, port=SERVICE_PORT, mark=0, option=None
    ):
        """Connect to a service; return who accepted it, and the accepted socket.

        `option`: level, name and value of a socket option.
        """
        with (namespace or self.client).inside():
            client = self._stack.enter_context(self._socket())
        client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if option is not None:
            client.setsockopt(*option)
        client.settimeout(DEADLINE_S)
        client.connect((address or self.server_address, port))
        [listener], _, _ = select.select(list(self._listeners), [], [], DEADLINE_S)
        accepted, _ = listener.accept()
        self._stack.enter_context(accepted)
        return self._listeners[listener], accepted

    def _socket(self):
        made = socket.socket(FAMILIES[self.version], socket.SOCK_STREAM)
        if self.version == 6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return made


def original_destination(accepted):
    """Read where a redirected connection was going, as the engine will."""
    if accepted.family == socket.AF_INET:
        raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        _, port, address = struct.unpack_from("!HH4s", raw)
    else:
        raw = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        _, port, _, address = struct.unpack_from("!HHI16s", raw)
    return str(ip_address(address)), port


def inode(namespace):
    """By which the guard knows a namespace."""
    return namespace.path.stat().st_ino


def init_apply(namespace, guard, *options):
    """Without the gate: the tests' listeners are no worker that would hold it."""
    argv = ("--guard", str(guard.path), "--gate", "off", *options)
    podspan(namespace, "init", "apply", *argv)


def podspan(namespace, *arguments):
    return namespace.run(sys.executable, "-m", "podspan.agent", *arguments)
