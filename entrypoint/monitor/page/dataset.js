// The dataset as it is trained: each image with its crop, its captions and their tokens, and what was skipped.
import { byId, count, element } from "./dom.js";

let summary = null;
let wanted = false;
let loaded = 0;

export function showDataset(found) {
  const isNew = JSON.stringify(found) !== JSON.stringify(summary);
  summary = found;
  if (!found.images || !isNew) {
    return;
  }
  loaded = 0;
  const skipped = found.list.map(([name, reason]) => element("li", {}, `${name}: ${reason}`));
  const list = element("ul", { class: "pictures", id: "pictures" });
  byId("images").replaceChildren(
    element("p", {}, `${count(found.images)} images are trained on, ${count(found.skipped)} are skipped. Darker: what the crop leaves out.`),
    skipped.length ? element("details", {}, element("summary", {}, `Skipped (${count(found.skipped)})`), element("ul", { class: "odd" }, ...skipped)) : "",
    list,
    element("button", { type: "button", id: "more", hidden: true, onclick: () => load() }, "Show more images"),
  );
  if (wanted) {
    load();
  }
}

// Nothing is decoded for somebody who does not look.
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting) && !wanted) {
    wanted = true;
    if (summary?.images) {
      load();
    }
  }
}).observe(byId("dataset"));

async function load() {
  const answer = await fetch(`images?first=${loaded}`);
  if (!answer.ok) {
    return;
  }
  const page = await answer.json();
  if (page.first !== loaded) { // asked twice
    return;
  }
  loaded += page.rows.length;
  byId("pictures").append(...page.rows.map(item));
  byId("more").hidden = loaded >= page.total;
}

function item(row) {
  const [width, height] = row.size;
  const seen = { src: `picture/${row.number}`, alt: row.name, loading: "lazy", width: 110, height: Math.max(1, Math.round((110 * height) / width)) };
  const picture = row.here ? element("img", seen) : element("span", { class: "quiet" }, "not on this machine");
  const notes = [];
  if (row.held_out) notes.push("held out for validation");
  if (row.regularisation) notes.push("regularisation image");
  if (row.mask) notes.push("with mask");
  if (row.views > 1) notes.push(`${row.views} views`);
  if (row.captioned_by) notes.push(`caption by ${row.captioned_by}`);
  const where = row.bucket ? `${width}×${height}, trained at ${row.bucket[0]}×${row.bucket[1]}` : `${width}×${height}, not used`;
  const captions = row.captions.map((text, i) => caption(text, row.tokens?.[i]));
  const rest = captions.slice(1);
  return element("li", {}, picture, element("div", {},
    element("p", {}, element("strong", {}, row.name)),
    element("p", { class: "quiet" }, [where, ...notes].join(", ")),
    captions[0] || element("p", { class: "odd" }, "no caption"),
    rest.length ? element("details", {}, element("summary", {}, rest.length === 1 ? "1 more variant" : `${rest.length} more variants`), ...rest) : "",
  ));
}

function caption(text, tokens) {
  if (tokens === undefined) {
    return element("p", {}, text);
  }
  const isCut = summary.limit && tokens > summary.limit;
  const said = isCut ? `${tokens} tokens, cut at ${summary.limit}` : `${tokens} tokens`;
  return element("p", {}, text, " ", element("span", { class: isCut ? "odd" : "quiet" }, `(${said})`));
}
