// The shell around the pages: routes, navigation, shortcuts that work everywhere.

import { h, isTyping, replace } from "./dom.js";
import * as router from "./router.js";

const ROUTES = [
  { path: /^\/$/, title: "Traces", load: () => import("./list.js") },
  { path: /^\/traces\/[^/]+$/, title: "Trace", load: () => import("./trace.js") },
  { path: /^\/dependencies$/, title: "Dependencies", load: () => import("./graph.js") },
  { path: /^\/tail$/, title: "Live", load: () => import("./tail.js") },
];
const KEYS = [
  ["/", "go to the filter"],
  ["?", "this help"],
  ["Tab", "next control"],
  ["Esc", "close what is open"],
];

const view = document.getElementById("view");
const help = document.getElementById("help");

router.start(view, ROUTES, (url, module) => {
  const route = ROUTES.find(({ path }) => path.test(url.pathname));
  document.title = route ? `${route.title} · podspan` : "podspan";
  for (const link of document.querySelectorAll("header nav a")) {
    const within = link.pathname === "/" && url.pathname.startsWith("/traces/");
    if (link.pathname === url.pathname) link.setAttribute("aria-current", "page");
    else if (within) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  // A page may name its own keys: `export const keys = [["j", "next"], ...]`.
  replace(
    document.getElementById("help-keys"),
    [...(module?.keys ?? []), ...KEYS].map(([key, what]) => [
      h(
        "dt",
        null,
        key.split(" ").map((part) => h("kbd", null, part)),
      ),
      h("dd", null, what),
    ]),
  );
});

document.getElementById("help-open").addEventListener("click", () => help.showModal());

document.getElementById("jump").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = event.target.elements.id;
  const text = id.value.trim().toLowerCase();
  if (!text) return;
  id.value = "";
  router.go(`/traces/${encodeURIComponent(text)}`);
});

document.addEventListener("keydown", (event) => {
  if (isTyping(event)) return;
  if (event.key === "?") {
    event.preventDefault();
    help.showModal();
  }
  if (event.key === "/") {
    // A page marks what is to be focused; without, there is the trace id.
    const field = view.querySelector("[data-filter]") ?? document.getElementById("jump-id");
    event.preventDefault();
    field.focus();
    field.select?.();
  }
});
