"""bpf/scanner.h against agent/http_head.py, over as many streams as there is time for.

A stream that is found here gets a row in tests/unit/test_scanner.py.
"""

from time import monotonic

import pytest
from fuzz.batch import build
from fuzz.report import differs, explained, shrunk, spelt
from fuzz.search import CHUNK, first_difference


def test_scanner_and_reference_say_the_same_however_the_bytes_are_cut(
    request, tmp_path, say
):
    count, seed = (request.config.getoption(name) for name in ("cases", "seed"))
    began = monotonic()
    found = first_difference(seed, count, tmp_path)
    say(f"{count} cases of seed {seed} compared in {monotonic() - began:.0f} s")
    if found:
        chunk, case = found
        native = build(tmp_path)
        small = shrunk(case, lambda smaller: differs(native, smaller))
        pytest.fail(
            f"again: make fuzz SEED={chunk} CASES={CHUNK}\n"
            f"found: {spelt(case.data)}, {case[1:]}\n"
            f"made small:\n{explained(native, small)}",
            pytrace=False,
        )
