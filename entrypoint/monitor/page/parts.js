// The overview, the files, the plan and the log.
import { byId, count, duration, element, figure, size } from "./dom.js";
import { smoothing } from "./charts.js";

const BADGES = { done: "done", failed: "failed", stopped: "stopped" };

export function showStatus(status, series) {
  byId("name").textContent = status.run || "Kiln monitor";
  document.title = `${title(status)} · ${status.run || "Kiln"}`;
  const phase = byId("phase");
  if (phase.textContent !== status.phase) {
    phase.textContent = status.phase;
  }
  phase.className = `badge ${BADGES[status.phase] || ""}`;
  const words = status.triggers.length ? `, trigger word ${status.triggers.join(", ")}` : "";
  const what = element("p", {}, ...(status.model ? [`A LoRA for ${status.model}${words}. `, ...result(status)] : []));
  if (byId("what").textContent !== what.textContent) { // else a link would lose the focus
    byId("what").replaceChildren(...what.childNodes);
  }
  const progress = byId("progress");
  progress.max = status.total || 1;
  progress.value = Math.min(status.step || 0, status.total || 1);
  byId("steps").textContent = stepsOf(status);
  const message = byId("message");
  message.hidden = !status.message;
  message.textContent = status.message || "";
  byId("facts").replaceChildren(...facts(status, series).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// Where the LoRA is, or will be.
function result(status) {
  if (status.output) {
    return ["It is ", element("a", { href: "#checkpoints" }, status.output), "."];
  }
  return status.run && !status.ended ? [`It will be ${status.run}.safetensors, under Files.`] : [];
}

function title(status) {
  if (status.ended || !status.total) {
    return status.phase;
  }
  return `${Math.floor((100 * status.step) / status.total)} %`;
}

function stepsOf(status) {
  if (!status.total) {
    return status.step ? `step ${count(status.step)}` : "";
  }
  const share = (100 * status.step) / status.total;
  return `step ${count(status.step)} of ${count(status.total)} (${share.toFixed(share < 10 ? 1 : 0)} %)`;
}

function facts(status, series) {
  const found = [];
  const add = (name, value) => {
    if (value !== "" && value !== null && value !== undefined) {
      found.push([name, value]);
    }
  };
  if (status.phase === "captioning" && status.to_caption) {
    add("Captions", `${count(status.captioned)} of ${count(status.to_caption)}`);
    add("Captions left", duration(status.captions_left_s));
  }
  if (status.eta_s && !status.ended) {
    add("Training left", duration(status.eta_s));
    add("Ends about", new Date(Date.now() + status.eta_s * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  }
  add(status.ended ? "This start took" : "This start", status.seconds === undefined ? "" : duration(status.seconds));
  add(status.ended ? "Cost" : "Cost so far", status.cost === undefined ? "" : status.cost.toFixed(2));
  add("Cost at the end, about", status.cost_at_end === undefined ? "" : status.cost_at_end.toFixed(2));
  const worse = status.risen ? `; ${status.risen}: compare the samples` : "";
  add("Loss, smoothed", `${figure(series.lossAt(Infinity, smoothing()))}${worse}`);
  const validation = series.validation.at(-1);
  if (validation) {
    const least = series.validation.reduce((a, b) => (b[1] < a[1] ? b : a));
    add("Validation loss", `${figure(validation[1])}; least ${figure(least[1])} at step ${count(least[0])}`);
  }
  add("Images per second", figure(status.images_per_second));
  add("Epoch", status.epoch ? count(status.epoch) : "");
  add("Skipped steps", status.skipped || "");
  add("Resumes from step", status.ended && status.phase !== "done" && status.saved_step ? count(status.saved_step) : "");
  return found;
}

export function showFiles(found, series, status) {
  if (found.loras.length) {
    const rows = found.loras.map((file) => {
      const step = file.step === null ? status.step || 0 : file.step;
      return { ...file, at: step, loss: series.lossAt(step, smoothing()), validation: series.validationAt(step) };
    });
    const known = rows.map((row) => row.validation).filter((value) => value !== null);
    const least = known.length ? Math.min(...known) : null;
    const body = rows.map((row) => element("tr", { class: least !== null && row.validation === least ? "best" : null },
      element("td", { class: "number" }, row.step === null ? "final" : count(row.at)),
      element("td", {}, element("a", { href: `file/${encodeURIComponent(row.name)}`, download: row.name }, row.name)),
      element("td", { class: "number" }, size(row.bytes)),
      element("td", { class: "number" }, figure(row.loss)),
      element("td", { class: "number" }, figure(row.validation))));
    const head = element("tr", {}, ...["step", "file", "size", "loss, smoothed", "validation loss"].map((name) =>
      element("th", { scope: "col", class: name === "file" ? null : "number" }, name)));
    const note = least === null ? "" : element("p", { class: "quiet" }, "Coloured: the least validation loss.");
    byId("loras").replaceChildren(element("div", { class: "wide" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))), note);
  }
  byId("files").replaceChildren(...found.files.map((name) => element("li", {}, element("a", { href: `file/${encodeURIComponent(name)}`, download: name }, name))));
}

export function showPlan(found) {
  if (!found.reasons.length && !found.settings.length) {
    return;
  }
  const warnings = found.warnings.map((text) => element("li", { class: "odd" }, text));
  const reasons = found.reasons.map((text) => element("li", {}, text));
  const rows = found.settings.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)));
  byId("decided").replaceChildren(
    element("div", { class: "wide" }, element("table", {}, element("tbody", {}, ...rows))),
    element("h3", {}, "What was decided, and why"),
    element("ul", {}, ...warnings, ...reasons),
  );
}

const MOST_TEXT = 400000; // characters of the log that the page keeps

export function showLog(found) {
  const lines = byId("lines");
  const text = found.is_whole ? found.text : lines.textContent + found.text;
  lines.textContent = text.slice(-MOST_TEXT);
  if (byId("follow").checked) {
    lines.scrollTop = lines.scrollHeight;
  }
}
