// A trace as a row of the list.

import { h, serviceLabel } from "./dom.js";
import { ago, clock, count, day, duration, statusClass, time } from "./format.js";

const MAX_CHIPS = 8; // services named in a row; what is beyond is a number

/** Return a summary as a row of the list; `longest` is what a full bar means. */
export function row(trace, longest, nowMs) {
  const { root = null, tags = {}, services = [] } = trace;
  const status = tags["http.status_code"];
  const failed = trace.errorCount > 0;
  const at = trace.timestamp;
  return h(
    "li",
    { class: failed ? "trace failed" : "trace", "data-trace": trace.traceId },
    h(
      "div",
      { class: "trace-what" },
      h(
        "a",
        { class: "trace-link", href: traceHref(trace), title: `Trace ${trace.traceId}` },
        serviceLabel(root?.serviceName ?? ""),
        h("bdi", { class: "trace-name" }, root?.name || "unnamed"),
      ),
      tags["http.method"] && h("span", { class: "badge" }, tags["http.method"]),
      status &&
        h(
          "span",
          { class: `badge ${statusClass(status)}`, title: "Status of the root span" },
          status,
        ),
      h("bdi", { class: "trace-path cut muted mono" }, tags["http.path"] ?? tags["http.url"]),
    ),
    h(
      "ul",
      { class: "trace-services", "aria-label": "Services and their spans" },
      services
        .slice(0, MAX_CHIPS)
        .map((service) =>
          h(
            "li",
            { class: service.errorCount > 0 ? "chip failed" : "chip" },
            serviceLabel(service.serviceName, service.spanCount),
          ),
        ),
      services.length > MAX_CHIPS &&
        h("li", { class: "chip muted" }, `and ${services.length - MAX_CHIPS} more`),
    ),
    h("span", { class: "trace-spans" }, count(trace.spanCount, "span")),
    h(
      "span",
      { class: failed ? "trace-errors badge error" : "trace-errors" },
      failed && count(trace.errorCount, "error"),
    ),
    h(
      "span",
      { class: "trace-duration" },
      h("span", { class: "bar", style: { "--share": (trace.duration ?? 0) / longest } }),
      h("b", null, duration(trace.duration)),
    ),
    h(
      "time",
      { class: "trace-time", datetime: at && new Date(at / 1e3).toISOString(), title: time(at) },
      at ? (day(at) === day(nowMs * 1e3) ? clock(at) : time(at).slice(5, -4)) : "–",
      at && h("span", { class: "muted" }, ago(at, nowMs)),
    ),
  );
}

/** Return the address of a summary's trace. */
export function traceHref(trace) {
  return `/traces/${encodeURIComponent(trace.traceId)}`;
}

/** Mark the row of the trace that the scatter points at; null: none. */
export function mark(results, trace) {
  for (const item of results.querySelectorAll("li.pointed")) item.classList.remove("pointed");
  if (trace)
    results.querySelector(`[data-trace="${CSS.escape(trace.traceId)}"]`)?.classList.add("pointed");
}
