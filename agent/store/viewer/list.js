// The list of traces: filters, latency scatter, results.

import { get, getPatiently } from "./api.js";
import { h, isTyping, replace, serviceLabel, state } from "./dom.js";
import { filterForm } from "./filter_form.js";
import { ANY_TIME, DEFAULTS, LOOKBACKS, SORTS, readFilters, searchParams, sorted, writeFilters } from "./filters.js";
import { ago, clock, count, day, duration, statusClass, time } from "./format.js";
import * as router from "./router.js";
import { scatter } from "./scatter.js";

const AWAY = "The store is away";
const MAX_CHIPS = 8; // services named in a row; what is beyond is a number

export const keys = [
  ["j k", "next, previous trace"],
  ["↓ ↑", "the same, once in the list"],
  ["← →", "in the scatter: earlier, later trace"],
  ["Enter", "open the trace"],
  ["r", "search again"],
];

/** Build the page; its filters are those of the address. */
export async function show(view, url, signal) {
  let filters = readFilters(url.searchParams);
  let traces = [];
  let search = new AbortController();
  let retry = null;
  signal.addEventListener("abort", () => search.abort());

  const form = filterForm(filters, find);
  const found = h("p", { class: "found", role: "status" });
  const results = h("div", { class: "results" });
  const plot = scatter({
    signal,
    onOpen: (trace) => router.go(traceHref(trace)),
    onBrush: (area) => {
      filters = { ...filters, ...area };
      form.write(filters);
      find(filters);
    },
    onPoint: (trace) => mark(results, trace),
  });
  const sort = choice("sort", "Sort by", SORTS, filters.sort, (value) => {
    filters = { ...filters, sort: value };
    router.note(writeFilters(filters));
    render();
  });
  const scale = choice("scale", "Scale of latency", { log: "Log", linear: "Linear" }, filters.scale, (value) => {
    filters = { ...filters, scale: value };
    router.note(writeFilters(filters));
    plot.draw(traces, filters.scale);
  });
  const plotPanel = h(
    "section",
    { class: "panel plot-panel", "aria-label": "Latency over time" },
    h("div", { class: "toolbar" }, h("h2", null, "Latency"), h("span", { class: "muted small plot-hint" }, "Drag to narrow, click to open"), h("div", { class: "push" }, scale)),
    plot.element,
  );
  replace(
    view,
    h("h1", { class: "hidden" }, "Traces"),
    form.element,
    plotPanel,
    h("section", { class: "panel", "aria-label": "Results" }, h("div", { class: "toolbar results-bar" }, found, h("div", { class: "push" }, sort)), results),
  );
  document.addEventListener("keydown", onKey, { signal });
  await find(filters, { first: true });

  async function find(wanted, { first = false } = {}) {
    filters = { ...wanted, sort: filters.sort, scale: filters.scale };
    if (!first) router.note(writeFilters(filters), { push: true });
    search.abort();
    search = new AbortController();
    const { signal: mine } = search;
    results.setAttribute("aria-busy", "true");
    if (traces.length === 0) {
      found.textContent = "Searching…";
      state(results, "loading", "Searching…");
    }
    try {
      traces = await getPatiently("/api/podspan/v1/summaries", searchParams(filters), mine, away);
      if (!mine.aborted) await render();
    } catch (error) {
      if (mine.aborted) return;
      traces = [];
      plotPanel.hidden = true;
      found.textContent = "No results";
      state(results, "error", error.text ?? String(error), () => find(filters));
      if (error.text === undefined) console.error(error);
    } finally {
      if (!mine.aborted) results.removeAttribute("aria-busy");
    }
  }

  function away(error, retryNow) {
    if (search.signal.aborted) return;
    retry = retryNow;
    // Said once: what is said again at each failure would be read aloud again.
    if (found.textContent === AWAY) return;
    traces = [];
    plotPanel.hidden = true;
    found.textContent = AWAY;
    state(results, "error", `${error.text} Trying again until it does.`, () => retry());
  }

  async function render() {
    plotPanel.hidden = traces.length === 0;
    plot.draw(traces, filters.scale);
    if (traces.length === 0) {
      found.textContent = "0 traces";
      await explainEmpty();
      return;
    }
    const full = traces.length >= filters.limit ? `, the newest; there may be more` : "";
    const errors = traces.filter((trace) => trace.errorCount > 0).length;
    replace(
      found,
      h("b", null, count(traces.length, "trace")),
      full,
      errors > 0 && [" · ", h("span", { class: "error-text" }, `${count(errors)} with errors`)],
    );
    const longest = Math.max(...traces.map((trace) => trace.duration ?? 0), 1);
    const now = Date.now();
    replace(
      results,
      h("ol", { class: "traces", onfocusin: onRow, onmouseover: onRow }, sorted(traces, filters.sort).map((trace) => row(trace, longest, now))),
    );
  }

  async function explainEmpty() {
    const services = await get("/api/v2/services", {}, signal).catch(() => null);
    if (signal.aborted || traces.length > 0) return;
    if (services?.length === 0) {
      state(results, "empty", "The store has no spans yet. It shows what podspan's agents, or any Zipkin client, send to", null, h("code", null, `${location.origin}/api/v2/spans`), again("Look again", filters));
      return;
    }
    const range = LOOKBACKS.find(([ms]) => ms === filters.lookback && filters.endTs === null);
    const within = range ? ` (${range[1].toLowerCase()})` : " (in that range of time)";
    const unfiltered = { ...DEFAULTS, lookback: filters.lookback, endTs: filters.endTs, limit: filters.limit };
    const filtered = writeFilters({ ...filters, sort: DEFAULTS.sort, scale: DEFAULTS.scale }) !== writeFilters(unfiltered);
    state(
      results,
      "empty",
      `No trace matches${within}.`,
      null,
      range?.[0] !== ANY_TIME && again("Look at any time", { ...filters, lookback: ANY_TIME, endTs: null }),
      filtered && again("Without filters", unfiltered),
    );
  }

  function again(text, wanted) {
    return h("button", { type: "button", onclick: () => {
      form.write(wanted);
      find(wanted);
    } }, text);
  }

  function onRow(event) {
    plot.highlight(event.target.closest("li")?.dataset.trace ?? null);
  }

  function onKey(event) {
    if (isTyping(event)) return;
    const links = [...results.querySelectorAll(".trace-link")];
    const at = links.indexOf(document.activeElement);
    const step = { j: 1, k: -1, ArrowDown: at >= 0 && 1, ArrowUp: at >= 0 && -1 }[event.key];
    if (step && links.length > 0) {
      event.preventDefault();
      links[Math.min(Math.max(at + step, 0), links.length - 1)].focus();
    }
    if (event.key === "r") find(filters);
  }
}

