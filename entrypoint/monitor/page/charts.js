// Curves as SVG. Each chart can be read with the pointer, and with the arrow keys once it has the focus.
import { byId, count, drawing, element, figure } from "./dom.js";
import { smoothed } from "./series.js";

const WIDTH = 480;
const HEIGHT = 200;
const LEFT = 54;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;
const SPIKES = 0.005; // share of the points at each end that may lie outside: one spike must not flatten a curve
const CHARTS = [
  { id: "loss", title: "Loss", columns: ["loss"], smooth: true, validation: true },
  { id: "noise", title: "Loss by noise level, smoothed", bands: /^loss_noise_(\d+)_(\d+)$/ },
  { id: "lr", title: "Learning rate", columns: ["lr"], logarithmic: true },
  { id: "d", title: "Prodigy’s step size d", columns: ["prodigy_d"], logarithmic: true },
  { id: "norm", title: "Gradient norm", columns: ["grad_norm"], smooth: true, logarithmic: true },
  { id: "speed", title: "Images per second", columns: ["images_per_second"] },
  { id: "memory", title: "Most memory, GiB", columns: ["memory_gib"] },
];

let weight = 0.9;
let drawn = null;

export function smoothing() {
  return weight;
}

export function drawCharts(series) {
  drawn = series;
  const place = byId("charts");
  if (!series.columns.step.length) {
    return;
  }
  if (!byId("smoothing")) {
    place.before(control());
    place.replaceChildren();
  }
  for (const chart of CHARTS) {
    drawOne(place, chart, series);
  }
  const note = series.every > 1 ? `Each point is the mean of ${count(series.every)} steps or less.` : "";
  byId("thinned").textContent = note;
}

function control() {
  const slider = element("input", { id: "smoothing", type: "range", min: 0, max: 0.99, step: 0.01, value: weight });
  slider.addEventListener("input", () => {
    weight = Number(slider.value);
    drawCharts(drawn);
  });
  return element("p", {}, element("label", {}, "Smoothing", slider));
}

function linesOf(chart, series) {
  if (chart.bands) {
    return bandsOf(chart, series);
  }
  const points = series.points(chart.columns[0]).filter(([, value]) => !chart.logarithmic || value > 0);
  const lines = [];
  if (chart.smooth) {
    lines.push({ style: "raw", name: "as measured", points });
    lines.push({ style: "smooth", name: "smoothed", points: smoothed(points, weight) });
  } else {
    lines.push({ style: "plain", name: chart.title, points });
  }
  if (chart.validation && series.validation.length) {
    lines.push({ style: "held", name: "validation", points: series.validation, dots: true });
  }
  return lines;
}

// A curve for each band that has had an image; a step of few images is in few bands.
function bandsOf(chart, series) {
  const lines = [];
  for (const name of Object.keys(series.columns)) {
    const match = chart.bands.exec(name);
    const points = match ? series.points(name) : [];
    if (points.length) {
      lines.push({ style: `band${lines.length}`, name: `${match[1]}–${match[2]} % noise`, points: smoothed(points, weight) });
    }
  }
  return lines;
}

function drawOne(place, chart, series) {
  const lines = linesOf(chart, series);
  let holder = byId(`chart-${chart.id}`);
  if (!lines.length || !lines[0].points.length) {
    holder?.remove();
    return;
  }
  if (!holder) {
    holder = emptyChart(chart);
    place.append(holder);
  }
  const frame = frameOf(chart, lines);
  holder.lines = lines;
  holder.frame = frame;
  const svg = holder.querySelector("svg");
  svg.replaceChildren(...grid(frame), ...lines.flatMap((line) => curve(line, frame)));
  const last = lines.map((line) => `${line.name} ${figure(line.points.at(-1)[1])}`).join(", ");
  svg.setAttribute("aria-label", `${chart.title}, step ${frame.first} to ${frame.last}. Last: ${last}. Arrow keys read it.`);
  const keys = holder.querySelector(".keys");
  keys.replaceChildren(...(chart.bands || lines.length > 1 ? lines.map((line) => element("span", { class: `key ${line.style}` }, line.name)) : []));
  if (holder.at === undefined) {
    const main = lines[chart.smooth ? 1 : 0].points.at(-1)[1];
    holder.querySelector("output").textContent = chart.bands ? "" : `now ${figure(main)}`;
  } else {
    point(holder, holder.at);
  }
}

