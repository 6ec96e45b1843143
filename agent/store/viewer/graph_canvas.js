// The drawing of the dependency graph, with zoom and pan; each service and edge can have
// the focus.

import { h, replace, svg } from "./dom.js";
import { duration, serviceHue } from "./format.js";
import { NODE_WIDTH, layOut } from "./graph_layout.js";
import { health, nodeStats, rateText, shareText, widths } from "./graph_stats.js";

const MAX_LABELS = 60; // edges beside whose line numbers can still be read
const LABEL_ROOM = 13; // the distance between edges that a label needs
const TOLD_SHARE = 0.01; // of errors, beside a line; what is less is told when looked at
const MAX_ZOOM = 1; // when fitting: a graph of two services is not blown up
// On a narrow screen, rather a part that can be read than all of it.
const NARROW_PX = 700;
const READABLE = 0.7;
const LEGIBLE = 0.4; // below, names are specks

const SPACE = 90; // around the drawing, for the legend and the buttons
const NAME_LETTERS = 18;
const DRAG_PX = 4;
const ARROW = 9;
const CURVE = 0.42; // of the way between services; the rest is straight, under the label

export class GraphCanvas {
  /** `onLook({edge} | {name} | null)`, `onEdge(edge)` and `onNode(name)` when pressed. */
  constructor({ onLook, onEdge, onNode, signal }) {
    this._onLook = onLook;
    this._onEdge = onEdge;
    this._onNode = onNode;
    this._size = { width: 1, height: 1 };
    this._centre = { x: 0, y: 0 };
    this._scale = 1;
    this._fitted = true;
    this._drag = null;
    this._nodes = new Map(); // name -> element
    this._edges = new Map(); // edge -> element

    this._svg = svg("svg", {
      class: "graph-svg",
      role: "group",
      "aria-label": "Graph of services and their calls",
    });
    this.element = h(
      "div",
      { class: "graph-canvas" },
      this._svg,
      h(
        "div",
        { class: "graph-zoom", role: "group", "aria-label": "Zoom" },
        h(
          "button",
          { type: "button", "aria-label": "Zoom in", onclick: () => this.zoom(1.25) },
          "+",
        ),
        h(
          "button",
          { type: "button", "aria-label": "Zoom out", onclick: () => this.zoom(0.8) },
          "−",
        ),
        h("button", { type: "button", onclick: () => this.fit() }, "Fit"),
      ),
    );
    this._svg.addEventListener("pointerdown", (event) => this._startDrag(event));
    this._svg.addEventListener("pointermove", (event) => this._moveDrag(event));
    this._svg.addEventListener("pointerup", () => this._endDrag());
    this._svg.addEventListener("pointercancel", () => this._endDrag());
    // Without a key, the wheel scrolls the page: the table is below.
    this._svg.addEventListener("wheel", (event) => this._wheel(event), { passive: false });
    const resized = new ResizeObserver(() => (this._fitted ? this.fit() : this._view()));
    resized.observe(this._svg);
    signal.addEventListener("abort", () => resized.disconnect());
  }

  /** Draw these edges; `chosen`: the service in whose neighbourhood they are. */
  draw(edges, chosen) {
    const drawing = layOut(edges);
    const thickness = widths(edges);
    const labelled = edges.length <= MAX_LABELS;
    this._size = drawing;
    this._edges = new Map(
      drawing.edges.map((line) => [
        line.edge,
        this._edgeElement(line, thickness.get(line.edge), labelled),
      ]),
    );
    this._nodes = new Map(
      drawing.nodes.map((node) => [
        node.name,
        this._nodeElement(node, edges, node.name === chosen),
      ]),
    );
    this._svg.classList.remove("looking");
    replace(this._svg, [...this._edges.values()], [...this._nodes.values()]);
    this.element.style.setProperty("--height", `${Math.ceil(drawing.height + SPACE)}px`);
    this.fit();
  }

  /** Mark an edge whose numbers stay. */
  keep(edge) {
    for (const [each, element] of this._edges) {
      element.classList.toggle("kept", each === edge);
      element.setAttribute("aria-pressed", String(each === edge));
    }
  }

