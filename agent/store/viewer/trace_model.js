// A trace as a tree of rows, from its spans as Zipkin's v2 API gives them. Pure.
//
// A row is a call with both its halves (client's and server's span), or one span alone.
// The halves belong together where they share the id, or where the server's span is the
// only SERVER child of the client's: with more than one, who answered is not known, and
// each is a row of its own below the client's.
//
// Every span is in exactly one row, parents come before their children, whatever the
// spans say: a parent that is not among them leaves an `orphan`, and of spans that are
// their own ancestors the earliest stands at the top, marked `cycle`.
//
// Times are microseconds since 1970 as the spans have them. A clock that runs differently
// on the other machine is noted (skewUs) and never corrected here.

// Each half's clock is cut to microseconds: a difference of one says nothing.
const ROUNDING_US = 1;

/** One span and its place. Without a timestamp it takes its parent's, lasting nothing. */
class Node {
  constructor(span) {
    this.span = span;
    this.service = span.localEndpoint?.serviceName ?? "";
    this.failed = span.tags?.error !== undefined; // whatever its value: Zipkin's rule
    this.parent = null;
    this.children = [];
    this.trouble = ""; // "orphan", "cycle"
    this.row = null;
    this.timed = Number.isFinite(span.timestamp);
    this.startUs = this.timed ? span.timestamp : null;
    this.durationUs = Number.isFinite(span.duration) ? span.duration : 0;
  }

  get endUs() {
    return this.startUs + this.durationUs;
  }
}

/** A call, or a span alone: what stands on one line. */
class Row {
  constructor(index, parent, first, server) {
    this.index = index;
    this.parent = parent;
    this.depth = parent ? parent.depth + 1 : 0;
    this.children = [];
    this.endIndex = index + 1; // of the subtree, exclusive
    this.client = first.span.kind === "CLIENT" ? first : null;
    this.server = server ?? (first.span.kind === "SERVER" ? first : null);
    this.nodes = server ? [first, server] : [first];
    this.trouble = first.trouble;
    this.skewUs = this.client && this.server ? clockSkew(this.client, this.server) : 0;
  }

  /** Who made the call: the client's half, or the span itself. */
  get first() {
    return this.nodes[0];
  }

  /** Where the work was done: what the row is named and coloured after. */
  get last() {
    return this.nodes.at(-1);
  }

  get failed() {
    return this.nodes.some((node) => node.failed);
  }

  get startUs() {
    return Math.min(...this.nodes.map((node) => node.startUs));
  }

  get endUs() {
    return Math.max(...this.nodes.map((node) => node.endUs));
  }

  get durationUs() {
    return this.first.durationUs;
  }

  /** The service that made the call, and the one that was called ("": not known). */
  get caller() {
    return this.client
      ? this.client.service
      : (this.server?.span.remoteEndpoint?.serviceName ?? "");
  }

  get service() {
    if (this.server) return this.server.service;
    return this.client ? (this.client.span.remoteEndpoint?.serviceName ?? "") : this.first.service;
  }
}

/** Return the trace of these spans; any order, any parents, at least one span. */
export function buildTrace(spans) {
  const nodes = spans.map((span) => new Node(span)).sort(inTime);
  linkParents(nodes);
  cutCycles(nodes);
  for (const node of nodes) node.parent?.children.push(node);
  const timed = nodes.filter((node) => node.timed);
  const startUs = timed.length ? timed[0].startUs : 0;
  const rows = buildRows(
    nodes.filter((node) => !node.parent),
    startUs,
  );
  const endUs = nodes.reduce((latest, node) => Math.max(latest, node.endUs), startUs);
  return {
    id: spans[0].traceId,
    rows,
    root: rows.find((row) => !row.parent && !row.trouble) ?? rows[0],
    startUs,
    endUs,
    durationUs: endUs - startUs,
    depth: rows.reduce((deepest, row) => Math.max(deepest, row.depth + 1), 0),
    spanCount: nodes.length,
    errorCount: nodes.filter((node) => node.failed).length,
    orphanCount: rows.filter((row) => row.trouble === "orphan").length,
    cycleCount: rows.filter((row) => row.trouble === "cycle").length,
    untimedCount: nodes.length - timed.length,
    skewUs: rows.reduce(
      (most, row) => (Math.abs(row.skewUs) > Math.abs(most) ? row.skewUs : most),
      0,
    ),
    services: countServices(nodes),
  };
}

/** Return the row that a span's id stands in; of several with that id, the first. */
export function rowOfSpan(trace, spanId) {
  return trace.rows.find((row) => row.nodes.some((node) => node.span.id === spanId)) ?? null;
}

/** Return the rows that are to be seen while these rows (a Set) are collapsed. */
export function visibleRows(rows, collapsed) {
  const visible = [];
  for (let index = 0; index < rows.length;) {
    const row = rows[index];
    visible.push(row);
    index = collapsed.has(row) ? row.endIndex : index + 1;
  }
  return visible;
}

/** Return the rows in which a name, id, tag or annotation contains the text. */
export function search(trace, text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  return trace.rows.filter((row) => row.nodes.some((node) => searchable(node).includes(wanted)));
}

/** Return method and path where tags of either convention tell, else the span's name. */
export function operation(span) {
  const tags = span.tags ?? {};
  const method =
    tags["http.request.method_original"] ?? tags["http.method"] ?? tags["http.request.method"];
  const path = urlPath(tags);
  if (method && path) return `${method} ${path}`;
  return span.name || method || "(no name)";
}

/** Return the status that the call was answered with ("": none), and how it ended. */
export function outcome(row) {
  const statuses = [];
  for (const { span } of row.nodes) {
    const tags = span.tags ?? {};
    const status = tags["http.status_code"] ?? tags["http.response.status_code"] ?? "";
    if (status && status !== "0") statuses.push(status);
    if (tags["podspan.error"]) statuses.push(tags["podspan.error"]);
  }
  return [...new Set(statuses)].join(" ");
}

