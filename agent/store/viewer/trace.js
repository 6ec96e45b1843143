// The page of one trace: head, tools, waterfall, details.

import { ApiError, get } from "./api.js";
import { criticalPath, timeOnPath } from "./critical_path.js";
import { h, isTyping, replace, serviceLabel, state } from "./dom.js";
import { count, duration, statusClass, time } from "./format.js";
import { minimap } from "./minimap.js";
import * as router from "./router.js";
import { spanDetail } from "./span_detail.js";
import { buildTrace, operation, outcome, rowOfSpan, search } from "./trace_model.js";
import { Waterfall } from "./waterfall.js";

const ADDRESS_MS = 150; // browsers refuse to write the address more often than they like
const SEARCH_MS = 100;
const SERVICES_SHOWN = 12;

export const keys = [
  ["↑ ↓", "previous, next call"],
  ["← →", "collapse, expand; then to the parent, to the first child"],
  ["Enter", "details of the call"],
  ["n N", "next, previous hit of the search"],
  ["e E", "next, previous error"],
  ["c", "critical path on or off"],
  ["z 0", "zoom to the call, back to the whole trace"],
];

/** Build the page of the trace that the address names. */
export async function show(view, url, signal) {
  const id = url.pathname.split("/")[2];
  state(view, "loading", "Loading the trace…");
  let spans;
  try {
    spans = await get(`/api/v2/trace/${id}`, {}, signal);
  } catch (error) {
    if (!(error instanceof ApiError) || (error.status !== 404 && error.status !== 400)) throw error;
    spans = error.status === 404 ? [] : null;
  }
  if (signal.aborted) return;
  const all = h("a", { href: "/" }, "All traces");
  if (!spans) {
    const text = `“${id}” is no trace id: one has 16 or 32 hexadecimal digits.`;
    state(view, "error", text, null, all);
    return;
  }
  if (!spans.length) {
    state(
      view,
      "empty",
      `There is no trace ${id} in the store. Its spans may not have arrived yet, or were old enough to be removed.`,
      () => show(view, url, signal),
      all,
    );
    return;
  }
  const trace = buildTrace(spans);
  // Isolated, as <bdi> does elsewhere: what turns the writing around ends with its name.
  const names = [trace.root.service, operation(trace.root.last.span)];
  document.title = `${names.map((name) => `\u2068${name}\u2069`).join(": ")} · podspan`;
  new TracePage(trace, url, signal).show(view);
}

class TracePage {
  constructor(trace, url, signal) {
    this._trace = trace;
    this._url = url;
    this._signal = signal;
    this._path = criticalPath(trace);
    this._onPathUs = timeOnPath(this._path);
    this._pathMarks = marksOf(this._path);
    this._showsPath = true;
    this._hits = [];
    this._query = url.searchParams.get("q") ?? "";
    this._timers = new Map();

    this._waterfall = new Waterfall(trace, this._pathMarks, {
      onSelect: (row) => this._selected(row),
      onOpen: (row, options) => this._openDetail(row, options),
      onScroll: () => this._scrolled(),
    });
    this._minimap = minimap(trace, this._waterfall, signal);
    this._waterfall.overview.append(this._minimap.element);
    this._detail = h("aside", {
      class: "detail panel",
      "aria-label": "Details of the call",
      hidden: true,
    });
    this._main = h(
      "div",
      { class: "trace-main" },
      h("div", { class: "trace-rows panel" }, this._waterfall.element),
      this._detail,
    );
    this._element = h("div", { class: "trace-page" }, this._head(), this._tools(), this._main);
    signal.addEventListener("abort", () => this._close());
  }

  show(view) {
    replace(view, this._element);
    document.addEventListener("keydown", (event) => this._key(event), { signal: this._signal });
    this._find(this._query, { go: false });
    const wanted = this._url.searchParams.get("span");
    const row = wanted ? rowOfSpan(this._trace, wanted.toLowerCase()) : null;
    this._waterfall.select(row ?? this._trace.root);
    if (row) this._openDetail(row, { focus: false });
    if (wanted && !row) this._note(`Span ${wanted} is not in this trace.`);
    this._waterfall.element.focus({ preventScroll: true });
    this._minimap.draw();
  }

  _close() {
    this._waterfall.close();
    for (const timer of this._timers.values()) clearTimeout(timer);
  }

  // --- head ---

