"use strict";

/* Sorting: a column's head, by click or by key, sorts up, then down, then back as it was. */
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

function byColumn(column, isNumber, direction) {
  const value = (row) => row.cells[column].dataset.value;
  const compare = isNumber
    ? (a, b) => Number(a) - Number(b)
    : (a, b) => a.localeCompare(b, "en", { numeric: true });
  return (first, second) => {
    const [a, b] = [value(first), value(second)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return direction === "ascending" ? compare(a, b) : compare(b, a);
  };
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const asWritten = [...body.rows];
  const heads = [...table.tHead.rows].at(-1).cells;
  [...heads].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const direction = NEXT[head.getAttribute("aria-sort") ?? "none"];
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...asWritten];
      if (direction !== "none") {
        head.setAttribute("aria-sort", direction);
        rows.sort(byColumn(column, head.classList.contains("number"), direction));
      }
      body.append(...rows);
    });
  });
}

document.querySelectorAll("table").forEach(makeSortable);

/* The theme follows the system until the button chooses one; a browser may refuse to keep it. */
const THEMES = ["system", "light", "dark"];

function stored(theme) {
  try {
    if (theme) localStorage.setItem("furina-theme", theme);
    return localStorage.getItem("furina-theme");
  } catch {
    return null;
  }
}

const toggle = document.getElementById("theme");

function show(theme) {
  toggle.textContent = `Theme: ${theme}`;
  document.documentElement.dataset.theme = theme;
}

toggle.addEventListener("click", () => {
  const next = (THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length;
  show(THEMES[next]);
  stored(THEMES[next]);
});
show(THEMES.includes(stored()) ? stored() : THEMES[0]);
toggle.hidden = false;
