"use strict";
// Sorts the table by the column whose head is clicked: the largest first, then the smallest.
const table = document.getElementById("records");
const body = table.tBodies[0];
for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => Number(row.cells[Number(button.dataset.column)].dataset.value);
    const rows = [...body.rows].sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)));
    body.append(...rows);
  });
}
