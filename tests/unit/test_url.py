"""Request line and Host become a URL, and no secret in it is kept."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from podspan.agent.url import HOST_CUT, TARGET_CUT, request_url


def url(target, host="a:90", method="GET", *, max_path=TARGET_CUT, query=True):
    made = request_url(method, target, host, max_path=max_path, query=query)
    return f"{made.scheme}://{made.authority.text}{made.path}"


@pytest.mark.parametrize(
    ("source", "target", "host", "expected"),
    [
        # Origin form: Host is the authority.
        ("RFC 9112 3.2.1", "/p?q=1", "a:90", "http://a:90/p?q=1"),
        ("RFC 9112 3.3", "/p", "a", "http://a/p"),
        ("RFC 9110 4.2.3: host in lower case", "/P", "A.b", "http://a.b/P"),
        ("RFC 3986 3.2.2", "/", "[FD00::1]:90", "http://[fd00::1]:90/"),
        ("RFC 6874", "/", "[fe80::1%25eth0]", "http://[fe80::1%25eth0]/"),
        ("RFC 3986 3.2.3: empty port", "/", "a:", "http://a:/"),
        ("RFC 9112 3.2: no Host", "/p", "", "http:///p"),
        ("RFC 9112 3.2: a Host that is none", "/p", "a/b", "http:///p"),
        ("RFC 9112 3.2: a Host that is none", "/p", "a b", "http:///p"),
        ("RFC 9112 3.2: a Host that is none", "/p", "a:http", "http:///p"),
        ("RFC 9112 3.2: a Host that is none", "/p", "a:65536", "http:///p"),
        ("RFC 9112 3.2: a Host that is none", "/p", "[a", "http:///p"),
        # Absolute form: above Host.
        ("RFC 9112 3.2.2", "http://b/p", "a", "http://b/p"),
        ("RFC 9112 3.2.2", "https://b:1/p?q", "a", "https://b:1/p?q"),
        ("RFC 3986 3.1: scheme in lower case", "HTTP://B/P", "a", "http://b/P"),
        ("RFC 3986 3.3: no path", "http://b", "a", "http://b"),
        ("RFC 3986 3.4: no path but a query", "http://b?q", "a", "http://b?q"),
        ("RFC 9110 7.1: no fragment", "http://b/p#f", "a", "http://b/p"),
        ("not an authority: Host", "http:///p", "a", "http://a"),
        ("not an authority: Host", "http://u:p/w@b/p", "a", "http://a"),
        # Asterisk form.
        ("RFC 9112 3.2.4", "*", "a:90", "http://a:90"),
        # None of the forms.
        ("RFC 9112 3.2", "p", "a", "http://a"),
        ("RFC 9112 3.2", "u:p@b", "a", "http://a"),
        # Userinfo.
        ("semconv url.full", "http://u:p@b/", "", "http://REDACTED:REDACTED@b/"),
        ("semconv url.full", "http://u@b/", "", "http://REDACTED:REDACTED@b/"),
        ("semconv url.full", "http://u:p@p@b/", "", "http://REDACTED:REDACTED@b/"),
        ("semconv url.full", "/", "u:p@b", "http://REDACTED:REDACTED@b/"),
    ],
)
def test_the_target_uri(source, target, host, expected):
    assert url(target, host) == expected, source


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("RFC 9112 3.2.3", "db:443", "http://db:443"),
        ("RFC 9112 3.2.3", "[fd00::1]:443", "http://[fd00::1]:443"),
        ("semconv url.full", "u:p@db:443", "http://REDACTED:REDACTED@db:443"),
        ("not an authority", "http://db/", "http://"),
    ],
)
def test_connect_names_an_authority_and_no_path(source, target, expected):
    assert url(target, "proxy", "CONNECT") == expected, source


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        # semconv url.full: the key stays, the value goes.
        ("color=blue&sig=s3cret", "color=blue&sig=REDACTED"),
        ("sig=s3cret&color=blue", "sig=REDACTED&color=blue"),
        ("AWSAccessKeyId=s3cret", "AWSAccessKeyId=REDACTED"),
        ("Signature=s3cret", "Signature=REDACTED"),
        ("X-Goog-Signature=s3cret", "X-Goog-Signature=REDACTED"),
        ("sig=s3cret&sig=s3cret", "sig=REDACTED&sig=REDACTED"),
        ("sig=s3=cret;x=s3cret?", "sig=REDACTED"),
        ("sig=", "sig=REDACTED"),
        # HTML 4.01 appendix B.2.2: `;` separates, too.
        ("a=1;sig=s3cret", "a=1;sig=REDACTED"),
        # RFC 3986 section 2.3: the same key, percent-encoded.
        ("s%69g=s3cret", "s%69g=REDACTED"),
        ("X%2dGoog%2DSignature=s3cret", "X%2dGoog%2DSignature=REDACTED"),
        # semconv url.full: matching is case-sensitive.
        ("SIG=open", "SIG=open"),
        # Other keys.
        ("design=open", "design=open"),
        ("sigh=open", "sigh=open"),
        ("sig", "sig"),
        ("a=sig=open", "a=sig=open"),
    ],
)
def test_values_of_secret_parameters_are_not_kept(query, expected):
    assert url(f"/p?{query}") == f"http://a:90/p?{expected}"
    assert url(f"https://b/p?{query}") == f"https://b/p?{expected}"


def test_without_queries_only_the_path_is_left():
    assert url("/p?q=1?2", query=False) == "http://a:90/p"
    assert url("http://b?q", query=False) == "http://b"


@pytest.mark.parametrize(
    ("target", "max_path", "expected"),
    [
        # Istio's max_path_tag_length counts the query (ISTIO.md section 3).
        ("/path?q=1", 5, "http://a:90/path"),
        ("/path?q=1", 8, "http://a:90/path?q="),
        ("/path?q=1", 9, "http://a:90/path?q=1"),
        ("http://b/path", 3, "http://b/pa"),
        # Cut after the secrets were taken out, never within one.
        ("/?sig=s3cret", 8, "http://a:90/?sig=RE"),
    ],
)
def test_a_long_path_is_cut(target, max_path, expected):
    assert url(target, max_path=max_path) == expected


def test_what_the_kernel_cut_is_not_taken_for_whole():
    long = "/" + "x" * 300
    assert url(long[:TARGET_CUT]) == f"http://a:90{long[:TARGET_CUT]}"
    # A path follows, so the authority is whole.
    assert url(f"http://b/{long}"[:TARGET_CUT]).startswith("http://b//xxx")
    # None does: what looks like host and port may be user and password.
    assert url(f"http://u:{'1' * 300}@b/"[:TARGET_CUT]) == "http://a:90"
    assert url(f"http://{'u' * 300}@b/"[:TARGET_CUT]) == "http://a:90"
    assert url(f"{'x' * 300}:443"[:TARGET_CUT], method="CONNECT") == "http://"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("x" * HOST_CUT, "x" * HOST_CUT),
        ("x" * (HOST_CUT - 2) + ":8", "x" * (HOST_CUT - 2)),  # 80, or 8080
        ("é" * (HOST_CUT // 2), "é" * (HOST_CUT // 2)),  # two bytes each
        ("u:" + "p" * (HOST_CUT - 2), ""),
    ],
)
def test_a_host_that_the_kernel_cut_is_no_authority(host, name):
    made = request_url("GET", "/", host, max_path=1, query=True).authority
    assert made == ("", name, 0, "")


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("Reviews:9080", "reviews"),
        ("reviews.default.svc", "reviews.default.svc"),
        ("u:p@reviews", "reviews"),
        ("10.0.0.1:80", ""),
        ("10.0.0.1", ""),
        ("[fd00::1]", ""),
        ("", ""),
    ],
)
def test_a_name_is_a_service_and_an_address_is_none(host, service):
    made = request_url("GET", "/", host, max_path=1, query=True)
    assert made.authority.service == service


@pytest.mark.parametrize(
    ("target", "port"),
    [
        ("/", 80),
        ("http://b/", 80),
        ("https://b/", 443),
        ("https://b:8443/", 8443),
        ("ftp://b/", 0),
    ],
)
def test_a_scheme_has_its_port(target, port):  # RFC 9110 section 4.2
    made = request_url("GET", target, "a", max_path=1, query=True)
    assert made.authority.port == port


HIDDEN = "s3cret"
noise = st.text("ab/?#&;=@:%[]* \t\n\0é\ufffd", max_size=12)
keys = st.sampled_from(("sig", "Signature", "AWSAccessKeyId", "X-Goog-Signature"))


@given(noise, keys, st.sets(st.integers(0, 15)), noise, st.integers(1, 256))
def test_a_secret_parameter_never_gets_through(before, key, encoded, after, size):
    spelled = "".join(
        f"%{ord(char):02X}" if at in encoded else char for at, char in enumerate(key)
    )
    target = f"/{before.replace('#', '')}?{spelled}={HIDDEN}&{after}"
    # Whatever stands before may be a query already, in which a second `?` is text.
    if "?" in before:
        target = target.replace(f"?{spelled}", f"&{spelled}")
    made = request_url("GET", target, "a", max_path=size, query=True)
    assert HIDDEN not in made.path


@given(st.text(max_size=8), st.text(max_size=200), st.sampled_from(["", "/p", "?q"]))
def test_userinfo_never_gets_through(user, filling, rest):
    userinfo = f"{quote(user, safe='')}:{HIDDEN}{quote(filling, safe='')}"
    target = f"http://{userinfo}@b{rest}"[:TARGET_CUT]
    assert HIDDEN not in str(request_url("GET", target, "a", max_path=256, query=True))


@given(noise, noise, st.sampled_from(["GET", "CONNECT", ""]), st.booleans())
def test_any_text_makes_a_url(target, host, method, query):
    made = request_url(method, target, host, max_path=256, query=query)
    assert not {"@", "/", "?", " ", "\n", "\0"} & set(made.authority.host)
    assert 0 <= made.authority.port <= 65535
