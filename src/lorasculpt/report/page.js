"use strict";
// A name in the legend that is pointed at, or was chosen with a click, leaves the others pale in all plots.
{
  const names = [...document.querySelectorAll(".legend button")];
  const chosen = () => names.find((name) => name.getAttribute("aria-pressed") === "true");
  const showAlone = (name) => {
    for (const drawn of document.querySelectorAll(".of")) {
      drawn.classList.toggle("pale", name !== undefined && !drawn.classList.contains(name.dataset.series));
    }
  };
  for (const name of names) {
    name.addEventListener("pointerenter", () => showAlone(name));
    name.addEventListener("pointerleave", () => showAlone(chosen()));
    name.addEventListener("click", () => {
      const pressed = name.getAttribute("aria-pressed") === "true";
      for (const each of names) each.setAttribute("aria-pressed", String(each === name && !pressed));
      showAlone(chosen());
    });
  }
}

// Numbers within names go by their size, with what follows a point: density-0.05 before density-0.2.
const parts = (name) => name.split(/(\d+(?:\.\d+)?(?:e-\d+)?)/); // every second one is a number
const byName = (one, other) => {
  const [a, b] = [parts(one), parts(other)];
  for (let i = 0; i < Math.min(a.length, b.length); i++) {
    const order = i % 2 ? a[i] - b[i] : a[i].localeCompare(b[i], "en");
    if (order) return order;
  }
  return a.length - b.length;
};

// A click on a column's head sorts by it: names from the first letter, numbers from the largest; a second click turns
// the order round. What has no number stays at the end.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  const compare = (one, other, column, sign) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (column === 0) return sign * byName(a.textContent, b.textContent);
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

// What is folded away is printed too.
{
  const folded = [];
  addEventListener("beforeprint", () => {
    folded.push(...document.querySelectorAll("details:not([open])"));
    for (const each of folded) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of folded.splice(0)) each.open = false;
  });
}
