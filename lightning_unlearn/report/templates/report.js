// The gallery. All that comes from the data is put in as text, never as markup. The state is the address's hash, so
// that a view can be kept as a link: #class=3&reason=label&sort=-p&page=2&size=24
(function () {
  // On paper nothing can be unfolded. Lists of indices that fill pages stay as they are.
  const folds = [...document.querySelectorAll("details:not(.long)")], unfolded = [];
  addEventListener("beforeprint", () => {
    for (const fold of folds) if (!fold.open) { fold.open = true; unfolded.push(fold); }
  });
  addEventListener("afterprint", () => { for (const fold of unfolded.splice(0)) fold.open = false; });

  const data = JSON.parse(document.getElementById("data").textContent);
  const gallery = document.getElementById("gallery");
  if (!gallery) { document.body.dataset.ready = "yes"; return; }
  const [before, after] = ["before", "after"].map((name) => document.getElementById(name));
  const controls = { list: null, class: null, suggested: null, pair: null, duplicate: null, reason: null, action: null, who: null, decided: null, text: null, sort: null, size: null };
  for (const name of Object.keys(controls)) controls[name] = document.getElementById("by-" + name);
  const called = (label) => (label < data.names.length ? data.names[label] : String(label));
  const lists = new Map(data.lists);
  const persons = "by a person", who = (sample) => (sample.person ? persons : "by the recipe");
  const orders = {
    // What a person has decided already comes behind what is still to be looked at.
    "p": (a, b) => a.person - b.person || a.p - b.p || a.rank - b.rank,
    "-p": (a, b) => b.p - a.p || b.rank - a.rank,
    "sure": (a, b) => b.sure - a.sure || a.rank - b.rank,
    "index": (a, b) => a.index - b.index,
    "class": (a, b) => (a.given[0] ?? -1) - (b.given[0] ?? -1) || a.rank - b.rank,
    "suggested": (a, b) => (a.suggested[0] ?? -1) - (b.suggested[0] ?? -1) || a.rank - b.rank,
  };
  data.samples.forEach((sample, rank) => { sample.rank = rank; });
  const byIndex = new Map(data.samples.map((sample) => [sample.index, sample]));

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
      const button = make("button", "enlarge");
      button.type = "button";
      button.title = "enlarge";
      button.append(picture(card.src, card.rendered ? "rendered" : "thumb", title));
      button.addEventListener("click", () => { if (button.closest(".card")) review.enlarge(sample); });
      box.append(button);
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
      if (card.note) box.append(make("div", "facts", card.note));
    } else {
      box.append(make("div", card.kind === "fault" ? "text soft" : "text", card.text ?? "cannot be shown"));
    }
    return box;
  }

  // Each name by itself, so that one that is written from right to left does not turn what stands beside it.
  function named(labels, kind, sign) {
    const parts = labels.flatMap((label) => [", ", sign ?? "", make("bdi", kind(label), called(label))]);
    return parts.length ? parts.slice(1) : ["none"];
  }

  function labels(sample) {
    const box = make("div", "labels"), given = new Set(sample.given), suggested = new Set(sample.suggested);
    const added = sample.suggested.filter((label) => !given.has(label));
    const removed = sample.given.filter((label) => !suggested.has(label));
    box.append(make("span", "index", "#" + sample.index));
    box.append("given ", ...named(sample.given, (label) => (suggested.has(label) ? "" : "given")));
    if (added.length + removed.length === 0) return box;
    box.append(make("br"), "suggested ");
    if (data.several) {
      // Of several labels, what is to be changed.
      const changes = [...(added.length ? named(added, () => "suggested", "+") : []), " ",
        ...(removed.length ? named(removed, () => "given", "\u2212") : [])];
      box.append(...changes);
    } else {
      box.append(...named(sample.suggested, () => "suggested"));
    }
    // A person does not say how sure.
    if (!sample.person) box.append(" (" + sample.sure.toFixed(2) + ")");
    return box;
  }

  // Other samples with the same input, each with its picture where that is another.
  function duplicates(sample) {
    const box = make("div", "duplicates");
    for (const one of sample.duplicates) {
      const row = make("div", "duplicate"), shown = byIndex.get(one.index);
      const source = one.exact ? sample.card.src : (one.src ?? shown?.card.src);
      if (source && sample.card.kind === "image") row.append(picture(source, "thumb", "sample " + one.index));
      const words = make("div", "labels");
      words.append(one.exact ? "same input " : "near duplicate ", make("span", "number", "#" + one.index), make("br"),
        "given ", ...named(one.given, () => (one.same ? "" : "given")));
      if (one.file) { words.append(make("div", "facts file", one.file)); row.title = one.file; }
      row.append(words);
      box.append(row);
    }
    return box;
  }

  function tags(sample) {
    const row = make("div", "tags"), same = sample.new.join() === sample.suggested.join();
    const why = { label: "for its label", input: "for its input", both: "for label and input" }[sample.reason];
    if (why) row.append(make("span", "tag", why));
    if (sample.list === "review") row.append(make("span", "tag", lists.get("review")));
    const done = make("span", "tag done", (data.proposes ? "proposed: " : "") + sample.action);
    if (sample.new.length && !same) done.append(" to ", ...named(sample.new, () => ""));
    row.append(done);
    if (sample.person) row.append(make("span", "tag", persons));
    return row;
  }

  function article(sample) {
    const card = make("article", "card");
    Object.assign(card.dataset, { index: sample.index, p: sample.p, reason: sample.reason, given: sample.given.join(" "), action: sample.action });
    const facts = make("div", "facts", !sample.told ? "" : "p(clean) " + (sample.p < 0.001 ? "< 0.001" : sample.p.toFixed(3)));
    card.append(look(sample), labels(sample));
    if (sample.duplicates.length) card.append(duplicates(sample));
    card.append(tags(sample), facts);
    if (sample.card.file) card.append(make("div", "facts file", sample.card.file));
    card.append(review.row(sample));
    review.fill(card.querySelector(".decide"), sample);
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

  for (const [name, of] of [["class", (sample) => sample.given], ["suggested", (sample) => sample.suggested]]) {
    const classes = count(data.samples.flatMap(of));
    for (const label of [...classes.keys()].sort((a, b) => a - b)) {
      option(controls[name], label, called(label) + " (" + classes.get(label) + ")");
    }
  }
  // Which class is taken for which: the most frequent of them.
  const pairOf = (sample) => sample.given.join(" ") + ">" + sample.suggested.join(" ");
  const confused = count(data.samples.filter((sample) => sample.given.join() !== sample.suggested.join()).map(pairOf));
  for (const [pair, samples] of [...confused].sort((a, b) => b[1] - a[1]).slice(0, 100)) {
    const [given, suggested] = pair.split(">").map((side) => side.split(" ").filter(Boolean).map((label) => called(Number(label))).join(", ") || "none");
    option(controls.pair, pair, given + " \u2192 " + suggested + " (" + samples + ")");
  }
  const doubled = (sample) => (!sample.duplicates.length ? "none" : sample.duplicates.every((one) => one.same) ? "same label" : "another label");
  const kinds = { list: (sample) => sample.list, duplicate: doubled, reason: (sample) => sample.reason, action: (sample) => sample.action, who: who };
  const known = { list: [...lists.keys()], duplicate: ["another label", "same label", "none"], reason: data.reasons, action: data.actions, who: [who({}), persons] };
  for (const [name, of] of Object.entries(kinds)) {
    const counts = count(data.samples.map(of));
    for (const kind of known[name]) {
      if (counts.has(kind)) option(controls[name], kind, (name === "list" ? lists.get(kind) : kind) + " (" + counts.get(kind) + ")");
    }
    // What is the same of all needs no choice.
    controls[name].parentElement.hidden = counts.size < 2;
  }

  // An index, or part of a file's name.
  function isNamed(sample, text) {
    const sought = text.trim().toLowerCase();
    return sought.replace(/^#/, "") === String(sample.index) || (sample.card.file ?? "").toLowerCase().includes(sought);
  }

  function isDecided(sample, asked) {
    const word = review.wordOf(sample);
    return asked === "no" ? word === "" : asked === "yes" ? word !== "" : word === asked;
  }

  const filters = ["list", "class", "suggested", "pair", "duplicate", "reason", "action", "who", "decided", "text"];
  function state() {
    const asked = new URLSearchParams(location.hash.slice(1));
    return {
      ...Object.fromEntries(filters.map((name) => [name, asked.get(name) ?? ""])),
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

  // A button that goes dead would take the focus with it.
  function turn(button, isDead, other) {
    const hadFocus = document.activeElement === button;
    button.disabled = isDead;
    if (isDead && hadFocus && !other.disabled) other.focus();
  }

  // What a filter has found stays as it is while pages are turned, so that none is passed over as samples are decided.
  const toPage = document.getElementById("to-page");
  let page = 1, pages = 1, found = [], cards = [], sought = null;
  function seek(now) {
    const asked = JSON.stringify([...filters.map((name) => now[name]), now.sort]);
    if (asked === sought) return;
    sought = asked;
    found = data.samples.filter((sample) =>
      (now.class === "" || sample.given.includes(Number(now.class))) &&
      (now.suggested === "" || sample.suggested.includes(Number(now.suggested))) &&
      (now.pair === "" || pairOf(sample) === now.pair) &&
      (now.decided === "" || isDecided(sample, now.decided)) &&
      (now.text === "" || isNamed(sample, now.text)) &&
      Object.entries(kinds).every(([name, of]) => now[name] === "" || now[name] === of(sample)));
    found.sort(orders[now.sort]);
  }

  function show() {
    const now = state();
    seek(now);
    pages = Math.max(1, Math.ceil(found.length / now.size));
    page = Math.min(now.page, pages);
    const first = (page - 1) * now.size;
    cards = found.slice(first, first + now.size);
    gallery.classList.toggle("broad", cards.some((sample) => sample.card.kind !== "image"));
    gallery.replaceChildren(...cards.map(article));
    for (const [name, control] of Object.entries(controls)) if (control !== document.activeElement || name !== "text") control.value = String(now[name]);
    document.getElementById("where").textContent = found.length === 0 ? "no sample is like that"
      : (first + 1) + " to " + (first + cards.length) + " of " + found.length;
    if (document.activeElement !== toPage) toPage.value = page;
    toPage.max = pages;
    turn(before, page <= 1, after);
    turn(after, page >= pages, before);
    review.opened();
    Object.assign(document.body.dataset, { ready: "yes", found: found.length, pages: pages });
  }

  const review = reviewing(data, gallery, called, {
    look, labels, duplicates,
    cards: () => cards,
    turn: (by) => { const can = page + by >= 1 && page + by <= pages; if (can) go({ page: page + by }); return can; },
    reveal: (sample) => {
      const at = found.indexOf(sample);
      if (at >= 0) go({ page: Math.floor(at / state().size) + 1 });
    },
  });

  for (const [name, select] of Object.entries(controls)) select.addEventListener("change", () => go({ [name]: select.value }));
  controls.text.addEventListener("input", () => go({ text: controls.text.value }));
  toPage.addEventListener("change", () => { go({ page: Math.min(pages, Math.max(1, parseInt(toPage.value, 10) || 1)) }); });
  for (const cell of document.querySelectorAll("rect[data-pair]")) {
    cell.addEventListener("click", () => { go({ pair: cell.dataset.pair }); document.getElementById("controls").scrollIntoView(); });
  }
  before.addEventListener("click", () => go({ page: page - 1 }));
  after.addEventListener("click", () => go({ page: page + 1 }));
  addEventListener("hashchange", show);
  document.getElementById("controls").hidden = false;
  show();
  review.update();
})();
