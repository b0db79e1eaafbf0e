"use strict";
// The gallery. All that comes from the data is put in as text, never as markup. The state is the address's hash, so
// that a view can be kept as a link: #class=3&reason=label&sort=-p&page=2&size=24
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const gallery = document.getElementById("gallery");
  if (!gallery) { document.body.dataset.ready = "yes"; return; }
  const controls = { class: null, reason: null, sort: null, size: null };
  for (const name of Object.keys(controls)) controls[name] = document.getElementById("by-" + name);
  const called = (label) => (label < data.names.length ? data.names[label] : String(label));
  const all = (labels) => labels.map(called).join(", ") || "none";
  const orders = {
    "p": (a, b) => a.p - b.p || a.rank - b.rank,
    "-p": (a, b) => b.p - a.p || b.rank - a.rank,
    "sure": (a, b) => b.sure - a.sure || a.rank - b.rank,
    "index": (a, b) => a.index - b.index,
    "class": (a, b) => (a.given[0] ?? -1) - (b.given[0] ?? -1) || a.rank - b.rank,
    "suggested": (a, b) => (a.suggested[0] ?? -1) - (b.suggested[0] ?? -1) || a.rank - b.rank,
  };
  data.samples.forEach((sample, rank) => { sample.rank = rank; });

  function make(tag, kind, text) {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function picture(source, kind, text) {
    const image = make("img", kind);
    image.src = source;
    image.alt = text;
    return image;
  }

  function look(sample) {
    const card = sample.card, box = make("div", "look"), title = "sample " + sample.index;
    if (card.kind === "image" && card.src) {
      box.append(picture(card.src, card.rendered ? "rendered" : "thumb", title));
    } else if (card.kind === "audio" && card.src) {
      if (card.picture) box.append(picture(card.picture, "sound", "spectrogram of " + title));
      const player = make("audio");
      player.controls = true;
      player.preload = "none";
      player.src = card.src;
      box.append(player, make("div", "facts", card.note));
    } else if (card.kind === "table") {
      const table = make("table");
      for (const [name, value] of card.rows) {
        const row = make("tr");
        row.append(make("th", "", name), make("td", "", value));
        table.append(row);
      }
      const frame = make("div", "table");
      frame.append(table);
      box.append(frame);
    } else {
      box.append(make("div", card.kind === "fault" ? "text soft" : "text", card.text ?? "cannot be shown"));
    }
    return box;
  }

  function article(sample) {
    const card = make("article", "card");
    Object.assign(card.dataset, { index: sample.index, p: sample.p, reason: sample.reason, given: sample.given.join(" ") });
    const labels = make("div", "labels");
    labels.append("given ", make("b", "given", all(sample.given)));
    if (sample.given.join() !== sample.suggested.join()) {
      labels.append(make("br"), "suggested ", make("b", "suggested", all(sample.suggested)));
      labels.append(" (" + sample.sure.toFixed(2) + ")");
    }
    const facts = make("div", "facts", "p(clean) " + (sample.p < 0.001 ? "< 0.001" : sample.p.toFixed(3)) + " · #" + sample.index + " ");
    facts.append(make("span", "tag", sample.reason));
    card.append(look(sample), labels, facts);
    return card;
  }

  function option(select, value, text) {
    const one = make("option", "", text);
    one.value = value;
    select.append(one);
  }

  function count(values) {
    const counts = new Map();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  }

  const classes = count(data.samples.flatMap((sample) => sample.given));
  for (const label of [...classes.keys()].sort((a, b) => a - b)) {
    option(controls.class, label, called(label) + " (" + classes.get(label) + ")");
  }
  const reasons = count(data.samples.map((sample) => sample.reason));
  for (const reason of data.reasons) {
    if (reasons.has(reason)) option(controls.reason, reason, reason + " (" + reasons.get(reason) + ")");
  }

  function state() {
    const asked = new URLSearchParams(location.hash.slice(1));
    return {
      class: asked.get("class") ?? "", reason: asked.get("reason") ?? "",
      sort: Object.hasOwn(orders, asked.get("sort") ?? "") ? asked.get("sort") : "p",
      size: Math.min(500, Math.max(1, parseInt(asked.get("size"), 10) || 24)),
      page: Math.max(1, parseInt(asked.get("page"), 10) || 1),
    };
  }

  function go(change) {
    const next = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...state(), page: 1, ...change })) if (value !== "") next.set(name, value);
    location.hash = next.toString();
  }

  let page = 1;
  function show() {
    const now = state();
    const found = data.samples.filter((sample) =>
      (now.class === "" || sample.given.includes(Number(now.class))) && (now.reason === "" || sample.reason === now.reason));
    found.sort(orders[now.sort]);
    const pages = Math.max(1, Math.ceil(found.length / now.size));
    page = Math.min(now.page, pages);
    const first = (page - 1) * now.size;
    const cards = found.slice(first, first + now.size);
    gallery.classList.toggle("broad", cards.some((sample) => sample.card.kind !== "image"));
    gallery.replaceChildren(...cards.map(article));
    for (const [name, select] of Object.entries(controls)) select.value = String(now[name]);
    document.getElementById("where").textContent = found.length === 0 ? "no sample is like that"
      : (first + 1) + " to " + (first + cards.length) + " of " + found.length;
    document.getElementById("before").disabled = page <= 1;
    document.getElementById("after").disabled = page >= pages;
    Object.assign(document.body.dataset, { ready: "yes", found: found.length, pages: pages });
  }

  for (const [name, select] of Object.entries(controls)) select.addEventListener("change", () => go({ [name]: select.value }));
  document.getElementById("before").addEventListener("click", () => go({ page: page - 1 }));
  document.getElementById("after").addEventListener("click", () => go({ page: page + 1 }));
  addEventListener("hashchange", show);
  show();
})();
