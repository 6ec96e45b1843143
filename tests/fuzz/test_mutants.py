"""The fuzz test is able to fail: it finds each mistake that the scanner could have."""

import pytest
from fuzz.batch import build
from fuzz.report import differs, explained, shrunk, spelt
from unit.native.mutants import CELL_MUTANTS, SOURCE_MUTANTS, with_cell
from unit.native.scanner import SOURCE

AT_A_CUT = "if (state != SCAN_BODY && state != SCAN_CHUNK_DATA)\n\t\treturn 0;"


def lost(field: str) -> tuple[str, str]:
    """`field` does not outlive a send: as if it had been a local of the loop."""
    assert AT_A_CUT in SOURCE
    return AT_A_CUT, AT_A_CUT.replace("return 0;", f"return s->{field} = 0;")


SUBTLE_MUTANTS = {
    **{
        f"{field} is lost at a cut": lost(field)
        for field in (
            *("length", "first_length", "head_bytes", "seen", "value_bytes"),
            *("value_length", "value_at", "capture_at", "capture_left", "status"),
            *("header", "name_length", "chunked", "minor", "again"),
        )
    },
    "a name begins anew at a cut": (AT_A_CUT, f"s->name.text[0] = 0;\n\t{AT_A_CUT}"),
    "a body that ends at a cut goes on": (
        "if (!s->skip)",
        "if (!s->skip && skip < available)",
    ),
    "a body that is cut is one longer": (
        "s->skip -= skip;",
        "s->skip -= skip;\n\tif (s->skip)\n\t\ts->skip++;",
    ),
    "places of values have 8 bits": ("= s->value_at;", "= (u8)s->value_at;"),
    "places of names have 8 bits": ("[header] = name_at;", "[header] = (u8)name_at;"),
    "a place outlives its value": ("s->value_at = 0;", ";"),
    "a length outlives its value": ("s->value_length = 0;", ";"),
    "values add up": ("s->value_bytes = 0;\n\ts->value_length", "s->value_length"),
    "an empty value is not the first": (
        "s->seen & (1U << header)",
        "s->length_of[header]",
    ),
    "a repeated b3 goes unnoticed": ("header > LAST_HIDDEN", "header >= LAST_HIDDEN"),
    "a repeated traceparent is noted": ("> LAST_HIDDEN", "> HEADER_TRACEPARENT"),
    "a repeated trace id goes unnoticed": (
        "header < HEADER_TRACE_ID",
        "header <= HEADER_TRACE_ID",
    ),
    "repeated lines of responses are noted": ("s->is_response || header <", "header <"),
    "repeated lines in another order": (
        "s->again_at[again & ",
        "s->again_at[~again & ",
    ),
    "few repeated lines are counted": ("if (again < 255)", "if (again < 254)"),
    "the last byte of a field is not used": ("if (left) {", "if (left > 1) {"),
    "chunk digits add up": ("s->value_bytes = 0;\n\t\t}", "}"),
    "chunk sizes add up": ("s->length = 0;\n\t\t\ts->value_bytes", "s->value_bytes"),
    "chunks of 32 bits": ("s->length << 4", "(u64)(u32)s->length << 4"),
    "lengths of 32 bits": ("s->length * 10", "(u64)(u32)s->length * 10"),
    "the last length wins": ("s->first_length && ", "s->first_length > length && "),
    "gzip after chunked is overlooked": (
        "\t\ts->chunked = 2;",
        "\t\ts->chunked += !s->chunked * 2;",
    ),
    "minor versions of one bit": ("s->minor = c - '0'", "s->minor = c & 1"),
    "the next message is a request": ("s->is_response = is_response;", ";"),
}

# As in unit/native/mutants.py.
SUBTLE_CELLS = [
    ("CHUNK_SIZE", b";", "CHUNK_SIZE", "NOTHING"),
    ("CHUNK_SIZE", b" ", "OPAQUE", "NOTHING"),
    ("CHUNK_EXTENSION", b"\0", "CHUNK_EXTENSION", "NOTHING"),
    ("CHUNK_EXTENSION", b"\n", "CHUNK_DATA", "CHUNK_BEGINS"),
    ("CHUNK_LF", b"\n", "CHUNK_DATA", "NOTHING"),
    ("TRAILER_LF", b"\n", "DONE", "NOTHING"),
    ("LENGTH_OWS", b" ", "LENGTH_END", "NOTHING"),
    ("CODING_OTHER", b"\r", "LINE_LF", "NOTHING"),
    ("OWS", b"\r", "LINE_LF", "NOTHING"),
    ("NAME_FIRST", b"\r", "HEAD_DONE", "NOTHING"),
]


def found_after(sample, native) -> str:
    number = sample.first_difference(native)
    assert number is not None, f"{len(sample.cases)} cases do not tell it from the real"
    return f"after {number + 1:5} cases"


def test_the_scanner_itself_differs_in_nothing(sample, native):
    assert sample.first_difference(native) is None


@pytest.mark.parametrize("name", [*SOURCE_MUTANTS, *SUBTLE_MUTANTS])
def test_a_mutant_of_the_source_is_found(sample, tmp_path, say, name):
    old, new = {**SOURCE_MUTANTS, **SUBTLE_MUTANTS}[name]
    assert old in SOURCE
    native = build(tmp_path, SOURCE.replace(old, new))
    say(f"{found_after(sample, native)}: {name}")


@pytest.mark.parametrize("cell", [*CELL_MUTANTS, *SUBTLE_CELLS], ids=str)
def test_a_mutant_of_the_table_is_found(sample, native, say, cell):
    mutant = native.with_tables(with_cell(native.tables, *cell))
    say(f"{found_after(sample, mutant)}: {' '.join(map(str, cell))}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("an empty value is not the first", "the scanner says:"),
        ("value_length is lost at a cut", "is cut at"),
    ],
)
def test_what_is_found_is_made_small_and_explained(sample, tmp_path, name, told):
    native = build(tmp_path, SOURCE.replace(*SUBTLE_MUTANTS[name]))
    number = sample.first_difference(native)
    case = shrunk(sample.cases[number], lambda smaller: differs(native, smaller))
    assert differs(native, case)
    assert len(case.data) < 80
    text = explained(native, case)
    assert repr(case.data) in text
    assert told in text


def test_a_long_stream_is_spelt_in_short():
    data = b"A:" + b"\n" * 100 + b"\r\n"
    assert spelt(data) == "b'A:' + b'\\n' * 100 + b'\\r\\n'"
