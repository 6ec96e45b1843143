// The rows of a trace with their bars. Only those in sight are elements, so that a trace
// of 10,000 spans scrolls as one of ten.
//
// It has the focus as a whole; which row is the active one is told by
// aria-activedescendant, as rows come and go.

import { h, svg } from "./dom.js";
import { duration, serviceHue, statusClass } from "./format.js";
import { connectLeadUs } from "./hop_times.js";
import { operation, outcome, visibleRows } from "./trace_model.js";

const ROW_PX = 28; // as --row in trace.css
const AROUND = 8; // rows kept above and below those in sight
const HEAD_PX = 83; // minimap and ruler, which stay on top
const MAX_INDENT = 24; // levels; deeper rows stand no further right, and say their depth
const INDENT_PX = 14; // of a level, where there is room for it
const INDENT_SHARE = 0.5; // of the names' width, at most, for all levels together
const TICK_PX = 90; // ticks are at least so far apart

// Marks on a row finer than this share of the width are drawn as one.
const MARK_STEPS = 2000;

const TROUBLES = {
  orphan: ["parent missing", "Its parent is not among the spans of this trace"],
  cycle: ["cycle", "It is its own ancestor; the earliest of the cycle stands on top"],
};

export class Waterfall {
  /**
   * `pathMarks`: row -> [[startUs, endUs], ...] on the critical path. Calls `onSelect(row)`
   * after a click or a key, `onOpen(row, {focus})` to see details, and `onScroll()` when
   * other rows or another range of time are in sight.
   */
  constructor(trace, pathMarks, { onSelect, onOpen, onScroll }) {
    this.trace = trace;
    this.selected = null;
    this.collapsed = new Set();
    this.range = { fromUs: trace.startUs, toUs: trace.endUs };
    this._pathMarks = pathMarks;
    this._hits = new Set();
    this._onSelect = onSelect;
    this._onOpen = onOpen;
    this._onScroll = onScroll;
    this._visible = trace.rows;
    this._place = new Map(); // row -> index among the visible ones
    this._elements = new Map(); // row -> element in the document
    this._frame = 0;

    this.overview = h("div", { class: "wf-overview" });
    this._title = h("div", { class: "wf-title" }, "Service and operation");
    this._ticks = h("div", null);
    this._cursorTime = h("span", { class: "wf-cursor-time", hidden: true });
    this._ruler = h(
      "div",
      { class: "wf-ruler", "aria-hidden": "true" },
      this._ticks,
      this._cursorTime,
    );
    this._grid = h("div", { class: "wf-grid", "aria-hidden": "true" });
    this._cursor = h("div", { class: "wf-cursor", "aria-hidden": "true", hidden: true });
    this._rows = h("div", { class: "wf-rows", role: "none" });
    this.element = h(
      "div",
      {
        class: "waterfall",
        role: "tree",
        tabindex: "0",
        "aria-label": "Calls of the trace",
        onkeydown: (event) => this._key(event),
        onclick: (event) => this._click(event),
        ondblclick: (event) => this._doubleClick(event),
        onmousemove: (event) => this._hover(event),
        onmouseleave: () => this._hideCursor(true),
      },
      h("div", { class: "wf-head", role: "none" }, this.overview, this._title, this._ruler),
      h("div", { class: "wf-body", role: "none" }, this._grid, this._cursor, this._rows),
    );
    this.element.addEventListener("scroll", () => this._soon(), { passive: true });
    this._resized = new ResizeObserver(() => {
      this._setIndent();
      this._drawScale();
      this._soon();
    });
    this._resized.observe(this.element);
    this._layOut();
  }

  /** Stop what runs by itself. */
  close() {
    this._resized.disconnect();
    cancelAnimationFrame(this._frame);
  }

  /** Make a row the active one, its ancestors expanded; `reveal`: scroll to it. */
  select(row, { reveal = true } = {}) {
    this.selected = row;
    let opened = false;
    for (let above = row?.parent; above; above = above.parent) {
      opened = this.collapsed.delete(above) || opened;
    }
    if (opened) this._layOut();
    if (row && reveal) this._reveal(row);
    this._redraw();
  }

  setHits(rows) {
    this._hits = new Set(rows);
    this._redraw();
  }

  setPath(pathMarks) {
    this._pathMarks = pathMarks;
    this._redraw();
  }

