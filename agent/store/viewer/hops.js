// The small bar chart of where a call's time went.

import { h } from "./dom.js";
import { duration } from "./format.js";
import { shareText } from "./graph_stats.js";
import { PARTS, hopTimes } from "./hop_times.js";

/** Return the chart of a row, or null where nothing is known beyond its duration. */
export function hopChart(row) {
  const hop = hopTimes(row);
  if (!hop || hop.totalUs <= 0) return null;
  let beforeUs = 0;
  const lines = hop.parts.map(({ part, us }) => {
    const line = h(
      "tr",
      { class: `hop hop-${part}` },
      h("th", { scope: "row" }, PARTS[part]),
      h(
        "td",
        { class: "hop-track" },
        h("span", {
          class: "hop-bar",
          style: { "--from": beforeUs / hop.totalUs, "--size": us / hop.totalUs },
        }),
      ),
      h("td", { class: "number" }, duration(us)),
      h("td", { class: "number muted" }, shareText(us / hop.totalUs)),
    );
    beforeUs += us;
    return line;
  });
  const outlasted = hop.networkUs !== null && hop.networkUs < 0;
  return h(
    "section",
    { class: "hops", "aria-label": "Where the time went" },
    h("h3", null, "Where the time went"),
    h("table", null, h("tbody", null, lines)),
    outlasted &&
      h(
        "p",
        { class: "muted small" },
        `The server's span outlasts the client's by ${duration(-hop.networkUs)}: the client stopped waiting, or closed before the server noticed.`,
      ),
  );
}
