"use strict";

/* Runs in the report: sorts every table by every column and leaves what is wrong in the title. */
const wrong = [];
const said = (words) => wrong.push(words);

function inOrder(table, column, direction) {
  const { name, number } = column;
  const found = [...table.tBodies[0].rows].map((row) => row.cells[column.index].dataset.value);
  const values = found.filter((value) => value !== undefined);
  if (found.slice(0, values.length).includes(undefined)) said(`${name}: a gap is not last`);
  for (let i = 1; i < values.length; i += 1) {
    const [a, b] = [values[i - 1], values[i]];
    const step = number ? Number(b) - Number(a) : b.localeCompare(a, "en", { numeric: true });
    if (!(step * direction >= 0)) said(`${name}: ${b} follows ${a}`);
  }
}

function checkTable(table) {
  const text = () => [...table.tBodies[0].rows].map((row) => row.innerText).join("\n");
  const heads = [...[...table.tHead.rows].at(-1).cells];
  const written = text();
  if (heads.length !== table.tBodies[0].rows[0].cells.length) said("heads and cells differ");
  heads.forEach((head, index) => {
    const column = { index, name: head.innerText, number: head.classList.contains("number") };
    const button = head.querySelector("button");
    button.click();
    inOrder(table, column, 1);
    button.click();
    inOrder(table, column, -1);
    button.click();
    if (text() !== written) said(`${column.name}: the third click does not restore the order`);
  });
  return heads.length;
}

window.addEventListener("load", () => {
  const columns = [...document.querySelectorAll("table")].map(checkTable);
  const toggle = document.getElementById("theme");
  const colours = new Set();
  for (const _ of ["system", "light", "dark"]) {
    colours.add(getComputedStyle(document.body).backgroundColor);
    toggle.click();
  }
  if (colours.size !== 2) said("light and dark look alike");
  if (document.documentElement.scrollWidth > window.innerWidth) said("wider than the window");
  const sorted = columns.reduce((sum, n) => sum + n, 0);
  document.title = JSON.stringify({ tables: columns.length, sorted, wrong });
});
