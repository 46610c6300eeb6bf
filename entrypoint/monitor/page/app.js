// The page: live events come in, and each part shows what concerns it.
import { showActions } from "./actions.js";
import { drawCharts } from "./charts.js";
import { showDataset } from "./dataset.js";
import { byId } from "./dom.js";
import { showFiles, showLog, showPlan, showStatus } from "./parts.js";
import { showSamples } from "./samples.js";
import { Series } from "./series.js";

const AWAY_MS = 4000; // without an answer, until the page says so
const series = new Series();
let status = { phase: "connecting", triggers: [], step: 0, total: 0, actions: [] };
let files = { loras: [], files: [] };
let awaySince = null;

// The address with the token was opened although the cookie is here already.
if (location.hash && !byId(location.hash.slice(1))) {
  history.replaceState(null, "", location.pathname + location.search);
}

const on = {
  status(found) {
    status = found;
    showStatus(status, series);
    showActions(status.actions, status.queued);
  },
  history(found) {
    series.begin(found);
    numbers();
  },
  rows(found) {
    series.add(found);
    numbers();
  },
  samples: showSamples,
  checkpoints(found) {
    files = found;
    showFiles(files, series, status);
  },
  plan: showPlan,
  dataset: showDataset,
  log: showLog,
};

let isDue = false;

// At most one drawing a frame, and none while the page is not seen.
function numbers() {
  if (isDue) {
    return;
  }
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    drawCharts(series);
    showFiles(files, series, status);
    showStatus(status, series);
  });
}

function connect() {
  const events = new EventSource("events");
  for (const [name, show] of Object.entries(on)) {
    events.addEventListener(name, (event) => show(JSON.parse(event.data)));
  }
  events.addEventListener("open", () => {
    awaySince = null;
    byId("connection").textContent = "";
  });
  events.addEventListener("error", () => {
    awaySince ??= Date.now();
    if (events.readyState === EventSource.CLOSED) { // refused, not cut off
      events.close();
      retry();
    }
  });
}

async function retry() {
  try {
    const answer = await fetch("health");
    if (answer.status === 401) {
      location.reload(); // another token: the door
      return;
    }
  } catch {
    // It does not answer; that is shown below.
  }
  setTimeout(connect, 3000);
}

setInterval(() => {
  if (awaySince !== null && Date.now() - awaySince > AWAY_MS) {
    byId("connection").textContent = "The server does not answer: the job may have ended, as its log says. Trying again…";
  }
}, 1000);

connect();
