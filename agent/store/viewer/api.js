// Ask the store.

const RETRY_MS = [1000, 2000, 4000, 8000];

/** The store did not give what was asked for. */
export class ApiError extends Error {
  /** `status` is HTTP's, 0 where nothing answered; `text` is for people. */
  constructor(status, text) {
    super(text);
    this.name = "ApiError";
    this.status = status;
    this.text = text;
  }

  /** Whether the store may answer later: not reached, or without its database. */
  get away() {
    return this.status === 0 || (this.status >= 502 && this.status <= 504);
  }
}

/** Return the JSON at a path; params that are "", null or undefined are left out. */
export async function get(path, params, signal) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(params ?? {})) {
    if (value !== "" && value !== null && value !== undefined) url.searchParams.set(name, value);
  }
  let response;
  try {
    response = await fetch(url, { signal, headers: { Accept: "application/json" } });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The store does not answer.");
  }
  if (!response.ok) {
    const text = (await response.text()).trim().slice(0, 500);
    throw new ApiError(response.status, text || `The store answered ${response.status}.`);
  }
  return response.json();
}

/**
 * As `get`, but ask again for as long as the store is away.
 *
 * `onAway(error, retryNow)` is called after each failure.
 */
export async function getPatiently(path, params, signal, onAway) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await get(path, params, signal);
    } catch (error) {
      if (!(error instanceof ApiError && error.away)) throw error;
      const wait = pause(RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)], signal);
      onAway(error, wait.end);
      await wait;
    }
  }
}

/** Return a promise that is kept after `ms` or by its `end()`, and broken by the signal. */
export function pause(ms, signal) {
  let end;
  const promise = new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    end = () => {
      clearTimeout(timer);
      resolve();
    };
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
  promise.end = end;
  return promise;
}
