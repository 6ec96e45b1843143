// Latency over time: a point for each trace, errors as diamonds of their own colour.

import { h, replace, serviceLabel, svg } from "./dom.js";
import { count, duration, time } from "./format.js";
import { linear, linearTicks, logTicks, logarithmic, timeTicks } from "./scales.js";

const HEIGHT = 168;
const MARGIN = { top: 10, right: 14, bottom: 22, left: 58 };
const REACH = 14; // pixels from a point at which it is meant
const BRUSH = 5; // pixels that make a drag of a click
/**
 * Return {element, draw(traces, scale), highlight(traceId)}.
 *
 * onOpen(trace): clicked, or Enter. onBrush({endTs, lookback, minDuration, maxDuration}):
 * a rectangle was drawn; of a line only what it narrows. onPoint(trace or null): pointed at.
 */
export function scatter({ signal, onOpen, onBrush, onPoint }) {
  let points = [];
  let scales = null;
  let traces = [];
  let kind = "log";
  let pointed = null;
  let drag = null;

  const canvas = svg("svg", { class: "plot", height: HEIGHT, "aria-hidden": "true" });
  const tip = h("div", { class: "tip", hidden: true });
  const said = h("p", { class: "hidden", role: "status" });
  const element = h(
    "div",
    {
      class: "scatter",
      tabindex: 0,
      role: "group",
      "aria-roledescription": "scatter plot",
      "aria-label":
        "Latency of traces over time. Left and right go from trace to trace, Enter opens one.",
    },
    canvas,
    tip,
    said,
  );
  const halo = svg("circle", { class: "halo", r: 9, hidden: true });
  const brush = svg("rect", { class: "brush", hidden: true });

  const resized = new ResizeObserver(() => render());
  resized.observe(element);
  signal.addEventListener("abort", () => resized.disconnect());

  function draw(wanted, scale) {
    traces = wanted.filter((trace) => trace.timestamp && trace.duration);
    kind = scale;
    render();
  }

  function render() {
    const width = element.clientWidth;
    point(null);
    if (width === 0 || traces.length === 0) {
      points = [];
      canvas.replaceChildren();
      return;
    }
    canvas.setAttribute("width", width);
    scales = scalesOf(traces, kind, width);
    points = traces
      .map((trace) => ({
        trace,
        x: scales.x.at(trace.timestamp),
        y: scales.y.at(trace.duration),
        r: radius(trace),
      }))
      .sort((one, other) => one.x - other.x);
    // Errors last: they lie above the others.
    const drawn = points.toSorted((one, other) => failed(one.trace) - failed(other.trace));
    replace(canvas, axes(scales, width), drawn.map(shape), halo, brush);
  }

  function point(target) {
    if (target?.trace !== pointed?.trace) onPoint(target?.trace ?? null);
    pointed = target;
    element.classList.toggle("pointing", target !== null);
    tip.hidden = target === null;
    place(target);
    if (!target) return;
    const { trace, x, y } = target;
    replace(
      tip,
      serviceLabel(trace.root?.serviceName ?? ""),
      h("bdi", { class: "tip-name" }, trace.root?.name ?? ""),
      h(
        "div",
        null,
        h("b", null, duration(trace.duration)),
        ` · ${count(trace.spanCount, "span")}`,
        trace.errorCount > 0 &&
          h("span", { class: "error-text" }, ` · ${count(trace.errorCount, "error")}`),
      ),
      h("div", { class: "muted" }, time(trace.timestamp)),
    );
    const right = x > element.clientWidth / 2;
    tip.style.setProperty("left", `${right ? x - tip.offsetWidth - 14 : x + 14}px`);
    tip.style.setProperty("top", `${Math.min(Math.max(y - 20, 0), HEIGHT - tip.offsetHeight)}px`);
  }

  function place(target) {
    halo.toggleAttribute("hidden", !target);
    if (!target) return;
    halo.setAttribute("cx", target.x);
    halo.setAttribute("cy", target.y);
  }

  function highlight(traceId) {
    if (pointed) return;
    place(points.find(({ trace }) => trace.traceId === traceId) ?? null);
  }

  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !scales) return;
    drag = { from: position(event), to: null };
    element.setPointerCapture(event.pointerId);
  });
  element.addEventListener("pointermove", (event) => {
    const at = position(event);
    if (!drag) {
      point(nearest(points, at));
      return;
    }
    if (!drag.to && Math.hypot(at.x - drag.from.x, at.y - drag.from.y) < BRUSH) return;
    drag.to = at;
    point(null);
    showBrush(brush, rectangle(drag, scales));
  });
  element.addEventListener("pointerup", (event) => {
    const done = drag;
    endDrag();
    if (done?.to) onBrush(areaOf(rectangle(done, scales), scales));
    else if (done) {
      const target = nearest(points, position(event));
      if (target) onOpen(target.trace);
    }
  });
  element.addEventListener("pointercancel", endDrag);
  element.addEventListener("pointerleave", () => !drag && point(null));
  element.addEventListener("blur", () => point(null));
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      endDrag();
      point(null);
    }
    if (event.key === "Enter" && pointed) onOpen(pointed.trace);
    const next = neighbour(points, pointed, event.key);
    if (!next) return;
    event.preventDefault();
    point(next);
    const { trace } = next;
    said.textContent = `${trace.root?.serviceName ?? ""} ${trace.root?.name ?? ""}, ${duration(trace.duration)}, ${count(trace.errorCount, "error")}, ${time(trace.timestamp)}`;
  });

  function endDrag() {
    drag = null;
    showBrush(brush, null);
  }

  function position(event) {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  return { element, draw, highlight };
}

