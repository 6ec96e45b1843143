// Which page an address shows, and the browser's history.

import { ApiError } from "./api.js";
import { state } from "./dom.js";

let view = null;
let routes = [];
let afterShow = () => {};
let shown = new AbortController();

/**
 * Show the page of the current address in `element`, and from now on that of any other.
 *
 * `table` is [{path: RegExp, load: () => Promise<module>}]; `onShow(url, module)` is
 * called before a page builds itself.
 */
export function start(element, table, onShow) {
  view = element;
  routes = table;
  afterShow = onShow;
  history.scrollRestoration = "manual";
  window.addEventListener("popstate", () => show({ scroll: history.state?.scroll ?? 0 }));
  document.addEventListener("click", followLink);
  show({ scroll: history.state?.scroll ?? 0, focus: false });
}

/** Go to an address of the viewer. */
export function go(href) {
  note(location.href);
  history.pushState(null, "", href);
  show({ scroll: 0 });
}

/**
 * Write down the address of what is shown already, without showing it again.
 *
 * `push` makes it a step of its own in the history; the same address never is one.
 */
export function note(href, { push = false } = {}) {
  const url = new URL(href, location.href).href;
  if (push && url !== location.href) history.pushState(null, "", url);
  else history.replaceState({ scroll: window.scrollY }, "", url);
}

function routeOf(url) {
  return routes.find((route) => route.path.test(url.pathname));
}

async function show({ scroll, focus = true }) {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  const url = new URL(location.href);
  const route = routeOf(url);
  view.replaceChildren();
  // The keyboard and the screen reader start at the new page, not at a link that is gone.
  if (focus) view.focus({ preventScroll: true });
  if (!route) {
    afterShow(url, null);
    state(view, "empty", "There is no such page.");
    return;
  }
  try {
    const module = await route.load().catch((error) => {
      // What a script that does not come throws; one that is wrong throws others.
      if (!(error instanceof TypeError)) throw error;
      throw new ApiError(0, "The store does not answer.");
    });
    if (signal.aborted) return;
    afterShow(url, module);
    await module.show(view, url, signal);
    if (!signal.aborted) window.scrollTo(0, scroll);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof ApiError)) console.error(error);
    state(view, "error", error.text ?? "The viewer failed: " + error.message, () =>
      show({ scroll }),
    );
  }
}

function followLink(event) {
  if (event.defaultPrevented || event.button !== 0) return;
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  const link = event.target.closest?.("a[href]");
  const href = link?.getAttribute("href");
  if (!href || href.startsWith("#") || link.hasAttribute("target")) return;
  const url = new URL(href, location.href);
  if (url.origin !== location.origin || !routeOf(url)) return;
  event.preventDefault();
  go(url.href);
}
