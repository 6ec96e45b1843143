// Suggestions under a text field: the combobox pattern of the ARIA practices.

import { h, replace } from "./dom.js";

const SHOWN = 50;
let made = 0;

/**
 * Return `input` with a list of suggestions under it.
 *
 * `complete(text, caret)` promises {from, to, options}: what may stand in the part of the
 * text between from and to. Options that contain that part are shown; where it is one
 * of them, there is nothing to suggest, but if asked for by click or key: then all.
 * An option chosen takes that part's place; one that ends with "=" wants more, any other
 * makes the field's change event.
 */
export function suggest(input, complete) {
  made += 1;
  const list = h("ul", {
    id: `suggestions-${made}`,
    class: "suggestions",
    role: "listbox",
    hidden: true,
  });
  const box = h("div", { class: "combo" }, input, list);
  let offer = { from: 0, to: 0, options: [] };
  let active = -1;
  let asked = 0;

  for (const [name, value] of Object.entries({
    role: "combobox",
    autocomplete: "off",
    spellcheck: "false",
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": list.id,
  })) {
    input.setAttribute(name, value);
  }

  function close() {
    asked += 1;
    list.hidden = true;
    list.replaceChildren();
    active = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function point(index) {
    list.children[active]?.setAttribute("aria-selected", "false");
    active = index;
    const option = list.children[active];
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", option.id);
  }

  function choose(option) {
    input.setRangeText(option, offer.from, offer.to, "end");
    if (option.endsWith("=")) {
      open();
      return;
    }
    close();
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  async function open({ all = false } = {}) {
    const mine = (asked += 1);
    const text = input.value;
    const { from, to, options } = await complete(text, input.selectionStart ?? text.length);
    if (mine !== asked || document.activeElement !== input) return;
    close();
    offer = { from, to, options: fitting(options, text.slice(from, to), all) };
    if (offer.options.length === 0) return;
    replace(
      list,
      offer.options.slice(0, SHOWN).map((option, index) =>
        h(
          "li",
          {
            id: `${list.id}-${index}`,
            role: "option",
            "aria-selected": "false",
            onmousedown: (event) => event.preventDefault(), // the field keeps the focus
            onclick: () => choose(option),
          },
          option,
        ),
      ),
    );
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
  }

  input.addEventListener("input", () => open());
  input.addEventListener("click", () => open({ all: true }));
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const last = list.children.length - 1;
    if (list.hidden) {
      if (event.key === "ArrowDown") {
        event.preventDefault();
        open({ all: true });
      }
    } else if (event.key === "ArrowDown") {
      event.preventDefault();
      point(active >= last ? 0 : active + 1);
    } else if (event.key === "ArrowUp") {
      event.preventDefault();
      point(active <= 0 ? last : active - 1);
    } else if (event.key === "Enter" && active >= 0) {
      event.preventDefault();
      choose(offer.options[active]);
    } else if (event.key === "Enter") {
      close();
    } else if (event.key === "Escape") {
      event.preventDefault();
      close();
    }
  });
  return box;
}

function fitting(options, written, all) {
  const wanted = written.trim().toLowerCase();
  if (options.some((option) => option.toLowerCase() === wanted)) return all ? options : [];
  return options.filter((option) => option.toLowerCase().includes(wanted));
}
