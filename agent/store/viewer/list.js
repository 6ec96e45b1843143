// The list of traces: filters, latency scatter, results.

import { get, getPatiently } from "./api.js";
import { h, isTyping, replace, state, walk } from "./dom.js";
import { filterForm } from "./filter_form.js";
import {
  ANY_TIME,
  DEFAULTS,
  LOOKBACKS,
  SORTS,
  readFilters,
  searchParams,
  sorted,
  writeFilters,
} from "./filters.js";
import { count } from "./format.js";
import * as router from "./router.js";
import { scatter } from "./scatter.js";
import { mark, row, traceHref } from "./trace_row.js";

const AWAY = "The store is away";
const SCALES = { log: "Log", linear: "Linear" };

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
  const plot = scatter({
    signal,
    onOpen: (trace) => router.go(traceHref(trace)),
    onBrush: (area) => findWith({ ...filters, ...area }),
    onPoint: (trace) => mark(results, trace),
  });
  const sort = choice("sort", "Sort by", SORTS, filters.sort, (value) => look({ sort: value }));
  const scale = choice("scale", "Scale of latency", SCALES, filters.scale, (value) =>
    look({ scale: value }),
  );
  const plotPanel = h(
    "section",
    { class: "panel plot-panel", "aria-label": "Latency over time", hidden: true },
    h(
      "div",
      { class: "toolbar" },
      h("h2", null, "Latency"),
      h("span", { class: "muted small plot-hint" }, "Drag to narrow, click to open"),
      h("div", { class: "push" }, scale),
    ),
    plot.element,
  );
  const found = h("p", { class: "found", role: "status" });
  const results = h("div", { class: "results" });
  replace(
    view,
    h("h1", { class: "hidden" }, "Traces"),
    form.element,
    plotPanel,
    h(
      "section",
      { class: "panel", "aria-label": "Results" },
      h("div", { class: "toolbar results-bar" }, found, h("div", { class: "push" }, sort)),
      results,
    ),
  );
  document.addEventListener("keydown", onKey, { signal });
  await ask();

  /** Search, and write down in the history what for. */
  function find(wanted) {
    filters = { ...wanted, sort: filters.sort, scale: filters.scale };
    router.note(writeFilters(filters), { push: true });
    return ask();
  }

  /** Search for what the form does not say yet. */
  function findWith(wanted) {
    form.write(wanted);
    find(wanted);
  }

  /** Look at what was found in another way. */
  function look(change) {
    filters = { ...filters, ...change };
    router.note(writeFilters(filters));
    render();
  }

  async function ask() {
    search.abort();
    search = new AbortController();
    const { signal: mine } = search;
    results.setAttribute("aria-busy", "true");
    if (traces.length === 0) {
      found.textContent = "Searching…";
      state(results, "loading", "Searching…");
    }
    try {
      const params = searchParams(filters);
      const answer = await getPatiently("/api/podspan/v1/summaries", params, mine, away);
      if (mine.aborted) return;
      traces = answer;
      await render();
    } catch (error) {
      if (mine.aborted) return;
      fail("No results", error.text ?? String(error), ask);
      if (error.text === undefined) console.error(error);
    } finally {
      if (!mine.aborted) results.removeAttribute("aria-busy");
    }
  }

  function away(error, retryNow) {
    retry = retryNow;
    // Said once: what is said again at each failure would be read aloud again.
    if (found.textContent === AWAY) return;
    fail(AWAY, `${error.text} Trying again until it does.`, () => retry());
  }

  function fail(title, text, again) {
    traces = [];
    plotPanel.hidden = true;
    found.textContent = title;
    state(results, "error", text, again);
  }

  async function render() {
    plotPanel.hidden = traces.length === 0;
    plot.draw(traces, filters.scale);
    replace(found, summary(traces, filters.limit));
    if (traces.length === 0) {
      const services = await get("/api/v2/services", {}, signal).catch(() => null);
      if (!signal.aborted && traces.length === 0) explain(results, services, filters, findWith);
      return;
    }
    const longest = Math.max(...traces.map((trace) => trace.duration ?? 0), 1);
    const now = Date.now();
    replace(
      results,
      h(
        "ol",
        { class: "traces", onfocusin: onRow, onmouseover: onRow },
        sorted(traces, filters.sort).map((trace) => row(trace, longest, now)),
      ),
    );
  }

  function onRow(event) {
    plot.highlight(event.target.closest("li[data-trace]")?.dataset.trace ?? null);
  }

  function onKey(event) {
    if (isTyping(event)) return;
    if (event.key === "r") ask();
    walk(event, [...results.querySelectorAll(".trace-link")]);
  }
}

/** Return, as children for `h`, how many traces there are. */
function summary(traces, limit) {
  const failed = traces.filter((trace) => trace.errorCount > 0).length;
  return [
    h("b", null, count(traces.length, "trace")),
    traces.length >= limit && ", the newest; there may be more",
    failed > 0 && [" · ", h("span", { class: "error-text" }, `${count(failed)} with errors`)],
  ];
}

/** Say why nothing is found, and offer what may find something. */
function explain(results, services, filters, find) {
  const offer = (text, wanted) =>
    h("button", { type: "button", onclick: () => find(wanted) }, text);
  if (services?.length === 0) {
    const text =
      "The store has no spans yet. It shows what podspan's agents, or any Zipkin client, send to";
    const address = h("code", null, `${location.origin}/api/v2/spans`);
    state(results, "empty", text, null, address, offer("Look again", filters));
    return;
  }
  const { lookback, endTs, limit, sort, scale } = filters;
  const range = endTs === null && LOOKBACKS.find(([ms]) => ms === lookback);
  const unfiltered = { ...DEFAULTS, lookback, endTs, limit, sort, scale };
  state(
    results,
    "empty",
    `No trace matches (${range ? range[1].toLowerCase() : "in that range of time"}).`,
    null,
    lookback !== ANY_TIME &&
      offer("Look at any time", { ...filters, lookback: ANY_TIME, endTs: null }),
    writeFilters(filters) !== writeFilters(unfiltered) && offer("Without filters", unfiltered),
  );
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
