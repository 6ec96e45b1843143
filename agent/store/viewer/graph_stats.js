// Rates and shares of the edges between services. Pure.

// The shares of failed calls from which on an edge is drawn as troubled and as failing:
// those of Zipkin's configuration, dependency.lowErrorRate and dependency.highErrorRate.
const LOW_ERROR_SHARE = 0.5;
const HIGH_ERROR_SHARE = 0.75;

const MIN_WIDTH_PX = 1.5;
const MAX_WIDTH_PX = 6;

/** Return the edges with `rate` (calls a second over the range) and `errorShare`. */
export function withShares(edges, lookbackMs) {
  return edges.map((edge) => ({
    ...edge,
    rate: edge.callCount / (lookbackMs / 1e3),
    errorShare: edge.callCount ? edge.errorCount / edge.callCount : 0,
  }));
}

/** Return how well an edge does: "ok", "warn", "error". */
export function health({ errorShare }) {
  if (errorShare >= HIGH_ERROR_SHARE) return "error";
  return errorShare >= LOW_ERROR_SHARE ? "warn" : "ok";
}

/** Return how thick each edge is, in pixels: the logarithm of its rate. */
export function widths(edges) {
  const rates = edges.map(({ rate }) => rate).filter((rate) => rate > 0);
  const least = Math.min(...rates);
  const range = Math.log(Math.max(...rates) / least) || 1;
  return new Map(
    edges.map((edge) => {
      const share = edge.rate > 0 ? Math.log(edge.rate / least) / range : 0;
      return [edge, MIN_WIDTH_PX + share * (MAX_WIDTH_PX - MIN_WIDTH_PX)];
    }),
  );
}

/** Return the sums over the edges to and from a service. */
export function nodeStats(edges, name) {
  const total = (some) => {
    const sum = (field) => some.reduce((before, edge) => before + edge[field], 0);
    const [callCount, errorCount] = [sum("callCount"), sum("errorCount")];
    return {
      edges: some.length,
      callCount,
      errorCount,
      rate: sum("rate"),
      errorShare: callCount ? errorCount / callCount : 0,
    };
  };
  return {
    incoming: total(edges.filter((edge) => edge.child === name)),
    outgoing: total(edges.filter((edge) => edge.parent === name)),
  };
}

/** Write a rate by the unit in which it is not all zeros: "12.5/s", "3/min", "2/h". */
export function rateText(rate) {
  if (rate >= 1) return `${short(rate)}/s`;
  if (rate * 60 >= 1) return `${short(rate * 60)}/min`;
  return `${short(rate * 3600)}/h`;
}

/** Write a share: "0 %", "0.4 %", "37 %". */
export function shareText(share) {
  const number = 100 * share;
  if (number > 0 && number < 0.1) return "< 0.1 %";
  return `${number > 0 && number < 10 ? number.toFixed(1) : number.toFixed(0)} %`;
}

function short(number) {
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)}M`;
  if (number >= 1e4) return `${(number / 1e3).toFixed(0)}k`;
  if (number >= 100) return number.toFixed(0);
  return String(Number(number.toFixed(number >= 10 ? 1 : 2)));
}
