// Scales of a plot: values to pixels and back, and where ticks go. Pure.

import { time } from "./format.js";

const STEPS_MS = [
  1,
  2,
  5,
  10,
  20,
  50,
  100,
  200,
  500,
  1e3,
  2e3,
  5e3,
  10e3,
  15e3,
  30e3,
  60e3,
  120e3,
  300e3,
  600e3,
  900e3,
  1800e3,
  3600e3,
  2 * 3600e3,
  3 * 3600e3,
  6 * 3600e3,
  12 * 3600e3,
  86400e3,
  2 * 86400e3,
  7 * 86400e3,
  30 * 86400e3,
  365 * 86400e3,
];

/** Return {low, high, at(value) -> pixels, value(pixels)}, linear from start to end. */
export function linear(low, high, [start, end]) {
  const unit = (end - start) / (high - low);
  return {
    low,
    high,
    at: (value) => start + (value - low) * unit,
    value: (pixel) => low + (pixel - start) / unit,
  };
}

/** As `linear`, of logarithms. */
export function logarithmic(low, high, range) {
  const log = linear(Math.log(low), Math.log(high), range);
  return {
    low,
    high,
    at: (value) => log.at(Math.log(value)),
    value: (pixel) => Math.exp(log.value(pixel)),
  };
}

/** Powers of ten; where there are few, round numbers between them as well. */
export function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
  const ticks = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    ticks.push(
      ...factors.map((factor) => factor * power).filter((tick) => tick >= low && tick <= high),
    );
  }
  return ticks;
}

/** Some four round numbers from 0 to `high`. */
export function linearTicks(high) {
  const rough = high / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(high / step) + 1 }, (_, index) => index * step);
}

/** Whole seconds, minutes, hours, ... of local time, in microseconds; at most `most`. */
export function timeTicks(low, high, most) {
  const step = (STEPS_MS.find((ms) => (high - low) / (ms * 1e3) <= most) ?? STEPS_MS.at(-1)) * 1e3;
  const zone = new Date(low / 1e3).getTimezoneOffset() * 60e6;
  const ticks = [];
  for (let tick = Math.ceil((low - zone) / step) * step + zone; tick <= high; tick += step)
    ticks.push(tick);
  return ticks.map((tick) => ({ at: tick, text: tickText(tick, step) }));
}

function tickText(us, step) {
  const text = time(us);
  if (step >= 86400e6) return text.slice(0, 10);
  if (step < 1e6) return text.slice(11);
  return step < 60e6 ? text.slice(11, 19) : text.slice(11, 16);
}
