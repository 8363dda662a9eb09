"use strict";
// What the page does beyond being read: theme, sorting, filtering, copying, tips. It works without.
const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// The theme: the system's until the switch is used, then the reader's, kept if the browser lets us.
const dark = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
const nameSwitch = () => {
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
};
const kept = (action) => {
  try {
    return action(localStorage);
  } catch {
    return null; // a browser may deny storage to files
  }
};
const theme = kept((storage) => storage.getItem("jaxcomp-theme"));
if (theme === "dark" || theme === "light") root.dataset.theme = theme;
$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  kept((storage) => storage.setItem("jaxcomp-theme", root.dataset.theme));
  nameSwitch();
});
dark.addEventListener("change", nameSwitch);
nameSwitch();

// The table of linears: a click on a heading sorts, a second one turns the order around.
const table = $("linear-table");
if (table) {
  const body = table.tBodies[0];
  const heads = all("th", table.tHead);
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.v ?? cell.textContent;
    return text === "–" ? null : text !== "" && !isNaN(text) ? Number(text) : text;
  };
  const order = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  const sort = (column, direction) => {
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // nothing comes last
      return direction * order(a, b);
    });
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, column) => {
    head.firstChild.addEventListener("click", () => {
      const numbers = head.classList.contains("n") && column > 0;
      const turned = { ascending: "descending", descending: "ascending", none: null };
      const next = turned[head.getAttribute("aria-sort")] ?? (numbers ? "descending" : "ascending");
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      sort(column, next === "ascending" ? 1 : -1);
    });
  });

  // Every word must occur; a number is the number of a block.
  const filter = () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const key = row.dataset.key;
      const fits = (word) =>
        /^\d+$/.test(word) ? row.cells[0].textContent === word : key.includes(word);
      row.hidden = !words.every(fits);
      shown += !row.hidden;
    }
    $("count").textContent = `${shown} of ${body.rows.length} linears`;
  };
  $("filter").parentElement.hidden = false;
  $("filter").addEventListener("input", filter);
  filter();
}

// Copying, where the browser lets a page do it; else the text is selected for the reader's keys.
for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// Tips: the columns of a plot tell their text at the pointer, by touch, and with the arrow keys.
const SVG = "http://www.w3.org/2000/svg";
const tip = $("tip");
const tell = (text, x, y) => {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  const top = Math.min(Math.max(y - height / 2, 4), innerHeight - height - 4);
  tip.style.transform = `translate(${Math.max(left, 4)}px, ${top}px)`;
};
for (const group of all(".tips")) {
  const svg = group.ownerSVGElement;
  const columns = all("rect", group);
  const texts = columns.map((column) => column.textContent);
  columns.forEach((column) => column.replaceChildren()); // else the browser shows its own as well
  const pointer = document.createElementNS(SVG, "path");
  pointer.classList.add("pointer");
  let at = -1;
  const show = (i, y) => {
    at = i;
    const x = columns[i].dataset.x;
    pointer.setAttribute("d", `M${x} 0V1000`);
    group.before(pointer);
    const box = svg.getBoundingClientRect();
    tell(texts[i], box.left + (box.width * x) / 1000, y ?? box.top + box.height / 2);
  };
  const hide = () => {
    pointer.remove();
    tip.hidden = true;
    at = -1;
  };
  group.addEventListener("pointermove", (event) => {
    const i = columns.indexOf(event.target);
    if (i >= 0) show(i, event.clientY);
  });
  group.addEventListener("pointerleave", hide);
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show(Math.min(Math.max(at + step, 0), columns.length - 1));
  });
}

// Where the reader is, in the list of sections.
const links = new Map(all(".links a").map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries)
      links.get(target.id)?.classList.toggle("here", isIntersecting);
  },
  { rootMargin: "-15% 0px -80% 0px" },
);
all("main > section").forEach((section) => watch.observe(section));