  /** Bring out an edge or a service with its edges, and dim the rest; null: nothing. */
  look(item) {
    this._svg.classList.toggle("looking", item !== null);
    const near = (edge) =>
      item && (edge === item.edge || edge.parent === item.name || edge.child === item.name);
    const ends = new Set(item?.name ? [item.name] : []);
    for (const [edge, element] of this._edges) {
      element.classList.toggle("near", Boolean(near(edge)));
      if (near(edge)) ends.add(edge.parent).add(edge.child);
    }
    for (const [name, element] of this._nodes) element.classList.toggle("near", ends.has(name));
    this._onLook(item);
  }

  focusNode(name) {
    this._nodes.get(name)?.focus({ preventScroll: true });
  }

  zoom(factor) {
    this._fitted = false;
    this._scale = Math.max(0.1, Math.min(4, this._scale * factor));
    this._view();
  }

  /** Whether names can be made out at this size. */
  get legible() {
    return this._scale >= LEGIBLE;
  }

  /** Show all of it, as far as it can be read. */
  fit() {
    const { clientWidth, clientHeight } = this._svg;
    if (!clientWidth || !clientHeight) return;
    const { width, height } = this._size;
    const least = clientWidth < NARROW_PX ? READABLE : 0;
    this._scale = Math.max(least, Math.min(MAX_ZOOM, clientWidth / width, clientHeight / height));
    // Of what does not fit, the callers are in sight.
    this._centre = { x: Math.min(width, clientWidth / this._scale) / 2, y: height / 2 };
    this._fitted = true;
    this._view();
  }

  _view() {
    const width = this._svg.clientWidth / this._scale;
    const height = this._svg.clientHeight / this._scale;
    const { x, y } = this._centre;
    this._svg.setAttribute("viewBox", `${x - width / 2} ${y - height / 2} ${width} ${height}`);
  }

  _edgeElement({ edge, points, back, room }, width, labelled) {
    const { parent, child, rate, errorShare } = edge;
    const numbers = `${rateText(rate)}, ${shareText(errorShare)} errors, p50 ${duration(edge.p50Us)}, p95 ${duration(edge.p95Us)}, p99 ${duration(edge.p99Us)}`;
    const classes = ["graph-edge", health(edge), back && "back"].filter(Boolean);
    const line = pathOf(points, ARROW);
    return svg(
      "g",
      {
        class: classes.join(" "),
        ...this._pressable({ edge }, () => this._onEdge(edge)),
        "aria-label": `${parent} calls ${child}: ${numbers}`,
      },
      svg("path", { class: "edge-hit", d: line }),
      svg("path", { class: "edge-line", d: line, "stroke-width": width }),
      svg("path", { class: "edge-arrow", d: arrowAt(points, width) }),
      labelled &&
        room >= LABEL_ROOM &&
        svg(
          "text",
          { class: "edge-label", ...labelAt(points, width) },
          `${rateText(rate)} · ${duration(edge.p95Us)}`,
          errorShare >= TOLD_SHARE &&
            svg("tspan", { class: "edge-errors" }, ` · ${shareText(errorShare)}`),
        ),
    );
  }

  _nodeElement({ name, x, y, height }, edges, chosen) {
    const { incoming, outgoing } = nodeStats(edges, name);
    const total = incoming.edges ? incoming : outgoing;
    const told = `${incoming.edges ? "" : "calls "}${rateText(total.rate)}`;
    const errors = total.errorCount ? `, ${shareText(total.errorShare)} errors` : "";
    const short = name.length > NAME_LETTERS ? `${name.slice(0, NAME_LETTERS - 1)}…` : name;
    return svg(
      "g",
      {
        class: chosen ? "graph-node hue chosen" : "graph-node hue",
        ...this._pressable({ name }, () => this._onNode(name)),
        "aria-pressed": String(chosen),
        "aria-label": `${name}: ${told}${errors}`,
        transform: `translate(${x} ${y})`,
        style: { "--hue": serviceHue(name) },
      },
      svg("title", null, name),
      svg("rect", { class: "node-box", width: NODE_WIDTH, height, rx: 7 }),
      svg("rect", { class: "node-mark", x: 8, y: 10, width: 4, height: height - 20, rx: 2 }),
      // An image of its own cuts what is too long for it.
      svg(
        "svg",
        { x: 20, width: NODE_WIDTH - 26, height },
        svg("text", { class: "node-name", y: height / 2 - 3 }, short || "unknown"),
        svg(
          "text",
          { class: "node-told", y: height / 2 + 13 },
          told,
          errors && svg("tspan", { class: "edge-errors" }, errors),
        ),
      ),
    );
  }

