"""Annotations as kubelet writes them: Go's quoting, one a line."""

import pytest
from podspan.init.podinfo import parse


def test_a_file_of_the_downward_api():
    text = (
        'kubernetes.io/config.source="api"\n'
        'traffic.sidecar.istio.io/includeInboundPorts="80,8080"\n'
        'traffic.sidecar.istio.io/includeOutboundIPRanges=""\n'
        'note="a \\"quoted\\" = sign,\\n\\ttab, back\\\\slash, \\u2028 \\U0001f600 é"'
    )

    assert parse(text) == {
        "kubernetes.io/config.source": "api",
        "traffic.sidecar.istio.io/includeInboundPorts": "80,8080",
        "traffic.sidecar.istio.io/includeOutboundIPRanges": "",
        "note": 'a "quoted" = sign,\n\ttab, back\\slash, \u2028 \U0001f600 é',
    }


def test_no_annotations_are_an_empty_file():
    assert parse("") == {}


@pytest.mark.parametrize(
    "line", ["key", "key=value", 'key="value', '="value"', 'key="val"ue"', 'a b="c"']
)
def test_what_is_no_annotation_is_named_by_its_line(line):
    with pytest.raises(ValueError, match="line 2"):
        parse(f'good="1"\n{line}\n')
