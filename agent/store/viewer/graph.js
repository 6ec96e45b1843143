// The dependency graph: which service calls which, how often, how well, how fast.

import { get } from "./api.js";
import { h, isTyping, replace, serviceLabel, state } from "./dom.js";
import { count, duration } from "./format.js";
import { GraphCanvas } from "./graph_canvas.js";
import { neighbourhood } from "./graph_layout.js";
import { nodeStats, rateText, shareText, withShares } from "./graph_stats.js";
import * as router from "./router.js";

const RANGES = [
  [15 * 60e3, "Last 15 minutes"],
  [3600e3, "Last hour"],
  [6 * 3600e3, "Last 6 hours"],
  [24 * 3600e3, "Last 24 hours"],
  [7 * 24 * 3600e3, "Last 7 days"],
];
const DEFAULT_LOOKBACK = 3600e3; // milliseconds, as all ranges and endTs

// More do not tell anything as a drawing.
const MAX_DRAWN = 1000;

const COLUMNS = [
  ["Caller", (edge) => edge.parent],
  ["Called", (edge) => edge.child],
  ["Calls", (edge) => edge.callCount],
  ["Rate", (edge) => edge.callCount],
  ["Errors", (edge) => edge.errorCount],
  ["Error share", (edge) => edge.errorShare],
  ["p50", (edge) => edge.p50Us],
  ["p95", (edge) => edge.p95Us],
  ["p99", (edge) => edge.p99Us],
];

export const keys = [
  ["Tab", "next service or call"],
  ["Enter", "a service with its neighbours; keep a call's numbers"],
  ["+ − 0", "zoom in, out, all"],
  ["Esc", "back to all services"],
];

/** Build the page; range and service are those of the address. */
export async function show(view, url, signal) {
  const page = new GraphPage(url, signal);
  replace(view, page.element);
  await page.load();
}

class GraphPage {
  constructor(url, signal) {
    this._signal = signal;
    this._loading = new AbortController();
    signal.addEventListener("abort", () => this._loading.abort());
    const { searchParams } = url;
    this._lookback = whole(searchParams.get("lookback")) ?? DEFAULT_LOOKBACK;
    this._endTs = whole(searchParams.get("endTs"));
    this._service = searchParams.get("service") ?? "";
    this._edges = [];
    this._kept = null; // the edge whose numbers stay
    this._told = null; // whose numbers are shown
    this._order = { column: 2, down: true };

    this._canvas = new GraphCanvas({
      onLook: (item) => this._tell(item),
      onEdge: (edge) => this._keep(edge),
      onNode: (name) => this._choose(name === this._service ? "" : name),
      signal,
    });
    this._summary = h("p", { class: "muted", role: "status" });
    this._range = h("select", { "aria-label": "Range", onchange: () => this._setRange() });
    this._picker = h("select", {
      "aria-label": "Service",
      onchange: () => this._choose(this._picker.value),
    });
    this._all = h(
      "button",
      { type: "button", onclick: () => this._choose(""), hidden: true },
      "All services",
    );
    this._numbers = h("aside", {
      class: "graph-numbers panel",
      "aria-label": "Numbers",
      "aria-live": "polite",
    });
    this._drawing = h("div", { class: "graph-drawing panel" }, this._canvas.element, legend());
    this._table = h("section", { class: "panel graph-table", "aria-label": "The same as a table" });
    this._content = h(
      "div",
      { class: "graph-content" },
      h("div", { class: "graph-main" }, this._drawing, this._numbers),
      this._table,
    );
    this._instead = h("div", { class: "panel", hidden: true });
    this.element = h(
      "div",
      { class: "graph-page" },
      h(
        "div",
        { class: "toolbar graph-tools" },
        h("h1", null, "Dependencies"),
        this._summary,
        h("span", { class: "push" }),
        this._all,
        this._picker,
        this._range,
        h("button", { type: "button", onclick: () => this.load() }, "Refresh"),
      ),
      this._instead,
      this._content,
    );
    this._fillRanges();
    document.addEventListener("keydown", (event) => this._key(event), { signal });
  }

  /** Ask for the edges of the range, and draw them. */
  async load() {
    this._loading.abort();
    this._loading = new AbortController();
    const { signal } = this._loading;
    if (this._edges.length) this._content.setAttribute("aria-busy", "true");
    else this._showInstead("loading", "Loading the dependencies…");
    try {
      const endTs = this._endTs ?? Date.now();
      const edges = await get("/api/podspan/v1/edges", { endTs, lookback: this._lookback }, signal);
      if (signal.aborted) return;
      this._edges = withShares(edges, this._lookback);
      this._draw();
    } catch (error) {
      if (signal.aborted) return;
      if (error.text === undefined) console.error(error);
      this._edges = [];
      this._summary.textContent = "";
      this._showInstead("error", error.text ?? String(error), () => this.load());
    } finally {
      if (!signal.aborted) this._content.removeAttribute("aria-busy");
    }
  }