  /** What makes a part of the drawing one that can be looked at and pressed. */
  _pressable(item, press) {
    return {
      tabindex: "0",
      role: "button",
      onmouseenter: () => !this._drag?.moved && this.look(item),
      onmouseleave: () => !this._drag?.moved && this.look(null),
      onfocus: () => this.look(item),
      onblur: () => this.look(null),
      onclick: () => !this._dragged && press(),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        press();
      },
    };
  }

  _startDrag(event) {
    if (event.button !== 0) return;
    this._dragged = false;
    this._drag = { x: event.clientX, y: event.clientY, centre: this._centre, moved: false };
  }

  _moveDrag(event) {
    if (!this._drag) return;
    const [byX, byY] = [event.clientX - this._drag.x, event.clientY - this._drag.y];
    if (!this._drag.moved && Math.hypot(byX, byY) < DRAG_PX) return;
    if (!this._drag.moved) this._svg.setPointerCapture(event.pointerId);
    this._drag.moved = true;
    this._dragged = true; // the click that ends it is none
    this._fitted = false;
    const { centre } = this._drag;
    this._centre = { x: centre.x - byX / this._scale, y: centre.y - byY / this._scale };
    this._svg.classList.add("dragging");
    this._view();
  }

  _endDrag() {
    this._drag = null;
    this._svg.classList.remove("dragging");
  }

  _wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY / 300));
  }
}

/** Return the line through points: a curve after each service or bend, then straight. */
function pathOf(points, shorter) {
  const [dx, dy] = direction(points);
  const [lastX, lastY] = points.at(-1);
  const end = [lastX - dx * shorter, lastY - dy * shorter];
  const start = `M${points[0].join(" ")}`;
  if (dy) return `${start}C${points[1].join(" ")} ${points[2].join(" ")} ${end.join(" ")}`;
  const parts = points.slice(1).map(([toX, toY], index) => {
    const [fromX, fromY] = points[index];
    if (fromY === toY) return `H${toX}`;
    const curveX = fromX + (toX - fromX) * CURVE;
    const middle = (fromX + curveX) / 2;
    return `C${middle} ${fromY} ${middle} ${toY} ${curveX} ${toY}H${toX}`;
  });
  return `${start}${parts.join("")}H${end[0]}`.replace(/H[^H]*H([^H]*)$/, "H$1");
}

/** Where a line arrives: from a side, or, round a corner, from above. */
function direction(points) {
  const [before, last] = points.slice(-2);
  if (before[0] === last[0]) return [0, 1];
  return [Math.sign(last[0] - before[0]), 0];
}

function arrowAt(points, width) {
  const [x, y] = points.at(-1);
  const [dx, dy] = direction(points);
  const half = 3 + width / 2;
  const [baseX, baseY] = [x - dx * ARROW * 1.3, y - dy * ARROW * 1.3];
  return `M${x} ${y}L${baseX - dy * half} ${baseY - dx * half}L${baseX + dy * half} ${baseY + dx * half}z`;
}

/** Above the straight end of a line; beside the top of a loop. */
function labelAt(points, width) {
  const [x, y] = points.at(-1);
  const [dx, dy] = direction(points);
  if (dy) return { x: x + 4, y: points[1][1] + 4, "text-anchor": "start" };
  return { x: x - dx * (ARROW + 8), y: y - width / 2 - 3, "text-anchor": dx > 0 ? "end" : "start" };
}
