// All that is known of one row: its halves' tags, annotations, ends and links.

import { h, replace, serviceLabel } from "./dom.js";
import { clock, duration, statusClass } from "./format.js";
import { shareText } from "./graph_stats.js";
import { hopChart } from "./hops.js";
import { operation, outcome } from "./trace_model.js";

const COPIED_MS = 1200;

// `podspan.link`: how the span found its parent (bpf/exchange.h, enum exchange_link).
const LINKS = {
  none: "It has no parent: no headers told of one, and the thread that sent it was serving nothing.",
  header: "By the B3 headers in the request's own head.",
  thread: "By the thread that sent it: the request which that thread was serving is the parent.",
  upgrade: "By the request that turned its connection into a tunnel.",
};

/** Return the details of a row as an element. */
export function spanDetail(trace, row, { onPathUs, onSelect, onClose }) {
  const status = outcome(row);
  const title = h(
    "h2",
    { class: "detail-title", tabindex: "-1" },
    h("bdi", null, operation(row.last.span)),
    status && [
      " ",
      h("span", { class: `badge ${row.failed ? "error" : statusClass(status)}` }, status),
    ],
  );
  return h(
    "div",
    { class: "detail-content" },
    h(
      "header",
      { class: "detail-head" },
      h(
        "div",
        { class: "detail-who" },
        (row.client || row.server) &&
          row.caller !== row.service && [
            serviceLabel(row.caller),
            h("span", { class: "muted" }, "→"),
          ],
        serviceLabel(row.service),
      ),
      h(
        "button",
        {
          type: "button",
          class: "quiet detail-close",
          "aria-label": "Close details",
          onclick: onClose,
        },
        "×",
      ),
      title,
    ),
    remarks(row),
    facts(trace, row, onPathUs),
    hopChart(row),
    timeLine(trace, row),
    linked(row, onSelect),
    row.nodes.map((node) => half(trace, node)),
  );
}

function facts(trace, row, onPathUs) {
  const pairs = [
    ["Duration", row.first.durationUs ? duration(row.durationUs) : "not known"],
    [
      "Starts at",
      row.first.timed ? `+${duration(row.first.startUs - trace.startUs)}` : "not known",
    ],
    [
      "On the critical path",
      onPathUs
        ? `${duration(onPathUs)}, ${shareText(onPathUs / (trace.root.durationUs || 1))}`
        : "no",
    ],
    ["Calls below", row.endIndex - row.index - 1],
  ];
  return h(
    "dl",
    { class: "facts" },
    pairs.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
  );
}

function remarks(row) {
  const texts = [];
  if (row.trouble === "orphan") {
    texts.push(
      `Its parent, span ${row.first.span.parentId}, is not in this trace: it may not have arrived, was not sampled, or its service is not traced.`,
    );
  }
  if (row.trouble === "cycle") {
    texts.push(
      "By its parents it is its own ancestor. It stands on top because it is the earliest of them.",
    );
  }
  if (row.skewUs) {
    const way = row.skewUs > 0 ? "ahead of" : "behind";
    texts.push(
      `The server's clock seems to be about ${duration(Math.abs(row.skewUs))} ${way} the client's. Times are shown as they were recorded.`,
    );
  }
  if (row.nodes.some((node) => !node.timed)) {
    texts.push("It came without a time, and is shown where its parent starts.");
  }
  return texts.map((text) => h("p", { class: "detail-remark" }, text));
}

/** The halves and their annotations in the row's own time. */
function timeLine(trace, row) {
  const moments = row.nodes
    .flatMap(({ span }) => span.annotations ?? [])
    .filter(({ timestamp }) => Number.isFinite(timestamp))
    .toSorted((one, other) => one.timestamp - other.timestamp);
  if (!moments.length) return null;
  const startUs = Math.min(row.startUs, moments[0].timestamp);
  const endUs = Math.max(row.endUs, moments.at(-1).timestamp);
  const share = (us) => (us - startUs) / (endUs - startUs || 1);
  return h(
    "section",
    { class: "moments", "aria-label": "Annotations" },
    h("h3", null, "Annotations"),
    h(
      "div",
      { class: "moments-line", "aria-hidden": "true" },
      row.nodes.map((node) =>
        h("span", {
          class: "moments-bar hue",
          style: { "--from": share(node.startUs), "--to": share(node.endUs) },
        }),
      ),
      moments.map(({ timestamp }) => h("i", { style: { "--at": share(timestamp) } })),
    ),
    h(
      "ol",
      null,
      moments.map(({ timestamp, value }) =>
        h(
          "li",
          null,
          h("time", { title: clock(timestamp) }, signed(timestamp - trace.startUs)),
          h("bdi", null, value),
        ),
      ),
    ),
  );
}

