"""Mistakes that bpf/scanner.h and its table could have: tests have to see each."""

from podspan.agent.kernel import grammar
from unit.native.scanner import SOURCE

# What stands in scanner.h, and what the mutant has in its place.
HEAD_ENDS = "before <= SCAN_END_LF"
SOURCE_MUTANTS = {
    "longer heads": ("HEAD_MAX 16384", "HEAD_MAX 16385"),
    "shorter heads": ("HEAD_MAX 16384", "HEAD_MAX 16383"),
    "one byte too many passes": (HEAD_ENDS, "s->state <= SCAN_END_LF"),
    "long chunked messages are refused": (HEAD_ENDS, "before <= SCAN_TRAILERS_LF"),
    "the last value wins": ("!entry->repeats && s->seen", "0 && s->seen"),
    "names one too early": ("s->head_bytes - 1 - s->", "s->head_bytes - 2 - s->"),
    "repeated lines go unnoticed": ("s->again = again + 1;", ";"),
    "all repeated lines are noted": ("header < HEADER_TRACE_ID ||", ""),
    "the last repeated line has no place": ("again < AGAIN_MAX)", "again < 3)"),
    "wrong chunk digit": ("9 * (c >> 6)", "8 * (c >> 6)"),
    "more length digits": ("LENGTH_DIGITS_MAX 18", "LENGTH_DIGITS_MAX 19"),
    "fewer length digits": ("LENGTH_DIGITS_MAX 18", "LENGTH_DIGITS_MAX 17"),
    "more chunk digits": ("CHUNK_DIGITS_MAX 15", "CHUNK_DIGITS_MAX 16"),
    "any method": ("if (!s->capture_left)", "if (0)"),
    "space after a value counts": ("if (action != ACT_VALUE_SPACE)", ""),
    "places one too far": ("s->head_bytes - 1;", "s->head_bytes;"),
    "names as they are": ("t->lower[c]", "c"),
    "names by their beginning": ("at < sizeof(s->name.text)", "at < 14"),
    "names pile up": ("__builtin_memset(&s->name, 0, sizeof(s->name));", ""),
    "lengths may differ": ("s->first_length != length", "0"),
    "any number of chunkeds": ("s->chunked ? 2 : 1", "1"),
    "no last chunk": ("s->state = SCAN_TRAILER_FIRST;", ";"),
    "empty lines count": ("s->head_bytes = 0;\n", ";\n"),
    "two framings": ("(is_response || !length)", "1"),
    "requests end with EOF": ("is_response ? SCAN_UNTIL_EOF :", "1 ? SCAN_UNTIL_EOF :"),
    "one byte is no body": ("} else if (length > 1) {", "} else if (length > 2) {"),
    "no length is until EOF": ("length == 1 || !is_response", "!is_response"),
    "bodies for HEAD": ("if (bodiless)", "if (0)"),
    "kept too long": ("if (left) {", "if (at < 1000) {"),
    "responses are kept": ("if (!s->is_response)", ""),
    "a head leaks into the next": ("__builtin_memset(s, 0, sizeof(*s));", ""),
    "status digits": ("s->status * 10", "s->status * 8"),
    "body one longer": ("s->skip = length - 1;", "s->skip = length;"),
}

# Cells: state, byte (and those of its class), next state, action.
CELL_MUTANTS = [
    ("VALUE", b"\n", "NAME_FIRST", "VALUE_ENDS"),
    ("VALUE", b"\n", "VALUE", "VALUE_BYTE"),
    ("VALUE", b"\0", "VALUE", "VALUE_BYTE"),
    ("OWS", b"\0", "VALUE", "VALUE_FIRST"),
    ("VALUE", b" ", "VALUE", "VALUE_BYTE"),
    ("NAME", b" ", "NAME", "NOTHING"),
    ("NAME", b"\r", "LINE_LF", "NOTHING"),
    ("NAME_FIRST", b" ", "VALUE", "VALUE_BYTE"),
    ("NAME_FIRST", b":", "OWS", "NAME_ENDS"),
    ("NAME_FIRST", b"\n", "HEAD_DONE", "NOTHING"),
    ("REQUEST_CR", b"\n", "NAME_FIRST", "NOTHING"),
    ("REQUEST_VERSION", b"h", "REQUEST_VERSION_1", "NOTHING"),
    ("START_LF", b"\n", "START", "NOTHING"),
    ("START", b"\r", "OPAQUE", "NOTHING"),
    ("RESPONSE", b"\r", "START_LF", "NOTHING"),
    ("TARGET", b"\x7f", "TARGET", "VALUE_BYTE"),
    ("STATUS_END", b"0", "STATUS_END", "NOTHING"),
    ("LENGTH", b",", "LENGTH", "NOTHING"),
    ("LENGTH_END", b"3", "LENGTH", "LENGTH_DIGIT"),
    ("LENGTH_OWS", b"\r", "LINE_LF", "LENGTH_ENDS"),
    ("CODING_7", b" ", "CODING_OTHER", "NOTHING"),
    ("CODING_6", b"\r", "LINE_LF", "CHUNKED"),
    ("CODING_OWS", b"C", "CODING_OTHER", "NOTHING"),
    ("CHUNK_SIZE", b"g", "CHUNK_SIZE", "CHUNK_DIGIT"),
    ("CHUNK_SIZE", b"\n", "CHUNK_DATA", "CHUNK_BEGINS"),
    ("CHUNK_CR", b"\n", "CHUNK_FIRST", "NOTHING"),
    ("CHUNK_FIRST", b"\r", "CHUNK_LF", "NOTHING"),
    ("TRAILER", b"\n", "TRAILER_FIRST", "NOTHING"),
]


def with_cell(
    tables: bytes, state: str, byte: bytes, following: str, action: str
) -> bytes:
    """The tables with another cell for `byte`, and those of its class, in `state`."""
    states = grammar.enumerators(SOURCE, "scan_state")
    actions = grammar.enumerators(SOURCE, "scan_action")
    place = 2 * (32 * states[f"SCAN_{state}"] + tables[2 * 64 * 32 + byte[0]])
    cell = bytes([states[f"SCAN_{following}"], actions[f"ACT_{action}"]])
    assert tables[place : place + 2] != cell
    return tables[:place] + cell + tables[place + 2 :]
