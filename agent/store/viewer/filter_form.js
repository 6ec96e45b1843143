// The form above the list of traces: fields to filters and back.

import { get } from "./api.js";
import { h } from "./dom.js";
import { ANY_TIME, DEFAULTS, LIMITS, LOOKBACKS } from "./filters.js";
import { duration, exactDuration, parseDuration } from "./format.js";
import { suggest } from "./suggest.js";

const BAD_DURATION = "A number and a unit: 1.5ms, 200us, 2s";
const BAD_RANGE = "From has to be before To";
const EXTRA = ["spanName", "remoteServiceName", "minDuration", "maxDuration", "limit"];

/**
 * Return {element, write(filters)}; `onFind(filters)` is called when it is sent or changed.
 */
export function filterForm(filters, onFind) {
  let base = filters; // what has no field here: sort, scale
  const known = new Map(); // names that the store gave, until the next search
  const field = fields(names());
  const custom = h(
    "div",
    { class: "filter-range" },
    labelled("From", field.from),
    labelled("To", field.to),
  );
  // Narrow screens show the rest on demand (list.css).
  const more = h(
    "button",
    {
      type: "button",
      class: "quiet filter-more",
      "aria-expanded": "false",
      onclick: () => showMore(!element.classList.contains("more")),
    },
    "More",
  );
  const element = h(
    "form",
    { class: "panel filters", role: "search", "aria-label": "Filter traces", novalidate: true },
    labelled("Service", field.serviceName, "wide"),
    labelled("Operation", field.spanName, "wide extra"),
    labelled("Remote service", field.remoteServiceName, "wide extra"),
    labelled("Time", field.lookback, "wide"),
    labelled("Tags and annotations", field.tags, "wider"),
    custom,
    labelled("Min duration", field.minDuration, "extra"),
    labelled("Max duration", field.maxDuration, "extra"),
    labelled("Limit", field.limit, "extra"),
    h("label", { class: "check filter-check" }, field.errorsOnly, "Errors only"),
    h(
      "div",
      { class: "filter-actions" },
      more,
      h("button", { class: "primary" }, "Find traces"),
      h("button", { type: "button", class: "quiet", onclick: clear }, "Clear"),
    ),
  );

  element.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  element.addEventListener("change", (event) => {
    if (event.target === field.lookback.input) openRange();
    send();
  });
  write(filters);
  return { element, write };

  function write(wanted) {
    base = wanted;
    for (const name of ["serviceName", "spanName", "remoteServiceName", "tags"]) {
      field[name].input.value = wanted[name];
    }
    for (const name of ["minDuration", "maxDuration"]) {
      field[name].input.value = wanted[name] === null ? "" : exactDuration(wanted[name]);
    }
    for (const name of ["minDuration", "maxDuration", "to"]) accept(field[name].input, "");
    field.errorsOnly.checked = wanted.errorsOnly;
    choose(field.limit.input, wanted.limit, String(wanted.limit));
    if (wanted.endTs === null) {
      choose(field.lookback.input, wanted.lookback, `Last ${duration(wanted.lookback * 1e3)}`);
    } else {
      choose(field.lookback.input, "custom");
      field.from.input.value = localText(wanted.endTs - wanted.lookback);
      field.to.input.value = localText(wanted.endTs);
    }
    showRange();
    if (EXTRA.some((name) => wanted[name] !== DEFAULTS[name])) showMore(true);
  }

  function showMore(shown) {
    element.classList.toggle("more", shown);
    more.setAttribute("aria-expanded", String(shown));
    more.textContent = shown ? "Less" : "More";
  }

  function send() {
    const wanted = read();
    known.clear();
    if (wanted) onFind(wanted);
  }

  /** Return what the fields say; null, and the field says so, where that is nonsense. */
  function read() {
    const read = {
      ...base,
      errorsOnly: field.errorsOnly.checked,
      limit: Number(field.limit.input.value),
    };
    for (const name of ["serviceName", "spanName", "remoteServiceName", "tags"]) {
      read[name] = field[name].input.value.trim();
    }
    let good = true;
    for (const name of ["minDuration", "maxDuration"]) {
      const text = field[name].input.value.trim();
      const us = text ? parseDuration(text) : null;
      good = accept(field[name].input, Number.isNaN(us) ? BAD_DURATION : "") && good;
      read[name] = us || null;
    }
    if (field.lookback.input.value === "custom") {
      const [from, to] = [field.from.input, field.to.input].map((input) =>
        new Date(input.value).getTime(),
      );
      good = accept(field.to.input, from < to ? "" : BAD_RANGE) && good;
      read.endTs = to;
      read.lookback = to - from;
    } else {
      read.endTs = null;
      read.lookback = Number(field.lookback.input.value);
    }
    return good ? read : null;
  }

  function clear() {
    const wanted = { ...DEFAULTS, sort: base.sort, scale: base.scale };
    write(wanted);
    onFind(wanted);
  }

  /** Begin a range of one's own with the one that was searched. */
  function openRange() {
    if (field.lookback.input.value === "custom") {
      const to = base.endTs ?? Date.now();
      const back = base.lookback === ANY_TIME ? DEFAULTS.lookback : base.lookback;
      field.from.input.value = localText(to - back);
      field.to.input.value = localText(to);
    }
    showRange();
  }

  function showRange() {
    custom.hidden = field.lookback.input.value !== "custom";
  }

  /** Return functions for the names that the store knows; what it does not say is none. */
  function names() {
    const list = (path, params) => {
      const key = `${path} ${Object.values(params ?? {})}`;
      if (!known.has(key)) {
        const none = () => {
          known.delete(key);
          return [];
        };
        known.set(key, get(path, params).catch(none));
      }
      return known.get(key);
    };
    const service = () => field.serviceName.input.value.trim();
    return {
      serviceName: () => list("/api/v2/services"),
      spanName: () => list("/api/v2/spans", { serviceName: service() }),
      remoteServiceName: () => list("/api/v2/remoteServices", { serviceName: service() }),
      keys: () => list("/api/v2/autocompleteKeys"),
      values: (key) => list("/api/v2/autocompleteValues", { key }),
    };
  }
}

