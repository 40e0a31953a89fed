"use strict";
// Tables: a click on a heading sorts by it, a second one the other way round.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (!head) return;
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
    };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (typeof x === typeof y) return typeof x === "number" ? (x - y) * down : x.localeCompare(y) * down;
      return typeof x === "number" ? -1 : 1; // what is not known stays last
    };
    [...body.rows].sort(order).forEach((row) => body.append(row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
  });
}
// Curves: the point nearest to the pointer says whose it is.
for (const svg of document.querySelectorAll(".curves svg")) {
  const lines = [...svg.querySelectorAll("path")].map((path) => {
    const values = path.dataset.values.split(" ").map(Number);
    const places = path.getAttribute("d").slice(1).split("L").map((place) => place.split(" ").map(Number));
    const at = path.dataset.at.split(" ");
    return { path, points: places.map(([x, y], k) => [x, y, values[k], at[k]]) };
  });
  const said = svg.parentElement.querySelector("output"), spot = svg.querySelector(".spot");
  const leave = () => {
    lines.forEach((line) => line.path.classList.remove("on"));
    spot.setAttribute("visibility", "hidden");
    said.textContent = "";
  };
  const move = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = Infinity;
    for (const line of lines) for (const point of line.points) {
      const far = (point[0] - at.x) ** 2 + (point[1] - at.y) ** 2;
      if (far < least) [best, least] = [{ line, point }, far];
    }
    leave();
    if (!best || least > 60 ** 2) return;
    best.line.path.classList.add("on");
    const [x, y, value, where] = best.point;
    const shown = svg.dataset.percent === undefined ? value.toPrecision(4) : `${(100 * value).toFixed(2)}%`;
    spot.setAttribute("cx", x);
    spot.setAttribute("cy", y);
    spot.setAttribute("visibility", "visible");
    said.textContent = `${best.line.path.dataset.name}: ${shown}, ${svg.dataset.x} ${where}`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
}