/** Return the point that a key leads to from the one that is pointed at, if any. */
function neighbour(points, pointed, key) {
  const at = points.findIndex(({ trace }) => trace === pointed?.trace);
  const last = points.length - 1;
  const index = {
    ArrowRight: at + 1,
    ArrowLeft: at < 0 ? last : at - 1,
    Home: 0,
    End: last,
  }[key];
  return index === undefined ? null : (points[Math.min(Math.max(index, 0), last)] ?? null);
}

function nearest(points, at) {
  let best = null;
  let distance = REACH;
  for (const point of points) {
    const away = Math.hypot(point.x - at.x, point.y - at.y) - point.r;
    if (away < distance) [best, distance] = [point, away];
  }
  return best;
}

/** Return {x, y, width, height} of a drag, inside of the axes. */
function rectangle({ from, to }, { x, y }) {
  const clamp = (value, [low, high]) => Math.min(Math.max(value, low), high);
  const [left, right] = [from.x, to.x].map((value) => clamp(value, x.range)).sort((a, b) => a - b);
  const [top, bottom] = [from.y, to.y].map((value) => clamp(value, y.range)).sort((a, b) => a - b);
  return { x: left, y: top, width: right - left, height: bottom - top };
}

function showBrush(brush, area) {
  brush.toggleAttribute("hidden", !area);
  for (const [name, value] of Object.entries(area ?? {})) brush.setAttribute(name, value);
}

/** Return a rectangle as the filters that keep what is inside; a line narrows one way. */
function areaOf(area, { x, y }) {
  const narrowed = {};
  if (area.width >= BRUSH) {
    const fromMs = Math.floor(x.value(area.x) / 1e3);
    narrowed.endTs = Math.ceil(x.value(area.x + area.width) / 1e3);
    narrowed.lookback = Math.max(narrowed.endTs - fromMs, 1);
  }
  if (area.height >= BRUSH) {
    narrowed.minDuration = neat(Math.max(y.value(area.y + area.height), 1), Math.floor);
    narrowed.maxDuration = neat(y.value(area.y), Math.ceil);
  }
  return narrowed;
}

/** Round to three digits, to the outside: what a person could have written. */
function neat(us, round) {
  const unit = 10 ** Math.max(Math.floor(Math.log10(us)) - 2, 0);
  return round(us / unit) * unit;
}

/** Return both scales: at(value) -> pixels, value(pixels), range of pixels, ticks. */
function scalesOf(traces, kind, width) {
  const times = traces.map((trace) => trace.timestamp);
  const durations = traces.map((trace) => trace.duration);
  const inner = [MARGIN.left, width - MARGIN.right];
  const down = [MARGIN.top, HEIGHT - MARGIN.bottom];
  const first = Math.min(...times);
  const last = Math.max(...times);
  const spread = Math.max(last - first, 1000); // at least a millisecond
  const x = linear(first - spread * 0.03, last + spread * 0.03, inner);
  const slowest = Math.max(...durations);
  const y =
    kind === "log"
      ? logarithmic(Math.min(...durations) / 1.3, slowest * 1.3, down.toReversed())
      : linear(0, slowest * 1.08, down.toReversed());
  return {
    x: {
      ...x,
      range: inner,
      ticks: timeTicks(x.low, x.high, Math.max(2, Math.floor(width / 120))),
    },
    y: { ...y, range: down, ticks: kind === "log" ? logTicks(y.low, y.high) : linearTicks(y.high) },
  };
}

function axes({ x, y }, width) {
  return svg(
    "g",
    { class: "axes" },
    y.ticks.map((tick) => [
      svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y.at(tick), y2: y.at(tick) }),
      svg(
        "text",
        { x: MARGIN.left - 8, y: y.at(tick) + 4, "text-anchor": "end" },
        tick === 0 ? "0" : duration(tick),
      ),
    ]),
    x.ticks.map(({ at, text }) => [
      svg("line", { x1: x.at(at), x2: x.at(at), y1: y.range[1], y2: y.range[1] + 4 }),
      svg("text", { x: x.at(at), y: HEIGHT - 5, "text-anchor": "middle" }, text),
    ]),
  );
}

function shape({ trace, x, y, r }) {
  if (!failed(trace)) return svg("circle", { class: "dot", cx: x, cy: y, r });
  const d = r * 1.35;
  return svg("path", {
    class: "dot failed",
    d: `M${x} ${y - d}L${x + d} ${y}L${x} ${y + d}L${x - d} ${y}Z`,
  });
}

/** More spans, a larger point: 3 to 7 pixels. */
function radius(trace) {
  return Math.min(3 + Math.log10(Math.max(trace.spanCount, 1)), 7);
}

function failed(trace) {
  return trace.errorCount > 0 ? 1 : 0;
}
