// A line chart over steps: drawn with attributes and classes alone, since the page allows no inline style.

import { element, shape } from "/run/parts.js";

const LEFT = 52, RIGHT = 14, TOP = 10, BOTTOM = 24, POINTS = 1200;

/**
 * Draw curves into a place.
 * series: [{label, kind (class of its colour), dashed, points: [[step, value]]}]; tell: value -> text.
 */
export function chart(place, title, series, tell, height = 180) {
  const drawn = series.filter((one) => one.points.length);
  const width = Math.max(240, Math.floor(place.clientWidth));
  if (!drawn.length) {
    place.replaceChildren(element("p", { class: "nothing" }, "Nothing reported yet."));
    return;
  }
  const steps = drawn.flatMap((one) => [one.points[0][0], one.points.at(-1)[0]]);
  const [low, high, marks] = range(drawn);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - ((value - low) / (high - low || 1)) * (height - TOP - BOTTOM);
  const readout = place.querySelector(".readout") ?? element("p", { class: "readout" });
  const cursor = shape("g");
  const plot = shape("svg", {
    class: "plot", viewBox: `0 0 ${width} ${height}`, width, height, tabindex: "0", role: "img",
    "aria-label": `${title}: ${drawn.map((one) => `${one.label} ${tell(one.points.at(-1)[1])}`).join(", ")}. Arrow keys read it.`,
  },
  ...marks.flatMap((mark) => [
    shape("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y(mark), y2: y(mark) }),
    shape("text", { x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end" }, short(mark)),
  ]),
  shape("text", { x: LEFT, y: height - 6 }, String(first)),
  ...(last > first ? [shape("text", { x: width - RIGHT, y: height - 6, "text-anchor": "end" }, String(last))] : []),
  ...drawn.toReversed().flatMap((one) => lines(one, x, y)), // the first one above the others
  cursor);
  read(plot, cursor, readout, drawn, { x, width, height, first, last, tell });
  const had = document.activeElement?.closest("svg")?.parentElement === place;
  place.replaceChildren(legend(drawn), plot, readout);
  if (had) plot.focus();
}

function lines(one, x, y) {
  const kept = thinned(one.points);
  if (kept.length === 1) {
    return [shape("circle", { class: `dot ${one.kind}`, cx: x(kept[0][0]), cy: y(kept[0][1]), r: 3 })];
  }
  const d = kept.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return [shape("path", { class: `line ${one.kind}${one.dashed ? " dashed" : ""}`, d })];
}

/** The lowest and the highest of each stretch, so that no peak is lost. */
function thinned(points) {
  if (points.length <= POINTS) return points;
  const kept = [points[0]];
  const size = Math.ceil(points.length / (POINTS / 2));
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size);
    const ends = [part.reduce((a, b) => (b[1] < a[1] ? b : a)), part.reduce((a, b) => (b[1] > a[1] ? b : a))];
    kept.push(...ends.sort((a, b) => a[0] - b[0]));
  }
  return [...kept, points.at(-1)];
}

function range(drawn) {
  let low = Infinity, high = -Infinity;
  for (const { points } of drawn) {
    for (const [, value] of points) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const raw = (high - low) / 3, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const marks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) marks.push(i * step);
  return [low, high, marks];
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(3));
}

function legend(drawn) {
  return element("ul", { class: "legend" }, ...drawn.map((one) => element("li", {},
    shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" },
      shape("line", { class: one.kind, x1: 0, x2: 26, y1: 5, y2: 5, "stroke-dasharray": one.dashed ? "5 3" : null })),
    one.label)));
}

/** Show the values at a step where the pointer is, or the arrow keys have gone. */
function read(plot, cursor, readout, drawn, { x, width, height, first, last, tell }) {
  const longest = drawn.reduce((a, b) => (b.points.length > a.points.length ? b : a)).points;
  let at = longest.length;
  const show = (step) => {
    cursor.replaceChildren(shape("line", { class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: height - BOTTOM }));
    const told = drawn.map((one) => `${one.label} ${tell(nearest(one.points, step)[1])}`);
    readout.textContent = `step ${step}: ${told.join(", ")}`;
  };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * width - LEFT) / (width - LEFT - RIGHT);
    show(nearest(longest, first + share * (last - first))[0]);
  });
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(longest.length - 1, at + move));
    readout.setAttribute("aria-live", "polite");
    show(longest[at][0]);
  });
}

function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}
