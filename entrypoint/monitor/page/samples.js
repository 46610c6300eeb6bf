// Samples as a grid of prompts and columns, one in full size, and two columns under a slider. A column is a step, or a
// strength of the LoRA of one.
import { byId, count, element } from "./dom.js";

const MOST_COLUMNS = 12; // steps of the grid; all can be compared
const AFTER_STEPS = 1e12;
let shown = { prompts: [], images: [] };
let chosen = { prompt: null, before: null, after: null };

export function showSamples(found) {
  shown = found;
  if (!found.images.length) {
    return;
  }
  byId("grid").replaceChildren(grid());
  compare();
}

// The number of an image's column: that of its step, and behind the steps those with other strengths.
function keyOf([step, , , , strength]) {
  return strength === 1 ? step : AFTER_STEPS + 1000 * (step + strength / 100);
}

// A sample of each column, in order.
function columns() {
  const found = new Map();
  for (const image of shown.images) {
    found.set(keyOf(image), image);
  }
  return new Map([...found].sort(([a], [b]) => a - b));
}

// Strengths are mostly those of the last step, which then need not be named.
function nameOf(key) {
  const [step, , , , strength] = columns().get(key);
  if (strength === 1) {
    return `step ${count(step)}`;
  }
  const name = strength === 0 ? "strength 0: base" : `strength ${strength}`;
  return step === Math.max(...shown.images.map((image) => image[0])) ? name : `step ${count(step)}, ${name}`;
}

function allColumns() {
  return [...columns().keys()];
}

// Of the steps the first, the last, and evenly between them; then every strength.
function shownColumns(all) {
  const steps = all.filter((key) => key < AFTER_STEPS);
  return [...fewer(steps), ...all.slice(steps.length)];
}

function fewer(all) {
  if (all.length <= MOST_COLUMNS) {
    return all;
  }
  const found = new Set();
  for (let i = 0; i < MOST_COLUMNS; i += 1) {
    found.add(all[Math.round((i * (all.length - 1)) / (MOST_COLUMNS - 1))]);
  }
  return [...found];
}

function imageOf(key, prompt) {
  return shown.images.find((image) => keyOf(image) === key && image[1] === prompt);
}

function address(image, folder) {
  return `${folder}/${image[2]}?v=${image[3]}`;
}

function about(prompt, key) {
  return `${prompt.text || `prompt ${prompt.number}`}, ${nameOf(key)}`;
}

function grid() {
  const all = allColumns();
  const columnsShown = shownColumns(all);
  const head = element("tr", {}, element("td"), ...columnsShown.map((key) => element("th", { scope: "col" }, nameOf(key))));
  const rows = shown.prompts.map((prompt) => {
    const cells = columnsShown.map((key) => {
      const image = imageOf(key, prompt.number);
      return element("td", {}, image ? small(prompt, key, image) : "");
    });
    const title = element("th", { scope: "row" }, element("span", { title: prompt.text }, prompt.text || `prompt ${prompt.number}`));
    return element("tr", {}, title, ...cells);
  });
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  const note = all.length > columnsShown.length ? element("p", { class: "quiet" }, `${columnsShown.length} of ${all.length} columns. All can be compared above.`) : "";
  return element("div", {}, element("div", { class: "samples", tabindex: 0, "aria-label": "Samples by prompt, step and strength" }, table), note);
}

function small(prompt, key, image) {
  const [width, height] = prompt.size;
  const picture = element("img", { src: address(image, "small"), alt: about(prompt, key), loading: "lazy", width, height });
  return element("button", { type: "button", onclick: () => open(prompt, key) }, picture);
}

// ---- one sample in full size

