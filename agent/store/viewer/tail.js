// The live tail: spans as the store gets them, newest first.

import { ApiError, get, pause } from "./api.js";
import { h, isTyping, replace, serviceLabel, walk } from "./dom.js";
import { clock, count, duration, statusClass, time } from "./format.js";
import * as router from "./router.js";

const POLL_MS = 1000;
const AWAY_MS = 3000; // between tries while the store is away
const BATCH = 200; // spans asked for at once; what the store has beyond is skipped
const ROWS = 500; // spans kept and shown

export const keys = [
  ["p", "pause, resume"],
  ["j k", "next, previous span"],
  ["Enter", "open its trace"],
];

/** Build the page; `q` in the address is the text to filter by. */
export async function show(view, url, signal) {
  let spans = []; // newest first, at most ROWS
  const counts = { seen: 0, skipped: 0 };
  let paused = false;
  let wake = () => {};

  const rows = h("ol", { class: "spans", "aria-label": "Spans, newest first" });
  const empty = h("div", { class: "state", role: "status" }, h("p", null, "Waiting for spans…"));
  const status = h("span", { class: "tail-state", role: "status" });
  const totals = h("span", { class: "muted" });
  const pauseButton = h("button", { type: "button", onclick: toggle }, "Pause");
  const filter = h("input", {
    type: "search",
    "data-filter": true,
    "aria-label": "Only spans that contain",
    placeholder: "Filter: service, name, tag, trace id",
    value: url.searchParams.get("q"),
    oninput: () => {
      router.note(filter.value ? `/tail?${new URLSearchParams({ q: filter.value })}` : "/tail");
      renderAll();
    },
  });
  replace(
    view,
    h("h1", { class: "hidden" }, "Live spans"),
    h(
      "section",
      { class: "panel" },
      h(
        "div",
        { class: "toolbar tail-bar" },
        filter,
        pauseButton,
        h("button", { type: "button", class: "quiet", onclick: clear }, "Clear"),
        status,
        h("div", { class: "push" }, totals),
      ),
      empty,
      rows,
    ),
  );
  document.addEventListener("keydown", onKey, { signal });
  document.addEventListener("visibilitychange", () => wake(), { signal });
  say("");
  tally();
  follow();

  /** Ask for what is new until the page is left; not while paused or out of sight. */
  async function follow() {
    let cursor = null;
    try {
      while (true) {
        let wait = POLL_MS;
        if (!paused && !document.hidden) {
          try {
            const answer = await get(
              "/api/podspan/v1/tail",
              { after: cursor, limit: BATCH },
              signal,
            );
            cursor = answer.cursor;
            counts.skipped += answer.skipped;
            add(answer.spans);
            say("");
          } catch (error) {
            if (!(error instanceof ApiError)) throw error;
            say(`${error.text} Trying again.`);
            wait = AWAY_MS;
          }
        }
        const waiting = pause(wait, signal);
        wake = waiting.end;
        await waiting;
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  function add(arrived) {
    if (arrived.length === 0) return;
    counts.seen += arrived.length;
    const newest = arrived.toReversed();
    spans = [...newest, ...spans].slice(0, ROWS);
    rows.prepend(...newest.filter(wanted).map((span) => row(span, "span fresh")));
    while (rows.children.length > ROWS) rows.lastChild.remove();
    tally();
  }

  function renderAll() {
    replace(
      rows,
      spans.filter(wanted).map((span) => row(span, "span")),
    );
    tally();
  }

  function wanted(span) {
    const text = filter.value.trim().toLowerCase();
    return !text || searchText(span).includes(text);
  }

  function tally() {
    const shown = rows.children.length;
    empty.hidden = shown > 0;
    empty.firstChild.textContent =
      spans.length > 0 ? "No span contains that text." : paused ? "Paused." : "Waiting for spans…";
    totals.textContent = [
      `${count(shown)} shown`,
      `${count(counts.seen)} seen`,
      counts.skipped > 0 && `${count(counts.skipped)} skipped`,
    ]
      .filter(Boolean)
      .join(" · ");
  }

  function say(trouble) {
    const text = trouble || (paused ? "Paused" : "Live");
    if (status.textContent === text) return;
    status.textContent = text;
    status.className = `tail-state ${trouble ? "away" : paused ? "paused" : ""}`;
  }

  function toggle() {
    paused = !paused;
    pauseButton.textContent = paused ? "Resume" : "Pause";
    say("");
    tally();
    wake();
  }

  function clear() {
    spans = [];
    counts.seen = 0;
    counts.skipped = 0;
    renderAll();
  }

  function onKey(event) {
    if (isTyping(event)) return;
    if (event.key === "p") toggle();
    walk(event, [...rows.querySelectorAll("a")]);
  }
}

function row(span, className) {
  const tags = span.tags ?? {};
  const failed = "error" in tags;
  const status = tags["http.status_code"];
  return h(
    "li",
    { class: failed ? `${className} failed` : className },
    h(
      "time",
      { class: "mono", title: time(span.timestamp) },
      span.timestamp ? clock(span.timestamp) : "–",
    ),
    serviceLabel(span.localEndpoint?.serviceName ?? ""),
    h("span", { class: "kind" }, span.kind),
    h(
      "a",
      {
        href: `/traces/${encodeURIComponent(span.traceId)}?${new URLSearchParams({ span: span.id })}`,
      },
      h("bdi", null, span.name || "unnamed"),
      span.remoteEndpoint?.serviceName && [
        h("span", { class: "muted" }, span.kind === "SERVER" ? " from " : " to "),
        h("bdi", { class: "muted" }, span.remoteEndpoint.serviceName),
      ],
    ),
    h(
      "span",
      { class: "span-tags" },
      failed && h("span", { class: "badge error" }, "error"),
      status && h("span", { class: `badge ${statusClass(status)}` }, status),
    ),
    h("span", { class: "duration" }, duration(span.duration)),
  );
}

/** Return all that a filter may look for in a span, in lower case. */
function searchText(span) {
  return [
    span.traceId,
    span.id,
    span.name,
    span.kind,
    span.localEndpoint?.serviceName,
    span.remoteEndpoint?.serviceName,
    ...Object.entries(span.tags ?? {}).map(([key, value]) => `${key}=${value}`),
    ...(span.annotations ?? []).map(({ value }) => value),
  ]
    .join("\n")
    .toLowerCase();
}
