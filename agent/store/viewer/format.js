// Numbers, times and names as people read and write them. Pure.

const LAST_US = 8.64e18; // what a Date can hold; spans may say more
const UNIT_US = { us: 1, µs: 1, μs: 1, ms: 1e3, s: 1e6, m: 60e6, min: 60e6, h: 3600e6 };

/** Write microseconds with three digits: "870 µs", "1.23 ms", "45 s", "2 min 5 s". */
export function duration(us) {
  if (us === undefined || us === null || Number.isNaN(us)) return "–";
  if (us < 0) return `−${duration(-us)}`;
  if (us < 999.5) return `${Math.round(us)} µs`;
  if (us < 999.5e3) return `${digits(us / 1e3)} ms`;
  if (us < 59.95e6) return `${digits(us / 1e6)} s`;
  const seconds = Math.round(us / 1e6);
  if (seconds < 3600) return joined(Math.floor(seconds / 60), "min", seconds % 60, "s");
  const minutes = Math.round(seconds / 60);
  return joined(Math.floor(minutes / 60), "h", minutes % 60, "min");
}

/** Read "1.5ms", "200 us", "2s" into microseconds; NaN where a unit or number is missing. */
export function parseDuration(text) {
  const match = /^\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zµμ]+)\s*$/i.exec(text);
  const unit = match && UNIT_US[match[2].toLowerCase()];
  return unit ? Math.round(Number(match[1]) * unit) : Number.NaN;
}

/** Write microseconds so that `parseDuration` reads the same number: "1.5ms". */
export function exactDuration(us) {
  if (us < 1e3) return `${us}us`;
  return us < 1e6 ? `${us / 1e3}ms` : `${us / 1e6}s`;
}

/** Write a time, in microseconds since 1970: "2026-11-25 21:03:12.345", local. */
export function time(us) {
  return us && us <= LAST_US ? `${day(us)} ${clock(us)}` : "unknown time";
}

/** Write the local time of day of microseconds since 1970: "21:03:12.345". */
export function clock(us) {
  if (us > LAST_US) return "–";
  const date = new Date(us / 1e3);
  const parts = [date.getHours(), date.getMinutes(), date.getSeconds()].map(two);
  return `${parts.join(":")}.${String(date.getMilliseconds()).padStart(3, "0")}`;
}

/** Write the local day of microseconds since 1970: "2026-11-25". */
export function day(us) {
  const date = new Date(us / 1e3);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

/** Write how long ago a time in microseconds since 1970 was: "12 s ago". */
export function ago(us, nowMs = Date.now()) {
  const seconds = Math.max(0, Math.round(nowMs - us / 1e3) / 1e3);
  if (seconds < 1) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

/** Write a number with separators, and its noun: "1,204 spans", "1 span". */
export function count(number, noun) {
  const text = number.toLocaleString("en");
  return noun ? `${text} ${noun}${number === 1 ? "" : "s"}` : text;
}

/** Return the class of an HTTP status as CSS has it: "ok", "warn", "error"; "" if none. */
export function statusClass(code) {
  if (!/^\d{3}$/.test(code ?? "")) return "";
  if (code >= "500") return "error";
  return code >= "400" ? "warn" : "ok";
}

/**
 * Return a service's hue in degrees for `--hue`: the same name, the same colour.
 *
 * Twenty hues, far enough apart to be told from each other, none near that of errors.
 */
export function serviceHue(name) {
  // FNV-1a, 32 bits, over UTF-16 units; its high bits are the better mixed.
  let hash = 0x811c9dc5;
  for (let at = 0; at < name.length; at += 1) {
    hash = Math.imul(hash ^ name.charCodeAt(at), 0x01000193);
  }
  return 50 + 15 * (((hash >>> 0) >>> 7) % 20);
}

function digits(number) {
  if (number >= 99.95) return number.toFixed(0);
  return number.toFixed(number >= 9.995 ? 1 : 2).replace(/\.?0+$/, "");
}

function joined(large, largeUnit, small, smallUnit) {
  return `${large} ${largeUnit}` + (small ? ` ${small} ${smallUnit}` : "");
}

function two(number) {
  return String(number).padStart(2, "0");
}
