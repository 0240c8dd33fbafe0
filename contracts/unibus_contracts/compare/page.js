"use strict";
(() => {
  const body = document.querySelector("tbody");
  const rows = [...body.rows];
  const find = document.getElementById("find");
  const show = document.getElementById("show");
  const count = document.getElementById("count");
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = words.every((word) => text.get(row).includes(word));
      row.hidden = !(fits && (!show.value || row.dataset.marks.split(" ").includes(show.value)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  find.addEventListener("input", filter);
  show.addEventListener("change", filter);
  document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());

  // A click sorts, a second one the other way, a third one goes back to the order of the chapters.
  const heads = [...document.querySelectorAll("thead th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") || "none"];
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (next !== "none") head.setAttribute("aria-sort", next);
    const title = (row) => row.cells[0].childNodes[1].textContent.trim();
    const rank = (row) => Number(row.cells[column].dataset.rank);
    const order = {
      none: (a, b) => a.dataset.at - b.dataset.at,
      ascending: column ? (a, b) => rank(a) - rank(b) : (a, b) => title(a).localeCompare(title(b)),
    };
    order.descending = (a, b) => order.ascending(b, a);
    rows.sort((a, b) => order[next](a, b) || a.dataset.at - b.dataset.at);
    body.append(...rows);
  }));

  // On paper all is open; afterwards what the reader had opened still is, and nothing else.
  const opened = [];
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((one) => {
    one.open = true;
    opened.push(one);
  }));
  addEventListener("afterprint", () => opened.splice(0).forEach((one) => { one.open = false; }));
  filter();
})();
