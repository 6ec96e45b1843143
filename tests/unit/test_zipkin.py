"""Spans as Zipkin takes them, and what it answers; sending is in test_delivery.py."""

import json
from dataclasses import replace

import pytest
from podspan.agent.export.encoder import Outcome, one_line
from podspan.agent.export.zipkin import ZipkinEncoder
from podspan.agent.span import zipkin_json
from unit.backend import spans

ENCODER = ZipkinEncoder()


def test_a_body_is_a_list_of_the_spans():
    body = json.loads(ENCODER.encode(spans(3)))
    assert body == [json.loads(zipkin_json(span)) for span in spans(3)]


def test_any_text_arrives_as_it_was():
    strange = 'é"\\\x00\x7f\u2028\U0001f600'
    [span] = spans(1)
    [sent] = json.loads(
        ENCODER.encode([replace(span, name=strange, tags={"t": strange})])
    )
    assert sent["name"] == sent["tags"]["t"] == strange


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.SENT),
        (202, Outcome.SENT),
        (204, Outcome.SENT),
        (301, Outcome.SETUP),
        (307, Outcome.SETUP),
        (400, Outcome.REFUSED),
        (401, Outcome.SETUP),
        (403, Outcome.SETUP),
        (404, Outcome.SETUP),
        (405, Outcome.SETUP),
        (407, Outcome.SETUP),
        (408, Outcome.RETRY),
        (413, Outcome.TOO_LARGE),
        (415, Outcome.REFUSED),
        (429, Outcome.RETRY),
        (500, Outcome.RETRY),
        (503, Outcome.RETRY),
        (507, Outcome.RETRY),
    ],
)
def test_what_a_status_means(status, outcome):
    assert ENCODER.verdict(status, {}, b"").outcome is outcome


def test_an_answers_text_is_one_short_line():
    body = b"no,\nthanks\x1b[31m \xff " + b"x" * 10_000
    message = one_line(ENCODER.verdict(400, {}, body).message)
    assert message.startswith("HTTP 400 no, thanks [31m \N{REPLACEMENT CHARACTER} xxx")
    assert message.isprintable()
    assert len(message) == 200


def test_patience_is_asked_for_by_a_header():
    assert ENCODER.verdict(429, {"retry-after": " 7 "}, b"").retry_after == "7"
    assert ENCODER.verdict(400, {"retry-after": "7"}, b"").retry_after == ""


def test_a_redirects_target_is_told_without_its_query():
    verdict = ENCODER.verdict(302, {"location": "https://z/login?token=x"}, b"")
    assert verdict.message == "HTTP 302: redirects to https://z/login"
