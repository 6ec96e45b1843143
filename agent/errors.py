"""What can go wrong, as types to branch on and sentences to read.

PodspanError
  UsageError            the user's input; exit 2
  KernelError           exit 1, as all below
    NoPrivilege         root or a capability is missing
    FeatureMissing      names the kernel option or the package
    ProgramRejected     compile, verifier or attach; carries the log
  RedirectError         carries the command and its stderr
    NotRedirected       a connection was tried, and the rules are not at work; exit 126
  ExportError           a place to put spans does not take them
  StatusError           the status port cannot be had
  StoreError            the embedded store's database cannot be opened, read or written

Only `podspan.agent.__main__` prints them and exits.
"""


class PodspanError(Exception):
    """Something failed on something; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


class UsageError(PodspanError):
    """The user asked for something that makes no sense."""

    exit_code = 2


class KernelError(PodspanError):
    """The kernel does not do what the agent needs."""


class NoPrivilege(KernelError):
    """This process may not do it; root may."""


class FeatureMissing(KernelError):
    """The kernel or the machine lacks a part that the agent needs."""


class ProgramRejected(KernelError):
    """A program of bpf/ did not compile, verify or attach."""

    def __init__(self, what: str, hint: str = "", *, log: str = "") -> None:
        super().__init__(what, hint)
        self.log = log


class RedirectError(PodspanError):
    """A redirect rule could not be read, written or removed."""

    def __init__(
        self, what: str, hint: str = "", *, command: str = "", stderr: str = ""
    ) -> None:
        super().__init__(what, hint)
        self.command = command
        self.stderr = stderr


class NotRedirected(RedirectError):
    """No rule redirects here; the exit code is that of Istio's validation."""

    exit_code = 126


class ExportError(PodspanError):
    """Spans cannot go where the user wants them."""


class StatusError(PodspanError):
    """The agent cannot tell of itself where the user wants it."""


class StoreError(PodspanError):
    """The embedded store's database does not open, or does not take or give spans."""
