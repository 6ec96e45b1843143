// The whole trace in little: drag over it to look at a part of its time.

import { h } from "./dom.js";
import { serviceHue } from "./format.js";

const HEIGHT_PX = 44;
const CLICK_PX = 4; // a drag shorter than this is a click
const MIN_BAR_PX = 1;

/** Return {element, update()}; it follows and moves what `waterfall` shows. */
export function minimap(trace, waterfall, signal) {
  const canvas = h("canvas", { class: "mini-canvas", "aria-hidden": "true" });
  const rangeMark = h("div", { class: "mini-range" });
  const sightMark = h("div", { class: "mini-sight" });
  const dragMark = h("div", { class: "mini-drag", hidden: true });
  // Takes the colours of services from the style sheet, for the canvas.
  const colour = h("i", { class: "hue mini-colour" });
  const element = h(
    "div",
    {
      class: "minimap",
      "aria-hidden": "true",
      title: "Drag to zoom into a part of the time, double-click for all of it",
    },
    colour,
    canvas,
    rangeMark,
    sightMark,
    dragMark,
  );
  let dragFrom = null;

  new ResizeObserver((_, observer) => (signal.aborted ? observer.disconnect() : draw())).observe(
    element,
  );
  const themed = new MutationObserver(draw);
  themed.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  signal.addEventListener("abort", () => themed.disconnect());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw, { signal });

  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    element.setPointerCapture(event.pointerId);
    dragFrom = shareAt(event);
  });
  element.addEventListener("pointermove", (event) => {
    if (dragFrom === null) return;
    const to = shareAt(event);
    dragMark.hidden = false;
    dragMark.style.setProperty("--from", Math.min(dragFrom, to));
    dragMark.style.setProperty("--to", Math.max(dragFrom, to));
  });
  element.addEventListener("pointerup", (event) => {
    if (dragFrom === null) return;
    const [from, to] = [dragFrom, shareAt(event)];
    stop();
    if (Math.abs(to - from) * element.clientWidth >= CLICK_PX) {
      waterfall.setRange(timeAt(from), timeAt(to));
    } else {
      waterfall.scrollTo((event.clientY - element.getBoundingClientRect().top) / HEIGHT_PX);
    }
  });
  element.addEventListener("pointercancel", stop);
  element.addEventListener("dblclick", () => waterfall.setRange(trace.startUs, trace.endUs));
  return { element, update, draw };

  function stop() {
    dragFrom = null;
    dragMark.hidden = true;
  }

  function shareAt(event) {
    const box = element.getBoundingClientRect();
    return Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
  }

  function timeAt(share) {
    return trace.startUs + share * trace.durationUs;
  }

  function update() {
    const { fromUs, toUs } = waterfall.range;
    const total = trace.durationUs || 1;
    rangeMark.style.setProperty("--from", (fromUs - trace.startUs) / total);
    rangeMark.style.setProperty("--to", (toUs - trace.startUs) / total);
    const { from, to } = waterfall.inSight;
    sightMark.style.setProperty("--from", from);
    sightMark.style.setProperty("--to", to);
    sightMark.hidden = from <= 0 && to >= 1;
  }

  function draw() {
    if (signal.aborted) return;
    const width = element.clientWidth;
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = HEIGHT_PX * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const rows = waterfall.visible;
    const thick = Math.min(4, Math.max(1, HEIGHT_PX / rows.length - 1));
    const step = Math.min(6, (HEIGHT_PX - thick) / Math.max(1, rows.length - 1));
    const total = trace.durationUs || 1;
    const colours = new Map();
    rows.forEach((row, index) => {
      if (!colours.has(row.service)) colours.set(row.service, colourOf(row.service));
      context.fillStyle = colours.get(row.service);
      const left = ((row.startUs - trace.startUs) / total) * width;
      const size = ((row.endUs - row.startUs) / total) * width;
      context.fillRect(left, index * step, Math.max(MIN_BAR_PX, size), thick);
    });
    update();
  }

  function colourOf(service) {
    colour.style.setProperty("--hue", serviceHue(service));
    return getComputedStyle(colour).color;
  }
}
