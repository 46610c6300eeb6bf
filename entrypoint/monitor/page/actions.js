// What the page asks of the job. Each is asked once more before it is sent.
import { byId } from "./dom.js";

const QUESTIONS = {
  save: "Save a checkpoint after this step?",
  sample: "Draw the samples after this step? Training waits meanwhile.",
  stop: "Stop the job after this step? It saves, and the same command resumes it.",
};
const OF_A_QUEUE = "Stop the queue after this step? This job saves, the jobs after it do not begin, and the same command goes on.";
let isQueued = false;
const DONE = {
  save: "Asked: the job saves after this step.",
  sample: "Asked: the job samples after this step.",
  stop: "Asked: the job saves and ends after this step.",
};

export function showActions(names, queued) {
  isQueued = queued === true;
  const place = byId("actions");
  place.hidden = !names.length;
  for (const button of place.querySelectorAll("button")) {
    button.disabled = !names.includes(button.dataset.action);
  }
}

async function act(name) {
  const said = byId("acted");
  try {
    const answer = await fetch(`action/${name}`, { method: "POST", headers: { "X-Kiln-Page": "1" } });
    if (answer.ok) {
      said.textContent = DONE[name];
    } else if (answer.status === 409) {
      said.textContent = `Not now: ${(await answer.text()).trim()}`;
    } else {
      said.textContent = `The request was refused (${answer.status}).`;
    }
  } catch {
    said.textContent = "The server does not answer.";
  }
}

function ask(name) {
  const question = byId("question");
  byId("question-text").textContent = name === "stop" && isQueued ? OF_A_QUEUE : QUESTIONS[name];
  // Not at "close": that event comes later, when the next question may be open already.
  question.querySelector("form").onsubmit = (event) => {
    if (event.submitter?.value === "yes") {
      act(name);
    }
  };
  question.showModal();
}

for (const button of byId("actions").querySelectorAll("button")) {
  button.addEventListener("click", () => ask(button.dataset.action));
}