/** Return a summary as a row of the list; `longest` is what a full bar means. */
function row(trace, longest, nowMs) {
  const { root = null, tags = {}, services = [] } = trace;
  const status = tags["http.status_code"];
  const failed = trace.errorCount > 0;
  const at = trace.timestamp;
  return h(
    "li",
    { class: failed ? "trace failed" : "trace", "data-trace": trace.traceId },
    h(
      "div",
      { class: "trace-what" },
      h(
        "a",
        { class: "trace-link", href: traceHref(trace), title: `Trace ${trace.traceId}` },
        serviceLabel(root?.serviceName ?? ""),
        h("bdi", { class: "trace-name" }, root?.name || "unnamed"),
      ),
      tags["http.method"] && h("span", { class: "badge" }, tags["http.method"]),
      status && h("span", { class: `badge ${statusClass(status)}`, title: "Status of the root span" }, status),
      h("bdi", { class: "trace-path cut muted mono" }, tags["http.path"] ?? tags["http.url"]),
    ),
    h(
      "ul",
      { class: "trace-services", "aria-label": "Services and their spans" },
      services.slice(0, MAX_CHIPS).map((service) =>
        h("li", { class: service.errorCount > 0 ? "chip failed" : "chip" }, serviceLabel(service.serviceName, service.spanCount)),
      ),
      services.length > MAX_CHIPS && h("li", { class: "chip muted" }, `and ${services.length - MAX_CHIPS} more`),
    ),
    h("span", { class: "trace-spans" }, count(trace.spanCount, "span")),
    h("span", { class: failed ? "trace-errors badge error" : "trace-errors" }, failed && count(trace.errorCount, "error")),
    h(
      "span",
      { class: "trace-duration" },
      h("span", { class: "bar", style: { "--share": (trace.duration ?? 0) / longest } }),
      h("b", null, duration(trace.duration)),
    ),
    h(
      "time",
      { class: "trace-time", datetime: at && new Date(at / 1e3).toISOString(), title: time(at) },
      at ? (day(at) === day(nowMs * 1e3) ? clock(at) : time(at).slice(5, -4)) : "–",
      at && h("span", { class: "muted" }, ago(at, nowMs)),
    ),
  );
}

function traceHref(trace) {
  return `/traces/${encodeURIComponent(trace.traceId)}`;
}

/** Mark the row of the trace that the scatter points at; null: none. */
function mark(results, trace) {
  for (const item of results.querySelectorAll("li.pointed")) item.classList.remove("pointed");
  if (trace) results.querySelector(`[data-trace="${CSS.escape(trace.traceId)}"]`)?.classList.add("pointed");
}

/** Return a group of radio buttons that look like one. */
function choice(name, label, options, chosen, onChange) {
  return h(
    "fieldset",
    { class: "choice", onchange: (event) => onChange(event.target.value) },
    h("legend", { class: "hidden" }, label),
    Object.entries(options).map(([value, text]) =>
      h("label", null, h("input", { type: "radio", name, value, checked: value === chosen }), text),
    ),
  );
}