function open(prompt, key) {
  const viewer = byId("viewer");
  const own = allColumns().filter((other) => imageOf(other, prompt.number));
  const at = own.indexOf(key);
  const image = imageOf(key, prompt.number);
  const go = (other) => (other === undefined ? null : () => open(prompt, other));
  viewer.replaceChildren(
    element("img", { src: address(image, "sample"), alt: about(prompt, key) }),
    element("p", {}, prompt.text),
    element("p", { class: "quiet" }, `${capital(nameOf(key))}. ${prompt.settings}`),
    element("div", { class: "row" },
      button("Earlier", go(own[at - 1])),
      button("Later", go(own[at + 1])),
      element("a", { href: address(image, "sample"), download: image[2] }, "Download"),
      button("Close", () => viewer.close()),
    ),
  );
  viewer.onkeydown = (event) => {
    const to = { ArrowLeft: own[at - 1], ArrowRight: own[at + 1] }[event.key];
    if (to !== undefined) {
      open(prompt, to);
    }
  };
  if (!viewer.open) {
    viewer.showModal();
  }
  viewer.focus(); // the arrow keys go on from here
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function button(text, onclick) {
  return element("button", { type: "button", disabled: !onclick, ...(onclick ? { onclick } : {}) }, text);
}

// ---- two columns under a slider

function compare() {
  const all = allColumns();
  const place = byId("compare");
  place.hidden = all.length < 2;
  if (all.length < 2) {
    return;
  }
  const isNew = chosen.prompt === null || !shown.prompts.some((prompt) => prompt.number === chosen.prompt);
  if (isNew) {
    chosen = { prompt: shown.prompts[0].number, before: all[0], after: null };
  }
  const focused = document.activeElement?.id;
  place.replaceChildren(comparison(all));
  if (focused?.startsWith("compare-")) {
    byId(focused)?.focus();
  }
}

function comparison(all) {
  const newest = all.filter((key) => key < AFTER_STEPS).at(-1) ?? all.at(-1);
  const after = chosen.after ?? newest; // unless another was chosen
  const prompt = shown.prompts.find((found) => found.number === chosen.prompt);
  const own = all.filter((key) => imageOf(key, prompt.number));
  const left = own.includes(chosen.before) ? chosen.before : own[0];
  const right = own.includes(after) ? after : own.at(-1);
  const names = shown.prompts.map((found) => [found.number, found.text || `prompt ${found.number}`]);
  const choices = own.map((key) => [key, nameOf(key)]);
  return element("div", { class: "compare" },
    element("h3", {}, all.at(-1) < AFTER_STEPS ? "Compare two steps" : "Compare two steps or strengths"),
    element("div", { class: "row" },
      choice("compare-prompt", "Prompt", names, chosen.prompt, (value) => { chosen.prompt = value; }),
      choice("compare-before", "Left", choices, left, (value) => { chosen.before = value; }),
      choice("compare-after", "Right", choices, right, (value) => { chosen.after = value === newest ? null : value; }),
    ),
    under(prompt, left, right),
  );
}

function choice(id, name, options, value, chose) {
  const select = element("select", { id }, ...options.map(([key, text]) => element("option", { value: key, selected: key === value }, text.slice(0, 60))));
  select.addEventListener("change", () => {
    chose(Number(select.value));
    compare();
  });
  return element("label", { for: id }, name, select);
}

let share = 50; // percent of the left image

function under(prompt, left, right) {
  const images = [left, right].map((key) => element("img", { src: address(imageOf(key, prompt.number), "sample"), alt: about(prompt, key), width: prompt.size[0], height: prompt.size[1] }));
  const divider = element("span", { class: "divider" });
  const slider = element("input", { id: "compare-slider", type: "range", min: 0, max: 100, value: share, "aria-label": "How much of the left image is seen" });
  const move = () => {
    share = Number(slider.value);
    images[1].style.clipPath = `inset(0 0 0 ${share}%)`;
    divider.style.left = `${share}%`;
    slider.setAttribute("aria-valuetext", `${share} % ${nameOf(left)}, the rest ${nameOf(right)}`);
  };
  slider.addEventListener("input", move);
  const box = element("div", { class: "two" }, ...images, divider,
    element("span", { class: "side before" }, nameOf(left)), element("span", { class: "side after" }, nameOf(right)));
  box.addEventListener("pointermove", (event) => {
    if (event.buttons || event.pointerType === "mouse") {
      const edge = box.getBoundingClientRect();
      slider.value = ((event.clientX - edge.left) / edge.width) * 100;
      move();
    }
  });
  move();
  return element("div", {}, box, slider, element("p", { class: "quiet" }, `${prompt.text} (${prompt.settings})`));
}