/** Return the form's controls: each {input, box}, but errorsOnly, which is the checkbox. */
function fields(names) {
  const whole = (name) => async (text) => ({
    from: 0,
    to: text.length,
    options: await names[name](),
  });
  const text = (props) =>
    plain(h("input", { type: "text", spellcheck: "false", autocomplete: "off", ...props }));
  const named = (name, placeholder) => {
    const input = h("input", { type: "text", placeholder, maxlength: 300 });
    return { input, box: suggest(input, whole(name)) };
  };
  const tags = h("input", {
    type: "text",
    placeholder: "http.method=GET and error",
    maxlength: 2000,
  });
  const options = (pairs) =>
    plain(
      h(
        "select",
        null,
        pairs.map(([value, label]) => h("option", { value }, label)),
      ),
    );
  const moment = () => plain(h("input", { type: "datetime-local", step: "0.001" }));
  const serviceName = named("serviceName", "any");
  serviceName.input.setAttribute("data-filter", "");
  return {
    serviceName,
    spanName: named("spanName", "any"),
    remoteServiceName: named("remoteServiceName", "any"),
    tags: { input: tags, box: suggest(tags, (value, caret) => tagOptions(value, caret, names)) },
    minDuration: text({ placeholder: "1.5ms" }),
    maxDuration: text({ placeholder: "2s" }),
    lookback: options([...LOOKBACKS, ["custom", "From – to…"]]),
    from: moment(),
    to: moment(),
    limit: options(LIMITS.map((limit) => [limit, limit])),
    errorsOnly: h("input", { type: "checkbox" }),
  };
}

function plain(input) {
  return { input, box: input };
}

let labels = 0;

function labelled(text, { input, box }, width = "") {
  labels += 1;
  input.id = `filter-${labels}`;
  return h("div", { class: `field ${width}` }, h("label", { for: input.id }, text), box);
}

/** Return the options for the term of an annotationQuery that the caret is in. */
async function tagOptions(text, caret, names) {
  const before = text.slice(0, caret).lastIndexOf(" and ");
  const start = before < 0 ? 0 : before + " and ".length;
  const after = text.indexOf(" and ", caret);
  const to = after < 0 ? text.length : after;
  const term = text.slice(start, to);
  const equals = term.indexOf("=");
  if (equals < 0) {
    const keys = await names.keys();
    return { from: start, to, options: keys.map((key) => `${key}=`) };
  }
  const values = await names.values(term.slice(0, equals).trim());
  return { from: start + equals + 1, to, options: values };
}

/** Set a select to a value, which becomes an option if it is none. */
function choose(select, value, label) {
  const text = String(value);
  if (![...select.options].some((option) => option.value === text)) {
    select.append(h("option", { value: text }, label));
  }
  select.value = text;
}

/** Say at the field what is wrong with it; "" for nothing. Returns whether it is good. */
function accept(input, wrong) {
  input.setCustomValidity(wrong);
  if (wrong) {
    input.setAttribute("aria-invalid", "true");
    input.reportValidity();
  } else {
    input.removeAttribute("aria-invalid");
  }
  return !wrong;
}

/** Write milliseconds since 1970 as a datetime-local field has it. */
function localText(ms) {
  const date = new Date(ms - new Date(ms).getTimezoneOffset() * 60e3);
  return date.toISOString().slice(0, -1);
}