function urlPath(tags) {
  const url = tags["http.url"] ?? tags["url.full"];
  if (url) {
    const target = url.replace(/^[a-z][a-z0-9+.-]*:\/\//i, "");
    const start = target.search(/[/?]/);
    return start < 0 ? "/" : target.slice(start);
  }
  const path = tags["url.path"] ?? tags["http.path"];
  if (!path) return "";
  return tags["url.query"] ? `${path}?${tags["url.query"]}` : path;
}

function searchable(node) {
  if (node.text === undefined) {
    const { span } = node;
    const texts = [
      span.id,
      span.name,
      operation(span),
      node.service,
      span.remoteEndpoint?.serviceName,
      ...Object.entries(span.tags ?? {}).map(([key, value]) => `${key}=${value}`),
      ...(span.annotations ?? []).map((annotation) => annotation.value),
    ];
    node.text = texts.filter(Boolean).join("\n").toLowerCase();
  }
  return node.text;
}

/** The earliest first, those without a time last; then by id, so that order is stable. */
function inTime(one, other) {
  if (one.timed !== other.timed) return one.timed ? -1 : 1;
  if (one.startUs !== other.startUs) return one.startUs - other.startUs;
  return compare(one.span.id, other.span.id) || compare(kindOf(one), kindOf(other));
}

function compare(one, other) {
  return one < other ? -1 : Number(one > other);
}

function kindOf(node) {
  return node.span.kind ?? "";
}

/** Give every node its parent, or call it an orphan. */
function linkParents(nodes) {
  const byId = indexById(nodes);
  for (const node of nodes) {
    const { id, parentId } = node.span;
    const client = kindOf(node) === "SERVER" ? byId.get(id).client : null;
    if (client) {
      node.parent = client;
    } else if (parentId && parentId !== id) {
      node.parent = parentAmong(byId.get(parentId), node);
      if (!node.parent) node.trouble = "orphan";
    }
  }
}

function indexById(nodes) {
  const byId = new Map();
  for (const node of nodes) {
    let same = byId.get(node.span.id);
    if (!same) {
      same = { first: node, client: null, server: null, serverOf: new Map() };
      byId.set(node.span.id, same);
    }
    if (kindOf(node) === "CLIENT") same.client ??= node;
    if (kindOf(node) === "SERVER") {
      same.server ??= node;
      if (!same.serverOf.has(node.service)) same.serverOf.set(node.service, node);
    }
  }
  return byId;
}

/** Of the halves that share the parent's id, the serving one made the call. */
function parentAmong(same, node) {
  if (!same) return null;
  return same.serverOf.get(node.service) ?? same.server ?? same.first;
}

/** Take the parent from the earliest node of every cycle. */
function cutCycles(nodes) {
  const walkOf = new Map();
  nodes.forEach((start, walk) => {
    let node = start;
    while (node && !walkOf.has(node)) {
      walkOf.set(node, walk);
      node = node.parent;
    }
    if (!node || walkOf.get(node) !== walk) return;
    let earliest = node;
    for (let member = node.parent; member !== node; member = member.parent) {
      if (inTime(member, earliest) < 0) earliest = member;
    }
    earliest.parent = null;
    earliest.trouble = "cycle";
  });
}

/** Return all rows, each before those below it; without recursion, however deep. */
function buildRows(tops, traceStartUs) {
  const rows = [];
  const stack = [...tops].reverse().map((node) => ({ node, parent: null }));
  while (stack.length) {
    const { node, parent } = stack.pop();
    const server = serverHalf(node);
    placeInTime(node, traceStartUs);
    if (server) placeInTime(server, traceStartUs);

    const row = new Row(rows.length, parent, node, server);
    for (const half of row.nodes) half.row = row;
    parent?.children.push(row);
    rows.push(row);

    const below = node.children.filter((child) => child !== server);
    if (server) below.push(...server.children);
    below.sort(inTime);
    while (below.length) stack.push({ node: below.pop(), parent: row });
  }
  for (const row of [...rows].reverse()) {
    if (row.parent) row.parent.endIndex = Math.max(row.parent.endIndex, row.endIndex);
  }
  return rows;
}

function serverHalf(node) {
  if (kindOf(node) !== "CLIENT") return null;
  const servers = node.children.filter((child) => kindOf(child) === "SERVER");
  return servers.length === 1 ? servers[0] : null;
}

function placeInTime(node, traceStartUs) {
  node.startUs ??= node.parent?.startUs ?? traceStartUs;
}

// Return by how much the server's clock seems to be ahead of the client's: 0 where the
// server's half lies within the client's. One that does not fit into it at all may outlast
// it for good reason (the client gave up), but cannot begin before it.
function clockSkew(client, server) {
  if (!client.timed || !server.timed) return 0;
  const earlyUs = client.startUs - server.startUs;
  const lateUs = server.endUs - client.endUs;
  if (server.durationUs > client.durationUs) return earlyUs > ROUNDING_US ? -earlyUs : 0;
  if (Math.max(earlyUs, lateUs) <= ROUNDING_US) return 0;
  // As if the way there took as long as the way back.
  const wayUs = Math.floor((client.durationUs - server.durationUs) / 2);
  return server.startUs - wayUs - client.startUs;
}

function countServices(nodes) {
  const counts = new Map();
  for (const node of nodes) {
    if (!node.service) continue;
    const count = counts.get(node.service) ?? { name: node.service, spanCount: 0, errorCount: 0 };
    count.spanCount += 1;
    count.errorCount += Number(node.failed);
    counts.set(node.service, count);
  }
  return [...counts.values()];
}