  _head() {
    const trace = this._trace;
    const { root } = trace;
    const facts = [
      ["Duration", trace.durationUs ? duration(trace.durationUs) : "not known"],
      ["Started", trace.startUs ? time(trace.startUs) : "not known"],
      ["Calls", count(trace.rows.length)],
      ["Spans", count(trace.spanCount)],
      ["Services", count(trace.services.length)],
      ["Depth", count(trace.depth)],
    ];
    const status = outcome(root);
    return h(
      "header",
      { class: "trace-head" },
      h(
        "div",
        { class: "trace-title" },
        h(
          "h1",
          null,
          serviceLabel(root.service),
          h("bdi", null, operation(root.last.span)),
          status &&
            h("span", { class: `badge ${root.failed ? "error" : statusClass(status)}` }, status),
        ),
        h("code", { class: "muted trace-id" }, trace.id),
        h(
          "a",
          {
            class: "push",
            href: `/api/v2/trace/${trace.id}`,
            download: `trace-${trace.id}.json`,
            target: "_blank",
          },
          "Download JSON",
        ),
      ),
      h(
        "dl",
        { class: "facts" },
        facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
        h(
          "div",
          null,
          h("dt", null, "Errors"),
          h(
            "dd",
            null,
            trace.errorCount
              ? h(
                  "button",
                  {
                    type: "button",
                    class: "link error-link",
                    onclick: () => this._step(this._failed(), 1),
                  },
                  count(trace.errorCount),
                )
              : "0",
          ),
        ),
      ),
      this._services(),
      (this._notes = h(
        "ul",
        { class: "trace-notes" },
        this._remarks().map((text) => h("li", null, text)),
      )),
    );
  }

  _services() {
    const services = this._trace.services.toSorted((one, other) => other.spanCount - one.spanCount);
    const more = services.length - SERVICES_SHOWN;
    return h(
      "ul",
      { class: "head-services", "aria-label": "Services, and their spans" },
      services
        .slice(0, SERVICES_SHOWN)
        .map(({ name, spanCount, errorCount }) =>
          h(
            "li",
            null,
            serviceLabel(name, count(spanCount)),
            errorCount > 0 && h("span", { class: "badge error" }, count(errorCount, "error")),
          ),
        ),
      more > 0 && h("li", { class: "muted" }, `and ${count(more)} more`),
    );
  }

  _remarks() {
    const { orphanCount, cycleCount, untimedCount, skewUs, rows, root } = this._trace;
    const tops = rows.filter((row) => !row.parent && !row.trouble).length;
    const remarks = [];
    if (orphanCount)
      remarks.push(`${count(orphanCount, "call")} with a parent that is not in the trace.`);
    if (cycleCount)
      remarks.push(`${count(cycleCount, "cycle")} of spans that are their own ancestors.`);
    if (tops > 1)
      remarks.push(
        `${count(tops, "root")}: the critical path is that of ${root.service || "the first"}.`,
      );
    if (skewUs)
      remarks.push(
        `Clocks differ by up to ${duration(Math.abs(skewUs))}. Times are shown as they were recorded.`,
      );
    if (untimedCount) remarks.push(`${count(untimedCount, "span")} without a time.`);
    return remarks;
  }

  _note(text) {
    this._notes.append(h("li", { role: "status" }, text));
  }

  // --- tools ---

  _tools() {
    this._field = h("input", {
      type: "search",
      "data-filter": true,
      value: this._query,
      placeholder: "Search names, tags, ids",
      "aria-label": "Search in the spans",
      autocomplete: "off",
      spellcheck: "false",
      oninput: () => this._after("search", SEARCH_MS, () => this._find(this._field.value)),
      onkeydown: (event) => this._fieldKey(event),
    });
    this._found = h("span", { class: "trace-found muted", role: "status" });
    this._pathButton = this._button("Critical path", "", () => this._togglePath());
    this._pathButton.setAttribute("aria-pressed", "true");
    this._zoomOut = this._button("Whole trace", "", () =>
      this._zoom(this._trace.startUs, this._trace.endUs),
    );
    this._zoomOut.hidden = true;
    return h(
      "div",
      { class: "toolbar trace-tools", role: "toolbar", "aria-label": "Tools" },
      h("div", { class: "trace-search", role: "search" }, this._field, this._found),
      (this._previous = this._button("↑", "Previous hit", () => this._step(this._hits, -1))),
      (this._next = this._button("↓", "Next hit", () => this._step(this._hits, 1))),
      h("span", { class: "push" }),
      this._zoomOut,
      this._pathButton,
      this._button("Collapse all", "", () => this._collapse(true)),
      this._button("Expand all", "", () => this._collapse(false)),
    );
  }

  _button(text, label, onclick) {
    return h(
      "button",
      { type: "button", "aria-label": label || null, title: label || null, onclick },
      text,
    );
  }

