// Samples as a grid of prompts and steps, one in full size, and two steps under a slider.
import { byId, count, element } from "./dom.js";

const MOST_COLUMNS = 12; // of the grid; all steps can be compared
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

function steps() {
  return [...new Set(shown.images.map(([step]) => step))].sort((a, b) => a - b);
}

// The first, the last, and evenly between them.
function columns(all) {
  if (all.length <= MOST_COLUMNS) {
    return all;
  }
  const found = new Set();
  for (let i = 0; i < MOST_COLUMNS; i += 1) {
    found.add(all[Math.round((i * (all.length - 1)) / (MOST_COLUMNS - 1))]);
  }
  return [...found];
}

function imageOf(step, prompt) {
  return shown.images.find(([at, number]) => at === step && number === prompt);
}

function address(image, folder) {
  return `${folder}/${image[2]}?v=${image[3]}`;
}

function about(prompt, step) {
  return `${prompt.text || `prompt ${prompt.number}`}, step ${count(step)}`;
}

function grid() {
  const all = steps();
  const columnsShown = columns(all);
  const head = element("tr", {}, element("td"), ...columnsShown.map((step) => element("th", { scope: "col" }, `step ${count(step)}`)));
  const rows = shown.prompts.map((prompt) => {
    const cells = columnsShown.map((step) => {
      const image = imageOf(step, prompt.number);
      return element("td", {}, image ? small(prompt, step, image) : "");
    });
    const title = element("th", { scope: "row" }, element("span", { title: prompt.text }, prompt.text || `prompt ${prompt.number}`));
    return element("tr", {}, title, ...cells);
  });
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  const note = all.length > columnsShown.length ? element("p", { class: "quiet" }, `${columnsShown.length} of ${all.length} steps. All can be compared above.`) : "";
  return element("div", {}, element("div", { class: "samples", tabindex: 0, "aria-label": "Samples by prompt and step" }, table), note);
}

function small(prompt, step, image) {
  const [width, height] = prompt.size;
  const picture = element("img", { src: address(image, "small"), alt: about(prompt, step), loading: "lazy", width, height });
  return element("button", { type: "button", onclick: () => open(prompt, step) }, picture);
}

// ---- one sample in full size

function open(prompt, step) {
  const viewer = byId("viewer");
  const own = steps().filter((at) => imageOf(at, prompt.number));
  const at = own.indexOf(step);
  const image = imageOf(step, prompt.number);
  const go = (other) => (other === undefined ? null : () => open(prompt, other));
  viewer.replaceChildren(
    element("img", { src: address(image, "sample"), alt: about(prompt, step) }),
    element("p", {}, prompt.text),
    element("p", { class: "quiet" }, `Step ${count(step)}. ${prompt.settings}`),
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

function button(text, onclick) {
  return element("button", { type: "button", disabled: !onclick, ...(onclick ? { onclick } : {}) }, text);
}

// ---- two steps under a slider

function compare() {
  const all = steps();
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
  const after = chosen.after ?? all.at(-1); // the newest one, unless another was chosen
  const prompt = shown.prompts.find((found) => found.number === chosen.prompt);
  const own = all.filter((step) => imageOf(step, prompt.number));
  const left = own.includes(chosen.before) ? chosen.before : own[0];
  const right = own.includes(after) ? after : own.at(-1);
  const names = shown.prompts.map((found) => [found.number, found.text || `prompt ${found.number}`]);
  const numbers = own.map((step) => [step, count(step)]);
  return element("div", { class: "compare" },
    element("h3", {}, "Compare two steps"),
    element("div", { class: "row" },
      choice("compare-prompt", "Prompt", names, chosen.prompt, (value) => { chosen.prompt = value; }),
      choice("compare-before", "Left", numbers, left, (value) => { chosen.before = value; }),
      choice("compare-after", "Right", numbers, right, (value) => { chosen.after = value === all.at(-1) ? null : value; }),
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
  const images = [left, right].map((step) => element("img", { src: address(imageOf(step, prompt.number), "sample"), alt: about(prompt, step), width: prompt.size[0], height: prompt.size[1] }));
  const divider = element("span", { class: "divider" });
  const slider = element("input", { id: "compare-slider", type: "range", min: 0, max: 100, value: share, "aria-label": "How much of the left image is seen" });
  const move = () => {
    share = Number(slider.value);
    images[1].style.clipPath = `inset(0 0 0 ${share}%)`;
    divider.style.left = `${share}%`;
    slider.setAttribute("aria-valuetext", `${share} % step ${left}, the rest step ${right}`);
  };
  slider.addEventListener("input", move);
  const box = element("div", { class: "two" }, ...images, divider,
    element("span", { class: "side before" }, `step ${count(left)}`), element("span", { class: "side after" }, `step ${count(right)}`));
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
