// Dark, light, or what the system prefers. A classic script in the head, so that the
// page is never painted in the wrong theme first.
"use strict";

(() => {
  const KEY = "podspan.theme";
  const CHOICES = ["auto", "light", "dark"];

  // Storage may be forbidden; then the choice lasts as long as the page.
  function stored() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  }

  function apply(choice) {
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
  }

  let choice = CHOICES.includes(stored()) ? stored() : "auto";
  apply(choice);

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.textContent = `Theme: ${choice}`;
    };
    label();
    button.addEventListener("click", () => {
      choice = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
      apply(choice);
      label();
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // As in stored().
      }
    });
  });
})();
