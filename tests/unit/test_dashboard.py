"""The Grafana dashboard asks for what /metrics really tells."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from podspan.agent.metrics import Format, agent_families, exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from unit.test_istio_metrics import Metrics, client, connection, server, stream
from unit.test_metrics import snapshot

PATH = Path(__file__).parents[2] / "deploy" / "grafana" / "podspan.json"
COLUMNS = 24  # of Grafana's grid

# Of PromQL: https://prometheus.io/docs/prometheus/latest/querying/
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS = GROUPING | {"and", "or", "unless", "bool", "offset"}
TOKEN = re.compile(
    r"""(?P<range> \[ [^\]]* \])
    | (?P<text> "(?:[^"\\]|\\.)*")
    | (?P<variable> \$\w+)
    | (?P<number> \d[\w.]*)
    | (?P<name> [A-Za-z_:][\w:]*)
    | (?P<sign> =~ | !~ | != | [^\s])""",
    re.VERBOSE,
)
TARGETS_LABELS = {"job", "instance"}  # which Prometheus adds


class Query:
    """What one expression names: selectors by metric, and labels it groups by."""

    def __init__(self, expression):
        self.selected = []  # metric, labels matched
        self.grouped = set()
        tokens = [
            (match.lastgroup, match[0].strip()) for match in TOKEN.finditer(expression)
        ]
        opened = []  # of each bracket, the word before it
        for index, (kind, text) in enumerate(tokens):
            before = tokens[index - 1][1] if index else ""
            after = tokens[index + 1][1] if index + 1 < len(tokens) else ""
            if text in "({":
                opened.append(before)
            elif text in ")}":
                opened.pop()
            elif kind == "name":
                self._take(text, opened[-1] if opened else "", after)
        assert not opened, f"unbalanced: {expression}"

    def _take(self, name, opener, after):
        if opener in GROUPING:
            self.grouped.add(name)
        elif after in ("=", "=~", "!=", "!~"):
            self.selected[-1][1].add(name)
        elif after not in ("(", "by", "without") and name not in WORDS:
            self.selected.append((name, set()))

    @property
    def metrics(self):
        return {metric for metric, _ in self.selected}


def test_the_query_reader_finds_metrics_matchers_and_groups():
    query = Query(
        'histogram_quantile(0.9, sum by (le, a) (rate(b_bucket{c=~"x{y}=z", d!="$e"}'
        "[$__rate_interval]))) / on (f) group_left (g) h or vector(0) > 1e3 "
        'unless sum(i{j="k"})'
    )
    assert query.selected == [("b_bucket", {"c", "d"}), ("h", set()), ("i", {"j"})]
    assert query.grouped == {"le", "a", "f", "g"}


@pytest.fixture(scope="module")
def dashboard():
    return json.loads(PATH.read_text())


@pytest.fixture(scope="module")
def labels_of(tmp_path_factory):
    """The labels of each sample that an agent tells which has seen some of all."""
    metrics = Metrics(tmp_path_factory.mktemp("netns"))
    metrics.observe(client(), server(), stream(grpc_status="0"), connection())
    families = [*agent_families(snapshot()), *metrics.requests.families()]
    text = "".join(exposition(families, Format.OPENMETRICS))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def panels_of(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets_of(dashboard):
    return [target for panel in panels_of(dashboard) for target in panel["targets"]]


def queries_of(dashboard):
    return [Query(target["expr"]) for target in targets_of(dashboard)]


def test_every_metric_and_label_of_a_panel_is_told(dashboard, labels_of):
    for query in queries_of(dashboard):
        for metric, matched in query.selected:
            assert metric in labels_of
            assert matched <= labels_of[metric] | TARGETS_LABELS, metric
        known = set().union(*(labels_of[metric] for metric in query.metrics))
        assert query.grouped <= known | TARGETS_LABELS, query.selected


def test_legends_name_what_is_left_after_grouping(dashboard):
    for target in targets_of(dashboard):
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= Query(target["expr"]).grouped, target


def test_variables_are_asked_of_what_is_told(dashboard, labels_of):
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for one in variables.values():
        if one["type"] != "query":
            continue
        call = one["query"]["query"].removeprefix("label_values(").removesuffix(")")
        selector, label = call.rsplit(", ", 1)
        [(metric, matched)] = Query(selector).selected
        assert matched | {label} <= labels_of[metric]


def test_no_variable_is_missing(dashboard):
    known = {one["name"] for one in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - known <= {"__rate_interval", "__all"}


def test_the_data_source_is_the_users_choice_everywhere(dashboard):
    for one in [
        *panels_of(dashboard),
        *targets_of(dashboard),
        *(v for v in dashboard["templating"]["list"] if v["type"] == "query"),
    ]:
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_all_that_is_told_of_requests_and_health_is_shown(dashboard, labels_of):
    """But for the halves of histograms that no quantile needs."""
    shown = set().union(*(query.metrics for query in queries_of(dashboard)))
    halves = {name for name in labels_of if re.search(r"_(sum|count)$", name)}
    assert set(labels_of) - halves == shown


def test_latencies_lead_to_traces(dashboard):
    latencies = [
        target
        for panel in panels_of(dashboard)
        if panel["type"] == "timeseries"
        for target in panel["targets"]
        if "istio_request_duration" in target["expr"]
    ]
    assert len(latencies) == 6  # three quantiles, by service and by edge
    assert all(target["exemplar"] for target in latencies)


def test_panels_have_places_and_names_of_their_own(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    titles = [panel["title"] for panel in panels_of(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= COLUMNS
    for one, other in combinations(panels, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (
            one["title"],
            other["title"],
        )


def overlap(one, other):
    return all(
        one[start] < other[start] + other[size]
        and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_its_form_is_a_current_grafanas(dashboard):
    assert dashboard["schemaVersion"] == 42  # Grafana 12
    kinds = {panel["type"] for panel in panels_of(dashboard)}
    assert kinds == {"timeseries", "stat", "table"}
