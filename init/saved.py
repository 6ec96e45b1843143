"""Read what iptables-save prints: what is ours in it, and how to undo that.

Pure: text in, text out. Foreign rules are never named in what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from podspan.init.plan import Rule, chains, is_ours, render_rule

# What is ours in one table: our chains, empty ones too, and the chains that jump into
# them; each with its rules, the text after `-A CHAIN`, in order.
Ours = dict[str, list[str]]


def tables(saved: str) -> dict[str, list[str]]:
    """Split iptables-save's output into the lines of each table."""
    found: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            lines = found.setdefault(line[1:].strip(), [])
        elif line.startswith((":", "-A ")):
            lines.append(line)
    return found


def undo_lines(saved: str) -> dict[str, list[str]]:
    """Return by table the lines that remove all that is ours.

    Whatever a half-applied run or another version left is found by the chains' prefix:
    jumps from chains that are not ours, then our chains.
    """
    undo = {table: list(_undo(lines)) for table, lines in tables(saved).items()}
    return {table: lines for table, lines in undo.items() if lines}


def _undo(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("-A ") and _is_jump_into_ours(line):
            yield "-D" + line.removeprefix("-A")
    ours = [line[1:].split()[0] for line in lines if is_ours(line[1:])]
    # All are emptied before the first is deleted: they refer to each other.
    yield from (f"-F {name}" for name in ours)
    yield from (f"-X {name}" for name in ours)


def ours(saved: str) -> dict[str, Ours]:
    """Return by table what is ours there; tables without are left out."""
    found = {table: _ours(lines) for table, lines in tables(saved).items()}
    return {table: chains_ for table, chains_ in found.items() if chains_}


def _ours(lines: Sequence[str]) -> Ours:
    found: Ours = {line[1:].split()[0]: [] for line in lines if is_ours(line[1:])}
    for line in lines:
        if line.startswith("-A "):
            chain, _, rule = line.removeprefix("-A ").partition(" ")
            if is_ours(chain) or _is_jump_into_ours(line):
                found.setdefault(chain, []).append(rule)
    return found


def expected(rules: Sequence[Rule]) -> Mapping[str, Ours]:
    """Return what `ours` finds once the rules are applied."""
    found: dict[str, Ours] = {}
    for rule in rules:
        table = found.setdefault(rule.table, {})
        for chain in chains([rule]):
            table.setdefault(chain, [])
        text = render_rule(rule).removeprefix(f"-A {rule.chain} ")
        table.setdefault(rule.chain, []).append(text)
    return found


def _is_jump_into_ours(line: str) -> bool:
    words = line.split()
    if is_ours(words[1]):
        return False
    # A comment could hold the word -j; its last occurrence is the target's, because
    # iptables-save prints the target last and our chains take no options.
    return words[-2] in ("-j", "-g") and is_ours(words[-1])
