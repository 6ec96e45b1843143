"""podspan.agent.tags: in whose words a span tells what happened.

istio.py   Envoy's, as Istio sets it up
otel.py    OpenTelemetry's
own.py     in both: what only podspan knows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from podspan.agent.exchange import Exchange, Role
from podspan.agent.pods.pod import Pod
from podspan.agent.tags import istio, otel
from podspan.agent.url import Url


class Convention(Protocol):
    """A module that names and tags spans; empty tags are left out."""

    @property
    def LAST_BYTE(self) -> Mapping[Role, str]:  # noqa: N802
        """The annotation for the response's last byte, where there is one."""

    def pod(self, pod: Pod) -> dict[str, str]:
        """Return the tags that all spans made in this pod have."""

    def http(self, exchange: Exchange, url: Url) -> tuple[str, dict[str, str]]:
        """Return name and tags of a request with its response."""

    def tcp(self, exchange: Exchange) -> tuple[str, dict[str, str]]:
        """Return name and tags of a connection, or of a part of one."""


CONVENTIONS: dict[str, Convention] = {"istio": istio, "otel": otel}
