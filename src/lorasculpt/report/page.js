"use strict";
// A click on a column's head sorts by it: names from the first letter, numbers from the largest; a second click turns
// the order round. What has no number stays at the end.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  const compare = (one, other, column, sign) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (column === 0) return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
    const [x, y] = [a.dataset.value, b.dataset.value];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (x - y);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button"); // which the keyboard reaches and a screen reader names
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.hasAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : column === 0;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...body.rows].sort((one, other) => compare(one, other, column, rising ? 1 : -1));
      body.append(...rows);
    });
  });
}
