"use strict";

// ---- Values under the pointer: a chart's curves hold all that is shown, as whole numbers on the plot's scale.
const MOST_ROWS = 12;

function pointsOf(path) {
  const numbers = path.getAttribute("d").match(/-?\d+/g).map(Number);
  const points = [];
  let across = 0, down = 0; // the first point is given, each other one relative to the one before
  for (let i = 0; i < numbers.length; i += 2) points.push([across += numbers[i], down += numbers[i + 1]]);
  return points;
}

function nearest(points, across) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < across) low = middle + 1;
    else high = middle;
  }
  return low && across - points[low - 1][0] < points[low][0] - across ? points[low - 1] : points[low];
}

function onAxis(ends, share) {
  const [low, high] = ends.split(" ").map(Number);
  return low + share * (high - low);
}

function valueAt(chart, down, height) { // no more digits than the curve's coordinates hold
  const value = onAxis(chart.dataset.y, 1 - down / height);
  if ("log" in chart.dataset) return Number((10 ** value).toPrecision(4));
  const [low, high] = chart.dataset.y.split(" ").map(Number);
  const decimals = Math.floor(Math.log10(height / (high - low)));
  return Number(Number(value.toFixed(Math.min(100, Math.max(0, decimals)))).toPrecision(4));
}

function valuesAt(chart, pointer) {
  const [width, height] = chart.dataset.size.split(" ").map(Number);
  const found = [];
  for (const path of chart.querySelectorAll("g .curve:not(.dots)")) {
    if (getComputedStyle(path).display === "none") continue; // its run is hidden
    path.points ??= pointsOf(path);
    const [across, down] = nearest(path.points, pointer.x);
    found.push({
      run: path.getAttribute("class").match(/\d+/)[0],
      name: path.dataset.name,
      across,
      distance: Math.abs(down - pointer.y),
      step: Math.round(onAxis(chart.dataset.x, across / width)),
      value: valueAt(chart, down, height),
    });
  }
  return found.sort((a, b) => a.distance - b.distance);
}

function valuesTable(found, step) {
  const table = document.createElement("table");
  table.createCaption().textContent = `step ${step.toLocaleString("en")}`;
  const several = new Set(found.map((one) => one.name)).size > 1;
  for (const one of found.slice(0, MOST_ROWS)) {
    const label = document.getElementById(`show${one.run}`).parentElement;
    const row = table.insertRow();
    row.insertCell().append(label.querySelector(".swatch").cloneNode(), label.textContent);
    if (several) row.insertCell().textContent = one.name;
    row.insertCell().textContent = one.value + (one.step === step ? "" : ` at ${one.step.toLocaleString("en")}`);
  }
  return table;
}

function hideValues() {
  for (const old of document.querySelectorAll(".values, .now")) old.remove();
}

function showValues(chart, event) {
  hideValues();
  const plot = chart.querySelector("g");
  const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
  const found = valuesAt(chart, pointer);
  if (!found.length) return;
  const off = (one) => Math.abs(one.across - pointer.x);
  const at = found.reduce((a, b) => (off(b) < off(a) ? b : a));
  const line = document.createElementNS(chart.namespaceURI, "path");
  line.setAttribute("class", "now");
  line.setAttribute("d", `M${at.across} 0V${chart.dataset.size.split(" ")[1]}`);
  (plot.querySelector("svg") ?? plot).prepend(line); // of a chart that is zoomed, see zoom.js
  const box = document.createElement("div");
  box.className = "values";
  box.append(valuesTable(found, at.step));
  const { left, width } = chart.getBoundingClientRect();
  box.style[event.clientX - left > width / 2 ? "left" : "right"] = ".6rem"; // where the pointer is not
  chart.parentElement.append(box);
}

document.addEventListener("pointermove", (event) => {
  const chart = event.target.closest?.("figure > svg");
  if (chart) showValues(chart, event);
  else hideValues();
});
document.addEventListener("pointerleave", hideValues);