function linked(row, onSelect) {
  const ways = row.nodes
    .map((node) => [halfName(node), node.span.tags?.["podspan.link"]])
    .filter(([, link]) => link !== undefined);
  if (!ways.length && !row.parent) return null;
  return h(
    "section",
    { class: "linked", "aria-label": "How it was linked" },
    h("h3", null, "How it was linked"),
    row.parent &&
      h(
        "p",
        null,
        "Parent: ",
        h(
          "button",
          { type: "button", class: "link", onclick: () => onSelect(row.parent) },
          h("bdi", null, `${row.parent.service || "unknown"}: ${operation(row.parent.last.span)}`),
        ),
      ),
    ways.length > 0 &&
      h(
        "dl",
        null,
        ways.map(([name, link]) => [
          h("dt", null, name, " ", h("code", { class: "badge" }, link)),
          h(
            "dd",
            null,
            Object.hasOwn(LINKS, link) ? LINKS[link] : "A way that this viewer does not know.",
          ),
        ]),
      ),
  );
}

function halfName(node) {
  return (
    { CLIENT: "Client", SERVER: "Server", PRODUCER: "Producer", CONSUMER: "Consumer" }[
      node.span.kind
    ] ?? "Span"
  );
}

function half(trace, node) {
  const { span } = node;
  const tags = Object.entries(span.tags ?? {}).sort(([one], [other]) => (one < other ? -1 : 1));
  return h(
    "section",
    { class: "half", "aria-label": `${halfName(node)} span ${span.id}` },
    h(
      "h3",
      null,
      halfName(node),
      h("span", { class: "muted" }, node.durationUs ? duration(node.durationUs) : ""),
      copyButton("Copy as JSON", () => JSON.stringify(span, null, 2)),
    ),
    h(
      "table",
      { class: "ends" },
      h(
        "tbody",
        null,
        plain("Span id", span.id, true),
        span.parentId && plain("Parent id", span.parentId, true),
        span.shared && plain("Shared", "the id is its client's"),
        plain("Name", span.name),
        plain(
          "Starts at",
          node.timed
            ? `${clock(span.timestamp)} (+${duration(span.timestamp - trace.startUs)})`
            : "",
        ),
        plain("Here", endpoint(span.localEndpoint)),
        plain("There", endpoint(span.remoteEndpoint)),
      ),
    ),
    tags.length
      ? h(
          "table",
          { class: "tags" },
          h("caption", { class: "hidden" }, `Tags of the ${halfName(node).toLowerCase()}'s span`),
          h(
            "tbody",
            null,
            tags.map(([key, value]) => tagLine(key, value)),
          ),
        )
      : h("p", { class: "muted small" }, "No tags."),
  );
}

function plain(name, value, copied = false) {
  if (!value) return null;
  return h(
    "tr",
    null,
    h("th", { scope: "row" }, name),
    h("td", null, h("bdi", null, value)),
    h("td", { class: "act" }, copied && copyButton("Copy", () => value)),
  );
}

function tagLine(key, value) {
  const failed = key === "error";
  return h(
    "tr",
    { class: failed ? "failed" : null },
    h("th", { scope: "row" }, h("bdi", null, key)),
    h("td", null, h("bdi", null, value)),
    h(
      "td",
      { class: "act" },
      tracesLink(key, value),
      copyButton("Copy", () => value, `Copy ${key}`),
    ),
  );
}

/** A link to the traces that have the tag, where a query can say so. */
function tracesLink(key, value) {
  if (/ and |=/.test(key) || / and /.test(value)) return null;
  const params = new URLSearchParams({ annotationQuery: value ? `${key}=${value}` : key });
  return h(
    "a",
    {
      class: "act-button",
      href: `/?${params}`,
      "aria-label": `Traces with this ${key}`,
      title: "Traces with this tag",
    },
    "Find",
  );
}

function endpoint(end) {
  if (!end) return "";
  const address = end.ipv4 ?? (end.ipv6 ? `[${end.ipv6}]` : "");
  const port = end.port ? `:${end.port}` : "";
  return [end.serviceName, `${address}${port}`].filter(Boolean).join(" · ");
}

function signed(us) {
  return us < 0 ? duration(us) : `+${duration(us)}`;
}

function copyButton(text, valueOf, label = text) {
  const button = h("button", { type: "button", class: "act-button", "aria-label": label }, text);
  button.addEventListener("click", async () => {
    replace(button, (await copied(valueOf())) ? "Copied" : "Failed");
    setTimeout(() => replace(button, text), COPIED_MS);
  });
  return button;
}

/** Put a text into the clipboard; over plain HTTP, browsers know only the older way. */
async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const area = h("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