function emptyChart(chart) {
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
  const caption = element("figcaption", {}, chart.title, element("output", {}), element("span", { class: "keys" }));
  const holder = element("figure", { class: "chart", id: `chart-${chart.id}` }, caption, svg);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const { first, last } = holder.frame;
    point(holder, first + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (last - first));
  });
  svg.addEventListener("pointerleave", () => leave(holder));
  svg.addEventListener("blur", () => leave(holder));
  svg.addEventListener("keydown", (event) => read(holder, event));
  return holder;
}

function read(holder, event) {
  const points = holder.lines[0].points;
  const now = holder.at === undefined ? points.length - 1 : nearest(points, holder.at);
  const jump = Math.max(1, Math.round(points.length / 50));
  const to = { ArrowLeft: now - jump, ArrowRight: now + jump, Home: 0, End: points.length - 1 }[event.key];
  if (to === undefined) {
    return;
  }
  event.preventDefault();
  point(holder, points[Math.min(points.length - 1, Math.max(0, to))][0]);
}

function leave(holder) {
  holder.at = undefined;
  holder.querySelector(".cursor")?.remove();
}

function point(holder, at) {
  holder.at = at;
  const main = holder.lines[0].points;
  const step = main[nearest(main, at)][0];
  const said = holder.lines.map((line) => {
    const [where, value] = line.points[nearest(line.points, step)];
    const place = line.dots && where !== step ? ` (step ${count(where)})` : "";
    return holder.lines.length > 1 ? `${line.name} ${figure(value)}${place}` : figure(value);
  });
  holder.querySelector("output").textContent = `step ${count(step)}: ${said.join(", ")}`;
  holder.querySelector(".cursor")?.remove();
  const x = across(step, holder.frame);
  holder.querySelector("svg").append(drawing("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
}

function nearest(points, at) {
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < at) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low > 0 && at - points[low - 1][0] < points[low][0] - at ? low - 1 : low;
}

function frameOf(chart, lines) {
  const steps = lines.flatMap((line) => [line.points[0][0], line.points.at(-1)[0]]);
  const scale = chart.logarithmic ? Math.log10 : (value) => value;
  const values = lines.flatMap((line) => line.points.map(([, value]) => scale(value))).sort((a, b) => a - b);
  const cut = Math.floor(values.length * SPIKES);
  let low = values[cut];
  let high = values[values.length - 1 - cut];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  low = low >= 0 && !chart.logarithmic ? Math.max(0, low - room) : low - room;
  high += room;
  const first = Math.min(...steps);
  return { first, last: Math.max(...steps, first + 1), low, high, scale, logarithmic: chart.logarithmic };
}

function across(step, frame) {
  return LEFT + ((step - frame.first) / (frame.last - frame.first)) * (WIDTH - LEFT - RIGHT);
}

function up(value, frame) {
  const share = (frame.scale(value) - frame.low) / (frame.high - frame.low);
  return HEIGHT - BOTTOM - Math.min(1.02, Math.max(-0.02, share)) * (HEIGHT - TOP - BOTTOM);
}

function grid(frame) {
  const parts = [];
  for (let i = 0; i <= 3; i += 1) {
    const value = frame.low + ((frame.high - frame.low) * i) / 3;
    const y = HEIGHT - BOTTOM - (i / 3) * (HEIGHT - TOP - BOTTOM);
    parts.push(drawing("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }));
    const shown = figure(Number((frame.logarithmic ? 10 ** value : value).toPrecision(3)));
    parts.push(drawing("text", { x: LEFT - 5, y: y + 4, "text-anchor": "end" }, shown));
  }
  const anchors = ["start", "middle", "end"];
  for (let i = 0; i <= 2; i += 1) {
    const step = Math.round(frame.first + ((frame.last - frame.first) * i) / 2);
    parts.push(drawing("text", { x: across(step, frame), y: HEIGHT - 6, "text-anchor": anchors[i] }, count(step)));
  }
  return parts;
}

function curve(line, frame) {
  const parts = line.points.map(([step, value], i) => `${i ? "L" : "M"}${across(step, frame).toFixed(1)} ${up(value, frame).toFixed(1)}`);
  const drawnParts = [drawing("path", { class: line.style, d: parts.join("") })];
  if (line.dots || line.points.length === 1) {
    for (const [step, value] of line.points) {
      drawnParts.push(drawing("circle", { class: "held", cx: across(step, frame), cy: up(value, frame), r: 3 }));
    }
  }
  return drawnParts;
}