  /** Show the time from `fromUs` to `toUs`, as far as it is the trace's. */
  setRange(fromUs, toUs) {
    const { startUs, endUs } = this.trace;
    const from = Math.max(startUs, Math.min(fromUs, toUs));
    const to = Math.min(endUs, Math.max(fromUs, toUs));
    if (to <= from) return;
    this.range = { fromUs: from, toUs: to };
    this._redraw();
    this._onScroll();
  }

  collapseAll() {
    this.collapsed = new Set(this.trace.rows.filter((row) => row.children.length));
    // What was selected is not to be seen any more: the top of its tree stands for it.
    let top = this.selected;
    while (top?.parent) top = top.parent;
    this._layOut();
    if (top !== this.selected) this._choose(top);
    this._redraw();
  }

  expandAll() {
    this.collapsed.clear();
    this._layOut();
    this._redraw();
  }

  toggle(row) {
    if (!row.children.length) return;
    if (!this.collapsed.delete(row)) this.collapsed.add(row);
    this._layOut();
    this._redraw();
  }

  /** Return which part of the visible rows is in sight, as shares from 0 to 1. */
  get inSight() {
    const total = this._visible.length * ROW_PX;
    const height = this.element.clientHeight - HEAD_PX;
    const top = this.element.scrollTop;
    return { from: top / total, to: Math.min(1, (top + height) / total) };
  }

  get visible() {
    return this._visible;
  }

  /** Scroll so that this share of the visible rows is in the middle. */
  scrollTo(share) {
    const total = this._visible.length * ROW_PX;
    this.element.scrollTop = share * total - (this.element.clientHeight - HEAD_PX) / 2;
  }

  _layOut() {
    this._visible = visibleRows(this.trace.rows, this.collapsed);
    this._place = new Map(this._visible.map((row, index) => [row, index]));
    this._rows.style.setProperty("height", `${this._visible.length * ROW_PX}px`);
  }

  _setIndent() {
    const levels = Math.min(this.trace.depth, MAX_INDENT);
    const room = (this._title.clientWidth * INDENT_SHARE) / levels;
    this.element.style.setProperty("--indent", `${Math.min(INDENT_PX, Math.floor(room))}px`);
  }

  _soon() {
    this._frame ||= requestAnimationFrame(() => {
      this._frame = 0;
      this._draw();
      this._onScroll();
    });
  }

  /** Draw all anew: something about the rows has changed. */
  _redraw() {
    this._elements.clear();
    this._rows.replaceChildren();
    this._drawScale();
    this._draw();
  }

