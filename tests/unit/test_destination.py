"""URLs, headers and TLS files: what is right is taken, what is wrong is said once."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.errors import UsageError
from podspan.agent.export.destination import (
    Destination,
    checked_url,
    headers_from_file,
    headers_from_list,
    shown,
    tls_context,
)
from unit.backend import make_identity

HIDDEN = "s3cret-t0ken"


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://z:9411", "http://z:9411/api/v2/spans"),
        ("http://z:9411/", "http://z:9411/api/v2/spans"),
        ("https://z/zipkin/api/v2/spans?t=1", "https://z/zipkin/api/v2/spans?t=1"),
        ("http://[::1]:9411#x", "http://[::1]:9411/api/v2/spans"),
    ],
)
def test_a_url_without_a_path_gets_the_protocols(url, endpoint):
    assert checked_url(url, "--zipkin", "/api/v2/spans") == endpoint


@pytest.mark.parametrize(
    "url",
    [
        "",
        "z",
        "z:9411",
        "ftp://z",
        "http://",
        "http://:9411",
        "http://z:x",
        "http://z:0",
        "http://z:99999",
        "http://[::1",
        "http://a b",
        "http://a\nb",
    ],
)
def test_what_is_no_url_is_said_with_an_example(url):
    with pytest.raises(UsageError) as caught:
        checked_url(url, "--otlp", "/v1/traces")
    assert "--otlp http://" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{HIDDEN}@z",
        f"ftp://user:{HIDDEN}@z",
        f"user:{HIDDEN}@z",
        f"http://user:{HIDDEN}@z:x",
        f"http://user:{HIDDEN}@[::1",
        f"ftp://z/?key={HIDDEN}",
        f"http://a b/?key={HIDDEN}",
        f"http://z:x/?key={HIDDEN}",
    ],
)
def test_no_error_repeats_a_password_or_a_query(url):
    with pytest.raises(UsageError) as caught:
        checked_url(url, "--zipkin", "/")
    assert HIDDEN not in str(caught.value) + caught.value.hint
    assert caught.value.__cause__ is None  # whose text has the URL


def test_a_destinations_text_has_no_secret():
    url = f"https://z/v1/traces?key={HIDDEN}"
    made = Destination(url, headers={"authorization": HIDDEN})
    assert HIDDEN not in f"{made} {made!r} {shown(url)}"
    assert shown(url) == "https://z/v1/traces"


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("", {}),
        ("a=b,c=d", {"a": "b", "c": "d"}),
        (" Authorization = Bearer%20x%3D , ", {"authorization": "Bearer x="}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_headers_of_a_variable(text, headers):
    assert headers_from_list(text, "PODSPAN_OTLP_HEADERS") == headers


@pytest.mark.parametrize(
    "text", [HIDDEN, f"a:{HIDDEN}", f"={HIDDEN}", f"a={HIDDEN}%0d%0ab=c", "a="]
)
def test_a_bad_header_of_a_variable_is_told_by_its_place(text):
    with pytest.raises(UsageError, match="PODSPAN_OTLP_HEADERS, part 2") as caught:
        headers_from_list(f"x=y,{text}", "PODSPAN_OTLP_HEADERS")
    assert HIDDEN not in str(caught.value) + caught.value.hint


def test_headers_of_a_file(tmp_path):
    path = tmp_path / "headers"
    path.write_text("# ours\nAuthorization: Bearer a:b\n\r\nX-Scope-OrgID:1 \n")
    assert headers_from_file(path) == {
        "authorization": "Bearer a:b",
        "x-scope-orgid": "1",
    }


@pytest.mark.parametrize(
    "line", [HIDDEN, f"a\x01: {HIDDEN}", f"a: {HIDDEN}\x01", f"a: {HIDDEN}é"]
)
def test_a_bad_header_of_a_file_is_told_by_its_place(tmp_path, line):
    path = tmp_path / "headers"
    path.write_text(f"x: y\n{line}\n")
    with pytest.raises(UsageError, match=r"headers, line 2") as caught:
        headers_from_file(path)
    assert HIDDEN not in str(caught.value) + caught.value.hint


def test_a_file_of_headers_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        headers_from_file(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not text"):
        headers_from_file(tmp_path / "binary")


@given(st.text())
def test_whatever_a_variable_says_headers_are_clean_or_an_error(text):
    try:
        found = headers_from_list(text, "V")
    except UsageError:
        return
    for name, value in found.items():
        assert name.isascii()
        assert name == name.lower().strip()
        assert value.isascii()
        assert value == value.strip()
        assert value.replace("\t", "").isprintable()


def test_https_is_always_verified():
    context = tls_context(Destination("https://z/"))
    assert context is not None
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert tls_context(Destination("http://z/")) is None


def test_what_is_wrong_with_tls_files_is_said_by_name(tmp_path):
    mine = make_identity(tmp_path, "mine")
    other = make_identity(tmp_path, "other")
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("no certificate")
    missing = tmp_path / "missing.pem"
    for files, message in [
        ({"ca_file": missing}, "missing.pem: No such file"),
        ({"ca_file": no_pem}, "no.pem: no certificate or crl found"),
        ({"cert_file": no_pem}, "no.pem"),
        ({"cert_file": mine.cert, "key_file": missing}, "No such file"),
        ({"cert_file": mine.cert, "key_file": other.key}, "key values mismatch"),
        ({"key_file": mine.key}, "a key without its certificate"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            tls_context(Destination("https://z/", **files))
        assert caught.value.hint
    with pytest.raises(UsageError, match="no https URL"):
        tls_context(Destination("http://z/", ca_file=mine.cert))
