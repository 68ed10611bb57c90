
// ---- Zoom: a stage's charts show some of the steps, drawn from what they were at first. Curves stay whole numbers on
// the plot's scale, as charts.py draws them, so values are shown under the pointer as before.
const LETTER = 6.2; // width of a letter of a label
const DOT = 2500; // half of a dot, on the plot's scale
const LEAST_STEPS = 2; // that are shown
const LEAST_DRAG = 6; // pixels
const zooms = new Map(); // id of a stage's section -> [first, last] step
const originals = new WeakMap(); // chart -> what it was at first
let drag = null; // {chart, from, to}, in steps

const endsOf = (text) => text.split(" ").map(Number);

function pathOf(points) { // the inverse of pointsOf, which charts.py's `path` is too
  let [across, down] = points[0], data = `M${across} ${down}`;
  points.slice(1).forEach(([nextAcross, nextDown], n) => {
    data += `${n ? " " : "l"}${nextAcross - across} ${nextDown - down}`;
    [across, down] = [nextAcross, nextDown];
  });
  return data;
}

function heightsOf(points, left, right) { // of lines as far as they are between two places
  const found = points.filter(([across]) => across >= left && across <= right).map(([, down]) => down);
  for (let n = 1; n < points.length; n++) {
    const [[x0, y0], [x1, y1]] = [points[n - 1], points[n]];
    for (const x of [left, right]) if ((x0 - x) * (x1 - x) < 0) found.push(y0 + ((x - x0) / (x1 - x0)) * (y1 - y0));
  }
  return found;
}

function roundValues(low, high, whole) { // multiples of 1, 2 or 5 times a power of ten, about five
  const wanted = (high - low) / 5, power = 10 ** Math.floor(Math.log10(wanted));
  const unit = Math.max(whole ? 1 : 0, power * [1, 2, 5, 10].find((m) => m * power >= wanted * (1 - 1e-9)));
  const first = Math.ceil(low / unit - 1e-9), count = Math.floor(high / unit + 1e-9) - first + 1;
  const length = Math.min(12, Math.max(0, count));
  return Array.from({ length }, (_, n) => Number(((first + n) * unit).toPrecision(12)));
}

function ticksOf(low, high, log) { // [place on the axis, label]; log: the ends are logarithms
  const compact = { notation: "compact", maximumSignificantDigits: 9 };
  const label = (value) => {
    if (value && Math.abs(value) < 1e-3) return value.toExponential();
    return Math.abs(value) < 1e4 ? String(value) : value.toLocaleString("en", compact).replace("K", "k");
  };
  if (!log) return roundValues(low, high).map((value) => [value, label(value)]);
  if (high - low >= 2) return roundValues(low, high, true).map((power) => [power, label(Number(`1e${power}`))]);
  return roundValues(10 ** low, 10 ** high).map((value) => [Math.log10(value), label(value)]);
}

function zoomed(original, from, to) { // a chart of these steps; its values' axis fits the runs that are not hidden
  const chart = original.cloneNode(true), plot = chart.querySelector("g");
  const [width, height] = endsOf(chart.dataset.size), [first, last] = endsOf(chart.dataset.x);
  const [oldLeft, above, scale] = plot.getAttribute("transform").match(/[\d.]+/g).map(Number);
  const [left, right] = [from, to].map((step) => ((step - first) / (last - first)) * width);

  const isLine = (path) => !/dots|marks/.test(path.getAttribute("class"));
  const lines = new Map([...plot.querySelectorAll("path")].filter(isLine).map((path) => [path, pointsOf(path)]));
  const isShown = (path) => document.getElementById(`show${path.getAttribute("class").match(/\d+/)[0]}`)?.checked;
  const downs = [...lines].flatMap(([path, points]) => (isShown(path) ? heightsOf(points, left, right) : []));
  let [top, bottom] = downs.length ? [height, 0] : [0, height];
  for (const down of downs) [top, bottom] = [Math.min(top, down), Math.max(bottom, down)];
  const margin = Math.max(0.04 * (bottom - top), height / 2000);
  [top, bottom] = [top - margin, bottom + margin];

  const high = onAxis(chart.dataset.y, 1 - top / height), low = onAxis(chart.dataset.y, 1 - bottom / height);
  const rows = ticksOf(low, high, "log" in chart.dataset);
  const newLeft = 12 + LETTER * Math.max(0, ...rows.map(([, label]) => label.length));
  const newWidth = Math.round(width + (oldLeft - newLeft) / scale);
  const move = ([across, down]) => [
    Math.round(((across - left) / (right - left)) * newWidth), Math.round(((down - top) / (bottom - top)) * height)];

  for (const path of plot.querySelectorAll("path")) {
    const points = lines.get(path)?.map(move);
    if (points) path.setAttribute("d", pathOf(points) + (path.classList.contains("interval") ? "z" : ""));
    else { // dots and marks: shapes that begin at a point of the curve
      const shapes = path.getAttribute("d").split(/(?=M)/).map((shape) => shape.match(/M(-?\d+) (-?\d+)(.*)/));
      const kept = shapes.filter((shape) => shape[1] >= left && shape[1] <= right);
      path.setAttribute("d", kept.map((shape) => `M${move([shape[1], shape[2]]).join(" ")}${shape[3]}`).join(""));
    }
  }
  for (const old of chart.querySelectorAll(":scope > .grid, :scope > text:not(.unit)")) old.remove();
  const draw = (kind, attributes, text = "") => {
    const element = document.createElementNS(chart.namespaceURI, kind);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    element.textContent = text;
    plot.before(element);
    return element;
  };
  const end = newLeft + newWidth * scale, base = above + height * scale;
  for (const [value, label] of rows) {
    const y = base - ((value - low) / (high - low)) * height * scale;
    draw("path", { class: "grid", d: `M${newLeft} ${y}H${end}` });
    draw("text", { x: newLeft - 5, y: y + 4, "text-anchor": "end" }, label);
  }
  for (const step of roundValues(from, to, true)) {
    const x = newLeft + ((step - from) / (to - from)) * newWidth * scale;
    draw("path", { class: "grid", d: `M${x} ${above}V${base}` });
    draw("text", { x, y: base + 15, "text-anchor": "middle" }, String(step));
  }
  // Curves go on beyond what is shown, and an inner svg hides that, except for half a dot at the edge.
  const [x, y, across, down] = [-DOT, -DOT, newWidth + 2 * DOT, height + 2 * DOT];
  const inner = draw("svg", { x, y, width: across, height: down, viewBox: `${x} ${y} ${across} ${down}` });
  inner.append(...plot.childNodes);
  plot.append(inner);
  plot.setAttribute("transform", `translate(${newLeft} ${above}) scale(${scale})`);
  Object.assign(chart.dataset, { x: `${from} ${to}`, y: `${low} ${high}`, size: `${newWidth} ${height}` });
  return chart;
}