  _draw() {
    const services = namesIn(this._edges);
    const edges = this._service ? neighbourhood(this._edges, this._service) : this._edges;
    this._kept = edges.find((edge) => same(edge, this._kept)) ?? null;
    this._fillPicker(services);
    this._all.hidden = !this._service;
    this._summary.textContent = this._service
      ? `${count(edges.length)} of ${count(this._edges.length, "edge")}`
      : `${count(services.length, "service")}, ${count(edges.length, "edge")}`;
    if (!edges.length) {
      this._showEmpty();
      return;
    }
    this._instead.hidden = true;
    this._content.hidden = false;
    const drawable = edges.length <= MAX_DRAWN;
    this._drawing.classList.toggle("too-many", !drawable);
    this._canvas.draw(drawable ? edges : [], this._service);
    this._canvas.keep(this._kept);
    this._told = null;
    this._tell(null);
    this._fillTable(edges);
  }

  _showInstead(kind, text, retry, ...more) {
    this._content.hidden = true;
    this._instead.hidden = false;
    state(this._instead, kind, text, retry, ...more);
  }

  _showEmpty() {
    const longest = RANGES.at(-1);
    const wider =
      this._lookback < longest[0] &&
      h("button", { type: "button", onclick: () => this._look(longest[0]) }, longest[1]);
    if (this._service && this._edges.length) {
      this._showInstead(
        "empty",
        `${this._service} neither called nor was called in this range.`,
        null,
        wider,
        h("button", { type: "button", onclick: () => this._choose("") }, "All services"),
      );
    } else {
      this._showInstead(
        "empty",
        "No service called another in this range.",
        null,
        wider,
        h("button", { type: "button", onclick: () => this.load() }, "Look again"),
      );
    }
  }

  // --- range and service ---

  _fillRanges() {
    const known = RANGES.some(([ms]) => ms === this._lookback) && this._endTs === null;
    const here =
      this._endTs === null
        ? `Last ${duration(this._lookback * 1e3)}`
        : `${duration(this._lookback * 1e3)} until ${new Date(this._endTs).toLocaleString()}`;
    replace(
      this._range,
      !known && h("option", { value: "here", selected: true }, here),
      RANGES.map(([ms, name]) =>
        h("option", { value: ms, selected: known && ms === this._lookback }, name),
      ),
    );
  }

  _setRange() {
    if (this._range.value !== "here") this._look(Number(this._range.value));
  }

  _look(lookback) {
    this._lookback = lookback;
    this._endTs = null;
    this._fillRanges();
    this._note();
    this.load();
  }

  _fillPicker(services) {
    const unknown = this._service && !services.includes(this._service);
    replace(
      this._picker,
      h("option", { value: "" }, "All services"),
      unknown && h("option", { value: this._service }, this._service),
      services.map((name) => h("option", { value: name }, name)),
    );
    this._picker.value = this._service;
  }

  _choose(service) {
    this._service = service;
    this._note();
    this._draw();
    if (service) this._canvas.focusNode(service);
  }

  _note() {
    const params = new URLSearchParams();
    if (this._lookback !== DEFAULT_LOOKBACK) params.set("lookback", this._lookback);
    if (this._endTs !== null) params.set("endTs", this._endTs);
    if (this._service) params.set("service", this._service);
    const text = params.toString();
    router.note(text ? `/dependencies?${text}` : "/dependencies", { push: true });
  }

