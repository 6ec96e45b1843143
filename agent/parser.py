"""The commands' argparse, which leaves printing and exiting to __main__.py."""

from __future__ import annotations

import argparse
from typing import NoReturn

from podspan.agent.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises UsageError where argparse would exit."""

    def __init__(
        self,
        prog: str,
        description: str,
        examples: str = "",
        *,
        add_help: bool = True,
    ) -> None:
        """`examples` stand as they are at the end of the help."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what __main__.py prints."""
        raise UsageError(message, f"{self.prog} --help explains the options")
