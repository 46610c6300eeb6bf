// The door: the token of the address (behind #) or of the form becomes a cookie, and the page is asked for again.
"use strict";

const refused = document.getElementById("refused");

async function enter(token) {
  refused.hidden = true;
  let answer;
  try {
    answer = await fetch("enter", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token }),
    });
  } catch {
    refuse("The server does not answer.");
    return;
  }
  if (answer.ok) {
    history.replaceState(null, "", location.pathname + location.search);
    location.reload();
  } else if (answer.status === 429) {
    refuse("Too many wrong tokens. Wait a moment, then try again.");
  } else if (answer.status === 403) {
    refuse("The server takes this for a request of another site. Open the page itself, not in another page.");
  } else if (answer.status === 503) {
    refuse("The server has too many connections. Wait a moment, then try again.");
  } else if (answer.status !== 401) {
    refuse(`The server cannot answer (${answer.status}). Wait a moment, then try again.`);
  } else {
    refuse("This is not the token of this job.");
  }
}

function refuse(text) {
  refused.textContent = text;
  refused.hidden = false;
}

document.getElementById("door").addEventListener("submit", (event) => {
  event.preventDefault();
  enter(document.getElementById("token").value);
});

if (location.hash.length > 1) {
  enter(decodeURIComponent(location.hash.slice(1)));
}