  _key(event) {
    if (event.defaultPrevented || isTyping(event)) return;
    const actions = {
      "+": () => this._canvas.zoom(1.25),
      "=": () => this._canvas.zoom(1.25),
      "-": () => this._canvas.zoom(0.8),
      0: () => this._canvas.fit(),
      Escape: () => (this._kept ? this._keep(null) : this._service && this._choose("")),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  // --- numbers ---

  _keep(edge) {
    this._kept = same(edge, this._kept) ? null : edge;
    this._canvas.keep(this._kept);
    this._tell(this._kept ? { edge: this._kept } : null);
  }

  /** Tell about what is looked at; about nothing: what is kept, the service, or how. */
  _tell(item) {
    const edge = item?.edge ?? (item ? null : this._kept);
    const name = item?.name ?? (item || edge ? "" : this._service);
    // What is told already stays as it is: a link in it may be about to be pressed.
    if (this._told && this._told.edge === edge && this._told.name === name) return;
    this._told = { edge, name };
    if (edge) replace(this._numbers, this._edgeNumbers(edge));
    else if (name) replace(this._numbers, this._nodeNumbers(name));
    else
      replace(
        this._numbers,
        h(
          "p",
          { class: "muted" },
          !this._canvas.legible && "These are many: zoom in, or choose a service above. ",
          "Point at a service or a call, or go to it by Tab, to see its numbers. Press a service to see it with its neighbours.",
        ),
      );
  }

  _edgeNumbers(edge) {
    return [
      h(
        "h2",
        null,
        serviceLabel(edge.parent),
        h("span", { class: "muted" }, " → "),
        serviceLabel(edge.child),
      ),
      numbers([
        ["Rate", rateText(edge.rate)],
        ["Calls", count(edge.callCount)],
        ["Errors", `${count(edge.errorCount)}, ${shareText(edge.errorShare)}`, edge.errorCount > 0],
        ["p50", duration(edge.p50Us)],
        ["p95", duration(edge.p95Us)],
        ["p99", duration(edge.p99Us)],
      ]),
      h(
        "p",
        null,
        h(
          "a",
          { href: this._tracesHref({ serviceName: edge.parent, remoteServiceName: edge.child }) },
          "Traces with this call",
        ),
      ),
    ];
  }

  _nodeNumbers(name) {
    const { incoming, outgoing } = nodeStats(this._edges, name);
    return [
      h("h2", null, serviceLabel(name)),
      h("h3", null, `Called by ${count(incoming.edges, "service")}`),
      incoming.edges > 0 && totals(incoming),
      h("h3", null, `Calls ${count(outgoing.edges, "service")}`),
      outgoing.edges > 0 && totals(outgoing),
      h(
        "p",
        null,
        h("a", { href: this._tracesHref({ serviceName: name }) }, `Traces with ${name}`),
      ),
    ];
  }

  _tracesHref(wanted) {
    const params = new URLSearchParams(wanted);
    params.set("lookback", this._lookback);
    if (this._endTs !== null) params.set("endTs", this._endTs);
    return `/?${params}`;
  }

  // --- table ---

  _fillTable(edges) {
    const { column, down } = this._order;
    const key = COLUMNS[column][1];
    const order = (one, other) => (key(one) < key(other) ? -1 : Number(key(one) > key(other)));
    const sorted = edges.toSorted((one, other) => (down ? -order(one, other) : order(one, other)));
    replace(
      this._table,
      h(
        "table",
        null,
        h("caption", { class: "hidden" }, "Calls between services"),
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            COLUMNS.map(([name], index) => this._columnHead(name, index, edges)),
            h("th", null, h("span", { class: "hidden" }, "Traces")),
          ),
        ),
        h(
          "tbody",
          null,
          sorted.map((edge) => this._line(edge)),
        ),
      ),
    );
  }

  _columnHead(name, index, edges) {
    const { column, down } = this._order;
    const sorted = index === column;
    return h(
      "th",
      {
        scope: "col",
        class: index > 1 ? "number" : null,
        "aria-sort": sorted ? (down ? "descending" : "ascending") : null,
      },
      h(
        "button",
        {
          type: "button",
          class: "link",
          onclick: () => {
            this._order = { column: index, down: sorted ? !down : index > 1 };
            this._fillTable(edges);
            this._table.querySelectorAll("th button")[index].focus();
          },
        },
        name,
      ),
    );
  }

  _line(edge) {
    const look = () => this._canvas.look({ edge });
    const away = () => this._canvas.look(null);
    return h(
      "tr",
      { onmouseenter: look, onmouseleave: away, onfocusin: look, onfocusout: away },
      h("td", null, this._serviceButton(edge.parent)),
      h("td", null, this._serviceButton(edge.child)),
      h("td", { class: "number" }, count(edge.callCount)),
      h("td", { class: "number" }, rateText(edge.rate)),
      h("td", { class: edge.errorCount ? "number error-text" : "number" }, count(edge.errorCount)),
      h(
        "td",
        { class: edge.errorCount ? "number error-text" : "number" },
        shareText(edge.errorShare),
      ),
      [edge.p50Us, edge.p95Us, edge.p99Us].map((us) => h("td", { class: "number" }, duration(us))),
      h(
        "td",
        { class: "number" },
        h(
          "a",
          {
            href: this._tracesHref({ serviceName: edge.parent, remoteServiceName: edge.child }),
            "aria-label": `Traces with calls of ${edge.parent} to ${edge.child}`,
          },
          "Traces",
        ),
      ),
    );
  }

  _serviceButton(name) {
    return h(
      "button",
      { type: "button", class: "link", onclick: () => this._choose(name) },
      serviceLabel(name),
    );
  }
}

function totals({ rate, callCount, errorCount, errorShare }) {
  return numbers([
    ["Rate", rateText(rate)],
    ["Calls", count(callCount)],
    ["Errors", `${count(errorCount)}, ${shareText(errorShare)}`, errorCount > 0],
  ]);
}

function numbers(pairs) {
  return h(
    "dl",
    null,
    pairs.map(([name, text, failed]) =>
      h("div", null, h("dt", null, name), h("dd", { class: failed ? "error-text" : null }, text)),
    ),
  );
}

function legend() {
  const item = (kind, text) => h("li", null, h("i", { class: `legend-line ${kind}` }), text);
  return h(
    "ul",
    { class: "graph-legend", "aria-label": "Colours" },
    item("ok", "errors below 50 %"),
    item("warn", "from 50 %"),
    item("error", "from 75 %"),
    h("li", null, "width: rate"),
    h("li", null, "beside a line: rate · p95 · errors"),
  );
}

function namesIn(edges) {
  return [...new Set(edges.flatMap(({ parent, child }) => [parent, child]))].sort();
}

function same(one, other) {
  return Boolean(one && other && one.parent === other.parent && one.child === other.child);
}

function whole(text) {
  return /^\d{1,15}$/.test(text ?? "") && Number(text) > 0 ? Number(text) : null;
}