  _fieldKey(event) {
    if (event.key === "Enter") {
      event.preventDefault();
      // What was typed just now is not found yet: then its first hit is the one to go to.
      if (this._field.value.trim() !== this._query) this._find(this._field.value);
      else this._step(this._hits, event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      event.preventDefault();
      if (this._field.value) {
        this._field.value = "";
        this._find("");
      } else {
        this._waterfall.element.focus();
      }
    }
  }

  _find(query, { go = true } = {}) {
    this._query = query.trim();
    this._hits = search(this._trace, this._query);
    this._waterfall.setHits(this._hits);
    const first =
      this._hits.find((row) => row.index >= (this._waterfall.selected?.index ?? 0)) ??
      this._hits[0];
    if (go && first) this._go(first);
    this._tellHits();
    this._noteAddress();
  }

  _tellHits() {
    const at = this._hits.indexOf(this._waterfall.selected) + 1;
    const total = this._hits.length;
    if (!this._query) this._found.textContent = "";
    else if (!total) this._found.textContent = "no hits";
    else this._found.textContent = at ? `${count(at)} of ${count(total)}` : count(total, "hit");
    this._previous.disabled = this._next.disabled = !total;
  }

  _failed() {
    return this._trace.rows.filter((row) => row.failed);
  }

  /** Go to the next of some rows, or the one before; round at the end. */
  _step(rows, by) {
    if (!rows.length) return;
    const index = this._waterfall.selected?.index ?? -1;
    const next =
      by > 0 ? rows.find((row) => row.index > index) : rows.findLast((row) => row.index < index);
    this._go(next ?? rows.at(by > 0 ? 0 : -1));
  }

  _togglePath() {
    this._showsPath = !this._showsPath;
    this._pathButton.setAttribute("aria-pressed", String(this._showsPath));
    this._waterfall.setPath(this._showsPath ? this._pathMarks : new Map());
  }

  _collapse(all) {
    if (all) this._waterfall.collapseAll();
    else this._waterfall.expandAll();
    this._minimap.draw();
  }

  _zoom(fromUs, toUs) {
    this._waterfall.setRange(fromUs, toUs);
  }

  _scrolled() {
    const { fromUs, toUs } = this._waterfall.range;
    this._zoomOut.hidden = fromUs <= this._trace.startUs && toUs >= this._trace.endUs;
    this._minimap.update();
  }

  // --- selection and details ---

  _go(row) {
    this._waterfall.select(row);
    this._selected(row);
  }

  _selected(row) {
    this._tellHits();
    this._noteAddress();
    if (!this._detail.hidden) this._after("detail", 0, () => this._fillDetail(row));
  }

  _openDetail(row, { focus }) {
    this._fillDetail(row);
    this._detail.hidden = false;
    this._main.classList.add("with-detail");
    this._noteAddress();
    if (focus) this._detail.querySelector(".detail-title").focus();
  }

  _fillDetail(row) {
    replace(
      this._detail,
      spanDetail(this._trace, row, {
        onPathUs: this._onPathUs.get(row) ?? 0,
        onSelect: (other) => {
          this._go(other);
          this._openDetail(other, { focus: true });
        },
        onClose: () => this._closeDetail(),
      }),
    );
    this._detail.scrollTop = 0;
  }

  _closeDetail() {
    this._detail.hidden = true;
    this._main.classList.remove("with-detail");
    this._noteAddress();
    this._waterfall.element.focus({ preventScroll: true });
  }

  // --- keys and the address ---

  _key(event) {
    if (event.defaultPrevented || isTyping(event)) return;
    const row = this._waterfall.selected;
    const actions = {
      n: () => this._step(this._hits, 1),
      N: () => this._step(this._hits, -1),
      e: () => this._step(this._failed(), 1),
      E: () => this._step(this._failed(), -1),
      c: () => this._togglePath(),
      z: () => row && this._zoom(row.startUs, row.endUs),
      0: () => this._zoom(this._trace.startUs, this._trace.endUs),
      Escape: () => !this._detail.hidden && this._closeDetail(),
    };
    if (!Object.hasOwn(actions, event.key)) return;
    event.preventDefault();
    actions[event.key]();
  }

  _noteAddress() {
    this._after("address", ADDRESS_MS, () => {
      const params = new URLSearchParams();
      const row = this._waterfall.selected;
      if (row && (!this._detail.hidden || row !== this._trace.root))
        params.set("span", row.first.span.id);
      if (this._query) params.set("q", this._query);
      const text = params.toString();
      router.note(this._url.pathname + (text ? `?${text}` : ""));
    });
  }

  /** Do something a little later; of what was to be done then, only the last. */
  _after(what, ms, act) {
    clearTimeout(this._timers.get(what));
    const done = () => {
      this._timers.delete(what);
      act();
    };
    this._timers.set(what, setTimeout(done, ms));
  }
}

/** Return where the path runs in each row, by the clocks that its bars are drawn with. */
function marksOf(path) {
  const marks = new Map();
  for (const { node, startUs, endUs, shiftUs } of path) {
    if (!marks.has(node.row)) marks.set(node.row, []);
    marks.get(node.row).push([startUs - shiftUs, endUs - shiftUs]);
  }
  return marks;
}
