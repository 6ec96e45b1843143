// Build elements. What comes from the network goes through here and becomes text nodes
// and attribute values, never markup.

import { serviceHue } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return a new HTML element.
 *
 * Props: a function under `onclick` and the like becomes a listener, an object under
 * `style` sets CSS properties (the CSP forbids the attribute, not the script), true is
 * an attribute without value; false, null and undefined leave the attribute out.
 * Children: elements, texts, numbers, arrays of them; false, null and undefined are left out.
 */
export function h(tag, props, ...children) {
  return filled(document.createElement(tag), props, children);
}

/** Return a new SVG element; arguments as for `h`. */
export function svg(tag, props, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

/** Put children, as `h` takes them, in the place of those that `parent` has. */
export function replace(parent, ...children) {
  parent.replaceChildren(...nodes(children));
}

/**
 * Show in place of the view's content that it is "loading", "empty" or in "error".
 *
 * `retry` is called by a button, if given; further children go beside it.
 */
export function state(view, kind, text, retry, ...more) {
  replace(
    view,
    h(
      "div",
      { class: `state state-${kind}`, role: kind === "error" ? "alert" : "status" },
      h("p", null, text),
      (retry || more.length > 0) &&
        h(
          "p",
          { class: "actions" },
          retry && h("button", { type: "button", onclick: () => retry() }, "Try again"),
          more,
        ),
    ),
  );
}

/** Return a service's name with its colour mark; `count`, if given, follows it. */
export function serviceLabel(name, count) {
  return h(
    "span",
    { class: "service", style: { "--hue": serviceHue(name) } },
    h("bdi", null, name || "unknown"),
    count !== undefined && h("span", { class: "count" }, count),
  );
}

/** Whether a key pressed belongs to what has the focus, so that it is no shortcut. */
export function isTyping(event) {
  return (
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    event.isComposing ||
    event.target.closest?.("input, select, textarea, dialog, [contenteditable]") != null
  );
}

/**
 * Move the focus through a list's links: by j and k from anywhere, and by the arrows
 * once it is in the list.
 */
export function walk(event, links) {
  const at = links.indexOf(document.activeElement);
  const step = { j: 1, k: -1, ArrowDown: at >= 0 && 1, ArrowUp: at >= 0 && -1 }[event.key];
  if (!step || links.length === 0) return;
  event.preventDefault();
  links[Math.min(Math.max(at + step, 0), links.length - 1)].focus();
}

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") {
      element.addEventListener(name.replace(/^on/, "").toLowerCase(), value);
    } else if (name === "style") {
      for (const [property, text] of Object.entries(value)) {
        element.style.setProperty(property, String(text));
      }
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== false && child !== null && child !== undefined)
    .map((child) => (child instanceof Node ? child : document.createTextNode(String(child))));
}