function redraw(section) {
  for (const chart of section.querySelectorAll("figure > svg")) {
    const original = originals.get(chart) ?? chart, focused = chart === document.activeElement;
    const fresh = zooms.has(section.id) ? zoomed(original, ...zooms.get(section.id)) : original;
    originals.set(fresh, original);
    if (fresh === chart) continue;
    chart.before(fresh); // what had the focus passes it on, and with it whether that is shown
    if (focused) fresh.focus({ preventScroll: true });
    chart.remove();
  }
}

function zoom(chart, from, to) { // where nothing is left to be hidden, all steps are shown
  const section = chart.closest("section"), [first, last] = endsOf((originals.get(chart) ?? chart).dataset.x);
  const span = Math.max(LEAST_STEPS, to - from);
  from = Math.max(first, Math.min(from, last - span));
  if (span >= last - first) zooms.delete(section.id);
  else zooms.set(section.id, [from, from + span]);
  hideValues();
  redraw(section);
}

function zoomAgain() { // after other runs are shown, or the page was replaced
  for (const id of zooms.keys()) {
    const section = document.getElementById(id);
    if (section) redraw(section);
  }
}

function stepAt(chart, event) {
  const plot = chart.querySelector("g"), width = endsOf(chart.dataset.size)[0];
  const across = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse()).x;
  return onAxis(chart.dataset.x, Math.min(1, Math.max(0, across / width)));
}

document.addEventListener("pointerdown", (event) => {
  const chart = event.target.closest?.("figure > svg");
  if (!chart || event.pointerType === "touch" || event.button) return;
  drag = { chart, at: event.clientX, from: stepAt(chart, event), to: stepAt(chart, event) };
});
document.addEventListener("pointermove", (event) => {
  if (!drag) return;
  drag.to = stepAt(drag.chart, event);
  drag.far ||= Math.abs(event.clientX - drag.at) >= LEAST_DRAG;
  const plot = drag.chart.querySelector("g"), [width, height] = endsOf(drag.chart.dataset.size);
  const [first, last] = endsOf(drag.chart.dataset.x);
  const [left, right] = [drag.from, drag.to].map((step) => ((step - first) / (last - first)) * width);
  let chosen = plot.querySelector(".chosen");
  if (!chosen) {
    chosen = document.createElementNS(plot.namespaceURI, "path");
    chosen.setAttribute("class", "chosen");
    plot.prepend(chosen);
  }
  chosen.setAttribute("d", `M${left} 0H${right}V${height}H${left}z`);
});
function endDrag(isChosen) {
  if (!drag) return;
  const { chart, from, to, far } = drag;
  drag = null;
  chart.querySelector(".chosen")?.remove();
  if (isChosen && far) zoom(chart, Math.min(from, to), Math.max(from, to));
}
document.addEventListener("pointerup", () => endDrag(true));
document.addEventListener("pointercancel", () => endDrag(false));
document.addEventListener("dblclick", (event) => {
  const chart = event.target.closest?.("figure > svg");
  if (chart) zoom(chart, -Infinity, Infinity);
});
document.addEventListener("keydown", (event) => {
  const chart = event.target.closest?.("figure > svg");
  if (!chart || event.ctrlKey || event.metaKey || event.altKey) return;
  const [from, to] = endsOf(chart.dataset.x), middle = (from + to) / 2, span = to - from;
  const [low, high] = {
    "+": [middle - span / 4, middle + span / 4], "=": [middle - span / 4, middle + span / 4],
    "-": [middle - span, middle + span], "−": [middle - span, middle + span],
    ArrowLeft: [from - span / 4, to - span / 4], ArrowRight: [from + span / 4, to + span / 4],
    Escape: [-Infinity, Infinity], "0": [-Infinity, Infinity],
  }[event.key] ?? [];
  if (low === undefined) return;
  event.preventDefault();
  endDrag(false);
  zoom(chart, low, high);
});
document.addEventListener("change", zoomAgain);

