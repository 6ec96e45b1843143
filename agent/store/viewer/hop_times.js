// Where the time of a call went, from its two halves and podspan's tags. Pure.
//
// Of a call seen at both ends, the server says how long it read the request, worked
// until the first byte of its answer, and wrote the answer; what the client's span lasts
// longer was the network (and what stands in it). Seen at the client only, its wait is
// the network and the server together. Connecting comes before a call of HTTP and is not
// in its duration; in a TCP connection's it is.

/** The parts in the order in which they happen. */
export const PARTS = {
  connect: "connect",
  request: "request",
  network: "network",
  wait: "server's wait",
  waitSeen: "wait (network and server)",
  firstResponse: "first response",
  response: "response",
  rest: "not accounted for",
};

/**
 * Return {parts: [{part, us}], totalUs, networkUs}, or null where nothing is known beyond
 * the duration. networkUs is negative where the server's half outlasts the client's, and
 * null where there are not two halves; the parts are never negative.
 */
export function hopTimes(row) {
  const { client, server } = row;
  const both = Boolean(client && server);
  const seen = both ? server : row.first;
  const networkUs = both ? client.durationUs - server.durationUs : null;
  const tcp = tagUs(seen, "first_response") !== null;
  const connectUs = tagUs(client ?? seen, "connect");

  const times = { connect: connectUs, request: tagUs(seen, "request") };
  if (both) times.network = Math.max(0, networkUs);
  times[server ? "wait" : "waitSeen"] = tagUs(seen, "wait");
  // Another tracer's server says only how long it took.
  if (both && !tcp && times.request === null) times.wait ??= server.durationUs;
  times.firstResponse = tagUs(seen, "first_response");
  times.response = tagUs(seen, "response");
  const known = Object.values(times).filter((us) => us !== null);
  if (!known.length) return null;

  const beforeUs = tcp ? 0 : (connectUs ?? 0);
  const totalUs = Math.max(row.durationUs, both ? server.durationUs : 0) + beforeUs;
  times.rest = Math.max(0, totalUs - sum(known));
  const parts = Object.keys(PARTS)
    .filter((part) => (times[part] ?? null) !== null && (part !== "rest" || times.rest > 0))
    .map((part) => ({ part, us: times[part] }));
  return { parts, totalUs, networkUs };
}

/** Return how long connecting took before the row's first span began. */
export function connectLeadUs(row) {
  if (!row.client || tagUs(row.client, "first_response") !== null) return 0;
  return tagUs(row.client, "connect") ?? 0;
}

function tagUs(node, name) {
  const text = node.span.tags?.[`podspan.${name}_us`];
  return /^[0-9]{1,15}$/.test(text ?? "") ? Number(text) : null;
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}
