"use strict";
(() => {
  const make = (name, props = {}, ...children) => {
    const found = Object.assign(document.createElement(name), props);
    found.append(...children);
    return found;
  };

  // Sortable tables: a header's button sorts up, then down, then as it was. What no number is goes to the end.
  const UNITS = { h: 3600, min: 60, s: 1, ms: 1e-3, K: 1e3, M: 1e6, B: 1e9, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };
  const value = (text) => {
    const parts = [...text.replace(/[,\u202f]/g, "").matchAll(/^[±+]?([-−]?[\d.]+(?:e[-+]?\d+)?)\s*([A-Za-z]*)|\s+(\d+) (min|s)\b/g)];
    if (!parts.length) return NaN;
    return parts.reduce((sum, part) => sum + Number((part[1] ?? part[3]).replace("−", "-")) * (UNITS[part[2] || part[4]] ?? 1), 0);
  };
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === x && y === y) return x - y;
    if (x === x || y === y) return 0;
    return a.localeCompare(b, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table.rows")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const name = head.textContent;
      if (!name) return;
      const button = make("button", { type: "button", textContent: name });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") || "none"];
        for (const other of heads) other.removeAttribute("aria-sort");
        if (next !== "none") head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const text = (row) => row.cells[column].textContent.trim();
        const known = rows.filter((row) => text(row));
        const numeric = known.some((row) => value(text(row)) === value(text(row)));
        const last = (row) => !text(row) || (numeric && Number.isNaN(value(text(row))));
        const order = (a, b) => last(a) - last(b) || sign * compare(text(a), text(b));
        body.append(...(next === "none" ? rows : [...rows].sort(order)));
      });
    });
  }

  // Maps: the facts of the cell that is pointed at, touched or reached with the arrow keys; a choice of measures.
  for (const figure of document.querySelectorAll("figure.map")) {
    const { names, ends, cells } = JSON.parse(figure.dataset.map);
    const table = figure.querySelector("table");
    const places = [...table.tBodies[0].rows].map((row) => [...row.cells].slice(1));
    const filled = places.flat().filter((cell) => cell.title);
    const facts = make("dl", { className: "facts" });
    const [low, high] = figure.querySelectorAll(".scale .end");
    const named = figure.querySelector(".scale .name");
    let current = filled[0];

    const show = (cell) => {
      for (const other of table.querySelectorAll(".at")) other.classList.remove("at");
      cell.classList.add("at");
      facts.replaceChildren(...cell.dataset.facts.split("\n").map((line) => {
        const cut = line.indexOf(": ");
        return make("div", {}, make("dt", { textContent: line.slice(0, cut) }), make("dd", { textContent: line.slice(cut + 2) }));
      }));
    };
    const reach = (cell) => {
      current.tabIndex = -1;
      current = cell;
      cell.tabIndex = 0;
      show(cell);
    };

    if (!filled.length) continue;
    table.setAttribute("role", "grid");
    table.setAttribute("aria-readonly", "true");
    filled.forEach((cell, place) => {
      cell.dataset.facts = cell.title;
      cell.removeAttribute("title");
      cell.setAttribute("aria-label", `${cell.textContent}; ${cell.dataset.facts.replaceAll("\n", ", ")}`);
      cell.tabIndex = place ? -1 : 0;
      cell.addEventListener("pointerenter", () => show(cell));
      cell.addEventListener("focus", () => reach(cell));
    });
    table.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] }[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      let y = places.findIndex((row) => row.includes(current));
      let x = places[y].indexOf(current);
      if (Math.abs(step[1]) === Infinity) {
        const row = places[y].filter((cell) => filled.includes(cell));
        return (step[1] < 0 ? row[0] : row[row.length - 1]).focus();
      }
      for (y += step[0], x += step[1]; places[y]?.[x]; y += step[0], x += step[1]) {
        if (filled.includes(places[y][x])) return places[y][x].focus();
      }
    });

    if (names.length > 1) {
      const group = `measure-${[...document.querySelectorAll("figure.map")].indexOf(figure)}`;
      const choice = make("fieldset", { className: "measures" }, make("legend", { textContent: "show" }));
      names.forEach((name, number) => {
        const radio = make("input", { type: "radio", name: group, checked: !number });
        radio.addEventListener("change", () => {
          filled.forEach((cell, place) => {
            const [text, look] = cells[place][number];
            cell.textContent = text;
            cell.classList.remove(...[...cell.classList].filter((one) => one !== "at"));
            cell.classList.add(look);
            cell.setAttribute("aria-label", `${text || "unknown"}; ${cell.dataset.facts.replaceAll("\n", ", ")}`);
          });
          [low.textContent, high.textContent] = ends[number];
          named.textContent = name;
        });
        choice.append(make("label", {}, radio, ` ${name}`));
      });
      figure.prepend(choice);
    }
    figure.querySelector(".scale").after(facts);
    show(current);
  }

  // What scrolls can be reached with the keyboard; what does not scroll is no stop on the way.
  const wide = document.querySelectorAll(".wide");
  const stops = () => {
    for (const one of wide) one.tabIndex = one.scrollWidth > one.clientWidth ? 0 : -1;
  };
  for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", stops);
  addEventListener("resize", stops);
  stops();
})();
