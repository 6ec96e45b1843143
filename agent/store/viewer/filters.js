// What the list of traces is filtered by, and how that is written into its address.
//
// The names in the address are those of Zipkin's GET /api/v2/traces; "errors only" is
// its annotationQuery's term `error`. Pure.

/** Milliseconds that a search looks back, and what that is called. */
export const LOOKBACKS = [
  [5 * 60e3, "Last 5 minutes"],
  [15 * 60e3, "Last 15 minutes"],
  [3600e3, "Last hour"],
  [6 * 3600e3, "Last 6 hours"],
  [24 * 3600e3, "Last 24 hours"],
  [2 * 24 * 3600e3, "Last 2 days"],
  [7 * 24 * 3600e3, "Last 7 days"],
  [20 * 365 * 24 * 3600e3, "Any time"],
];
export const ANY_TIME = LOOKBACKS.at(-1)[0];
export const LIMITS = [20, 50, 100, 250, 500, 1000];
export const SORTS = {
  newest: "Newest",
  longest: "Longest",
  spans: "Most spans",
  errors: "Errors",
};

export const DEFAULTS = Object.freeze({
  serviceName: "",
  spanName: "",
  remoteServiceName: "",
  tags: "", // annotationQuery without the term `error`
  errorsOnly: false,
  minDuration: null, // microseconds
  maxDuration: null,
  lookback: 3600e3, // milliseconds before endTs
  endTs: null, // milliseconds since 1970; null: now
  limit: 100,
  sort: "newest",
  scale: "log", // of the scatter
});

const AND = " and ";

/** Read the filters out of an address; what makes no sense there is as if it were not. */
export function readFilters(params) {
  const terms = (params.get("annotationQuery") ?? "").split(AND).map((term) => term.trim());
  const sort = params.get("sort");
  return {
    serviceName: params.get("serviceName") ?? "",
    spanName: params.get("spanName") ?? "",
    remoteServiceName: params.get("remoteServiceName") ?? "",
    tags: terms.filter((term) => term && term !== "error").join(AND),
    errorsOnly: terms.includes("error"),
    minDuration: whole(params.get("minDuration")),
    maxDuration: whole(params.get("maxDuration")),
    lookback: whole(params.get("lookback")) ?? DEFAULTS.lookback,
    endTs: whole(params.get("endTs")),
    limit: Math.min(whole(params.get("limit")) ?? DEFAULTS.limit, LIMITS.at(-1)),
    sort: Object.hasOwn(SORTS, sort ?? "") ? sort : DEFAULTS.sort,
    scale: params.get("scale") === "linear" ? "linear" : DEFAULTS.scale,
  };
}

/** Write filters as an address of the list, without what is the default. */
export function writeFilters(filters) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(filters)) {
    if (value === DEFAULTS[name] || name === "tags" || name === "errorsOnly") continue;
    if (value !== null && value !== "") params.set(name, value);
  }
  const annotationQuery = annotations(filters);
  if (annotationQuery) params.set("annotationQuery", annotationQuery);
  const text = params.toString();
  return text ? `/?${text}` : "/";
}

/** Return the parameters of the API's search. */
export function searchParams(filters) {
  const { serviceName, spanName, remoteServiceName, lookback, endTs, limit } = filters;
  const { minDuration, maxDuration } = filters;
  return {
    serviceName,
    spanName,
    remoteServiceName,
    annotationQuery: annotations(filters),
    // Zipkin takes a maximum only beside a minimum.
    minDuration: minDuration ?? (maxDuration === null ? null : 1),
    maxDuration,
    lookback,
    endTs,
    limit,
  };
}

/** Return summaries of traces in the order that is asked for; ties have the newest first. */
export function sorted(traces, sort) {
  const key = {
    newest: () => 0,
    longest: (trace) => trace.duration ?? 0,
    spans: (trace) => trace.spanCount,
    errors: (trace) => trace.errorCount,
  }[sort];
  return traces.toSorted(
    (one, other) => key(other) - key(one) || (other.timestamp ?? 0) - (one.timestamp ?? 0),
  );
}

function annotations({ tags, errorsOnly }) {
  return [tags.trim(), errorsOnly && "error"].filter(Boolean).join(AND);
}

function whole(text) {
  return /^\d{1,15}$/.test(text ?? "") && Number(text) > 0 ? Number(text) : null;
}