  /** Bring the rows in sight into the document, and take out the others. */
  _draw() {
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW_PX) - AROUND);
    const inSight = Math.ceil(this.element.clientHeight / ROW_PX) + 2 * AROUND;
    const last = Math.min(this._visible.length, first + inSight);
    for (const [row, element] of this._elements) {
      const place = this._place.get(row);
      if (place === undefined || place < first || place >= last) {
        element.remove();
        this._elements.delete(row);
      }
    }
    const made = [];
    for (let place = first; place < last; place += 1) {
      const row = this._visible[place];
      if (this._elements.has(row)) continue;
      const element = this._rowElement(row, place);
      this._elements.set(row, element);
      made.push(element);
    }
    this._rows.append(...made);
    const active = this._elements.get(this.selected);
    if (active) this.element.setAttribute("aria-activedescendant", active.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  _drawScale() {
    const { fromUs, toUs } = this.range;
    const most = Math.max(2, this._ruler.clientWidth / TICK_PX);
    const ticks = ticksBetween(fromUs - this.trace.startUs, toUs - this.trace.startUs, most);
    this._ticks.replaceChildren(
      ...ticks.map((us) =>
        h(
          "span",
          { class: "wf-tick", style: { "--at": this._share(us + this.trace.startUs) } },
          us ? duration(us) : "0",
        ),
      ),
    );
    this._grid.replaceChildren(
      ...ticks.map((us) => h("i", { style: { "--at": this._share(us + this.trace.startUs) } })),
    );
  }

  /** Where a moment stands in the time that is shown: 0 to 1. */
  _share(us) {
    return (us - this.range.fromUs) / (this.range.toUs - this.range.fromUs || 1);
  }

  _rowElement(row, place) {
    const siblings = row.parent?.children;
    const open = row.children.length ? !this.collapsed.has(row) : null;
    const classes = ["wf-row", "hue"];
    if (row === this.selected) classes.push("selected");
    if (row.failed) classes.push("failed");
    if (this._hits.has(row)) classes.push("hit");
    return h(
      "div",
      {
        class: classes.join(" "),
        role: "treeitem",
        id: `row-${row.index}`,
        "data-row": row.index,
        "aria-level": row.depth + 1,
        "aria-posinset": siblings ? siblings.indexOf(row) + 1 : null,
        "aria-setsize": siblings ? siblings.length : null,
        "aria-expanded": open === null ? null : String(open),
        "aria-selected": String(row === this.selected),
        style: {
          "--y": `${place * ROW_PX}px`,
          "--depth": Math.min(row.depth, MAX_INDENT),
          "--hue": serviceHue(row.service),
        },
      },
      this._name(row, open),
      this._time(row),
    );
  }

  _name(row, open) {
    const hidden = row.endIndex - row.index - 1;
    const status = outcome(row);
    const [trouble, why] = TROUBLES[row.trouble] ?? [];
    return h(
      "div",
      { class: "wf-name" },
      row.depth > MAX_INDENT && h("span", { class: "wf-deep" }, row.depth),
      h("span", { class: "wf-toggle", "data-toggle": open !== null, "aria-hidden": "true" }),
      h("span", { class: "wf-mark", "aria-hidden": "true" }),
      callerShown(row) && h("bdi", { class: "wf-caller" }, row.caller || "?", " →"),
      h("bdi", { class: "wf-service" }, row.service || "unknown"),
      h(
        "bdi",
        { class: "wf-operation", title: operation(row.last.span) },
        operation(row.last.span),
      ),
      open === false &&
        h("span", { class: "badge", title: `${hidden} below, collapsed` }, `+${hidden}`),
      status && h("span", { class: `badge ${row.failed ? "error" : statusClass(status)}` }, status),
      row.failed && !status && h("span", { class: "badge error" }, "error"),
      trouble && h("span", { class: "badge warn", title: why }, trouble),
      row.skewUs !== 0 &&
        h(
          "span",
          {
            class: "badge warn",
            title: `The server's clock is about ${duration(Math.abs(row.skewUs))} ${row.skewUs > 0 ? "ahead" : "behind"}`,
          },
          "clock",
        ),
    );
  }

  _time(row) {
    const { client, server } = row;
    const leadUs = connectLeadUs(row);
    const alone = client && server ? null : row.first;
    return h(
      "div",
      { class: "wf-time" },
      leadUs > 0 &&
        this._bar(
          "connect",
          row.first.startUs - leadUs,
          row.first.startUs,
          `connect ${duration(leadUs)}`,
        ),
      client && server && this._bar("outer", client.startUs, client.endUs),
      client && server && this._bar("inner", server.startUs, server.endUs),
      alone && this._bar(client ? "outer lone" : "inner", alone.startUs, alone.endUs),
      this._marks(row),
      this._label(row),
    );
  }

  _bar(kind, startUs, endUs, title) {
    const from = Math.max(0, this._share(startUs));
    const to = Math.min(1, this._share(endUs));
    if (to < 0 || from > 1) return null;
    return h("span", {
      class: `wf-bar ${kind}`,
      title,
      style: { "--from": from, "--to": Math.max(from, to) },
    });
  }

  /** The critical path's part in a row, and its annotations: one element, however many. */
  _marks(row) {
    const path = this._pathMarks.get(row) ?? [];
    const annotations = row.nodes.flatMap((node) => node.span.annotations ?? []);
    if (!path.length && !annotations.length) return null;
    const spans = distinct(
      path.map(([startUs, endUs]) => [this._step(startUs), this._step(endUs)]),
    );
    const moments = distinct(annotations.map(({ timestamp }) => [this._step(timestamp), 0]));
    return svg(
      "svg",
      {
        class: "wf-marks",
        viewBox: `0 0 ${MARK_STEPS} ${ROW_PX}`,
        preserveAspectRatio: "none",
        "aria-hidden": "true",
      },
      svg("path", {
        class: "wf-path",
        d: spans.map(([from, to]) => `M${from} 22H${Math.max(to, from + 2)}v3H${from}z`).join(""),
      }),
      svg("path", { class: "wf-moments", d: moments.map(([at]) => `M${at} 5v16`).join("") }),
    );
  }

  _step(us) {
    return Math.round(Math.max(-0.01, Math.min(1.01, this._share(us))) * MARK_STEPS);
  }

  _label(row) {
    const from = this._share(row.startUs);
    const to = this._share(row.endUs);
    if (to < 0 || from > 1) {
      const left = to < 0;
      return h(
        "span",
        { class: "wf-label", style: { "--at": left ? 0 : 1 } },
        left ? "◂ earlier" : "▸ later",
      );
    }
    const text = row.first.durationUs
      ? duration(row.durationUs)
      : row.first.timed
        ? "no duration"
        : "no time";
    return h("span", { class: "wf-label", style: { "--at": Math.min(1, to) } }, text);
  }

  _reveal(row) {
    const top = this._place.get(row) * ROW_PX;
    const { scrollTop, clientHeight } = this.element;
    const height = clientHeight - HEAD_PX;
    if (top >= scrollTop && top + ROW_PX <= scrollTop + height) return;
    const near = Math.abs(top - scrollTop) < 2 * height;
    if (!near) this.element.scrollTop = top - height / 2;
    else this.element.scrollTop = top < scrollTop ? top : top + ROW_PX - height;
  }

  _choose(row) {
    if (!row) return;
    this.select(row);
    this._onSelect(row);
  }

  _rowAt(target) {
    const element = target.closest?.("[data-row]");
    return element ? this.trace.rows[Number(element.dataset.row)] : null;
  }

  _click(event) {
    const row = this._rowAt(event.target);
    if (!row) return;
    if (event.target.closest(".wf-toggle[data-toggle]")) {
      this.toggle(row);
      return;
    }
    this._choose(row);
    this._onOpen(row, { focus: false });
  }

  _doubleClick(event) {
    const row = this._rowAt(event.target);
    if (row && !event.target.closest(".wf-toggle")) this.toggle(row);
  }

  _hover(event) {
    const box = this._ruler.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const outside = !(share >= 0 && share <= 1);
    this._hideCursor(outside);
    if (outside) return;
    const { fromUs, toUs } = this.range;
    this._cursor.style.setProperty("--at", share);
    this._cursorTime.style.setProperty("--at", share);
    this._cursorTime.textContent = duration(fromUs + share * (toUs - fromUs) - this.trace.startUs);
  }

  _hideCursor(hidden) {
    this._cursor.hidden = hidden;
    this._cursorTime.hidden = hidden;
  }

  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const row = this.selected ?? this._visible[0];
    const place = this._place.get(row) ?? 0;
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW_PX) - 2);
    const moves = {
      ArrowDown: () => this._visible[this.selected ? place + 1 : 0],
      ArrowUp: () => this._visible[place - 1],
      PageDown: () => this._visible[Math.min(place + page, this._visible.length - 1)],
      PageUp: () => this._visible[Math.max(place - page, 0)],
      Home: () => this._visible[0],
      End: () => this._visible.at(-1),
    };
    if (moves[event.key]) this._choose(moves[event.key]());
    else if (event.key === "ArrowRight") this._goIn(row);
    else if (event.key === "ArrowLeft") this._goOut(row);
    else if (event.key === "Enter") this._onOpen(row, { focus: true });
    else return;
    event.preventDefault();
  }

  _goIn(row) {
    if (this.collapsed.has(row)) this.toggle(row);
    else this._choose(row.children[0]);
  }

  _goOut(row) {
    if (row.children.length && !this.collapsed.has(row)) this.toggle(row);
    else this._choose(row.parent);
  }
}

/** Whether who called says more than the row above does. */
function callerShown(row) {
  if (row.nodes.length === 1 && !row.client && !row.server) return false;
  if (row.caller === row.service) return false;
  return !row.parent || row.parent.service !== row.caller || !row.server;
}

function distinct(marks) {
  const kept = [];
  for (const mark of marks) {
    const last = kept.at(-1);
    if (!last || last[0] !== mark[0] || last[1] !== mark[1]) kept.push(mark);
  }
  return kept;
}

/** Return round moments between two, about `most` at most. */
function ticksBetween(fromUs, toUs, most) {
  const rough = Math.max(1, (toUs - fromUs) / most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const ticks = [];
  for (let us = Math.ceil(fromUs / step) * step; us <= toUs; us += step) ticks.push(us);
  return ticks;
}
