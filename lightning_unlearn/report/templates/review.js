"use strict";
// What a person decides about the samples: buttons and keys on the cards, kept in the browser's storage, and downloaded
// as the table that AttributionPartitionCallback(review=...) takes. A decision is { word, given, new }: keep, relabel,
// drop, or "" for one that was taken back; the labels that the sample was given; the labels to train with.
//
// The gallery calls row(sample) for the line of buttons, opened() once its cards are there; it gives cards() of the
// page, turn(by) to another page (false where there is none), reveal(sample) to the page of a sample, and look, labels and duplicates of one.
function reviewing(data, gallery, called, pages) {
  const words = { k: "keep", r: "relabel", d: "drop" };
  const review = data.review, samples = new Map(data.samples.map((sample) => [sample.index, sample]));
  const [progress, bar, undo, download, note] = ["progress", "bar", "undo", "download", "unkept"].map((name) => document.getElementById(name));
  const dialog = document.getElementById("large");
  const past = [];
  let decisions = new Map(), unkept = null, current = null, entering = "", large = null;

  // Classes that are called by their digit are picked by that digit, others by their place.
  const digits = [...Array(Math.min(10, review.classes)).keys()].every((label) => called(label) === String(label));
  const labelOf = (key) => Number(key) - (digits ? 0 : 1);
  const choices = document.createDocumentFragment();
  for (let label = 0; label < review.classes; label += 1) {
    const one = document.createElement("option");
    one.value = label;
    one.textContent = (!digits && label < 9 ? label + 1 + ": " : "") + called(label);
    choices.append(one);
  }

  // --- kept in the browser -----------------------------------------------------------------------------------------
  const same = (a, b) => a.join() === b.join();
  const isLabels = (found) => Array.isArray(found) && found.every((label) => Number.isInteger(label) && label >= -1);
  const isDecision = (one) => one && ["", ...Object.values(words)].includes(one.word) && isLabels(one.given) && isLabels(one.new);

  function stored() {
    if (unkept) return unkept;
    try {
      const found = JSON.parse(localStorage.getItem(review.key) ?? "{}");
      return found && typeof found === "object" && !Array.isArray(found) ? found : {};
    } catch {
      return {};
    }
  }

  // What the run went by, and over it what was decided here. A decision about another label than the sample has is void.
  function read() {
    decisions = new Map(review.earlier.map(([index, word, given, next]) => [index, { word, given, new: word === "relabel" ? next : [] }]));
    for (const [index, one] of Object.entries(stored())) {
      const sample = samples.get(Number(index));
      if (!/^\d+$/.test(index) || !isDecision(one) || (sample && !same(sample.given, one.given))) continue;
      if (one.word) decisions.set(Number(index), one); else decisions.delete(Number(index));
    }
  }

  function write(index, decision) {
    // Read anew, as another tab may have decided about others.
    const all = { ...stored(), [index]: decision ?? { word: "", given: samples.get(index).given, new: [] } };
    try {
      if (!unkept) localStorage.setItem(review.key, JSON.stringify(all));
    } catch {
      unkept = all;
    }
    if (unkept) unkept = all;
    note.hidden = !unkept;
    read();
  }

  // --- decisions ---------------------------------------------------------------------------------------------------
  function decide(sample, word, next = []) {
    const before = decisions.get(sample.index) ?? null;
    // To give a sample the label that it has is to keep it.
    const kept = word === "relabel" && same(next, sample.given);
    const after = word ? { word: kept ? "keep" : word, given: sample.given, new: kept ? [] : next } : null;
    past.push({ sample, before });
    write(sample.index, after);
    update();
  }

  // Whether something was decided; without another label that is suggested, a person has to pick one.
  function press(sample, word) {
    if (word === "relabel" && same(sample.suggested, sample.given)) {
      choiceOf(sample)?.focus();
      return false;
    }
    decide(sample, word, word === "relabel" ? sample.suggested : []);
    return true;
  }

  // Of several labels, the one that is picked is added or taken away.
  function pick(sample, label) {
    if (!data.several) return decide(sample, "relabel", [label]);
    const now = labelsOf(sample);
    const next = now.includes(label) ? now.filter((one) => one !== label) : [...now, label].sort((a, b) => a - b);
    return decide(sample, "relabel", next);
  }

  function labelsOf(sample) {
    const decision = decisions.get(sample.index);
    if (!decision) return sample.suggested;
    return decision.word === "relabel" ? decision.new : sample.given;
  }

  function takeBack() {
    const last = past.pop();
    if (!last) return;
    write(last.sample.index, last.before);
    update();
    if (cardOf(last.sample)) select(last.sample); else { current = last.sample; entering = "current"; pages.reveal(last.sample); }
  }

  // --- cards -------------------------------------------------------------------------------------------------------
  const cardOf = (sample) => gallery.querySelector('[data-index="' + sample.index + '"]');
  const choiceOf = (sample) => (dialog.open ? dialog : cardOf(sample))?.querySelector(".decide select");

  function row(sample) {
    const box = document.createElement("div");
    box.className = "decide";
    for (const word of Object.values(words)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = button.dataset.word = word;
      // A second click takes it back.
      button.addEventListener("click", () => (decisions.get(sample.index)?.word === word ? decide(sample, "") : press(sample, word)));
      box.append(button);
    }
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", "class of sample " + sample.index);
    if (data.several) choice.append(new Option("labels", ""));
    choice.append(choices.cloneNode(true));
    choice.addEventListener("change", () => { if (choice.value !== "") pick(sample, Number(choice.value)); });
    box.append(choice);
    fill(box, sample);
    return box;
  }

  function fill(box, sample) {
    const decision = decisions.get(sample.index), choice = box.querySelector("select"), labels = labelsOf(sample);
    for (const button of box.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.word === decision?.word));
    if (data.several) {
      for (const one of choice.options) if (one.value !== "") one.textContent = (labels.includes(Number(one.value)) ? "\u2713 " : "") + called(Number(one.value));
      choice.value = "";
    } else {
      choice.value = String(labels[0] ?? "");
    }
    const card = box.closest(".card");
    card?.classList.toggle("decided", Boolean(decision));
    // What paper shows in place of the buttons.
    if (card) card.dataset.decision = decision ? decision.word + (decision.word === "relabel" ? " to " + (decision.new.map(called).join(", ") || "none") : "") : "";
  }

  function update() {
    for (const sample of pages.cards()) { const card = cardOf(sample); if (card) fill(card.querySelector(".decide"), sample); }
    if (dialog.open && current) fill(dialog.querySelector(".decide"), current);
    const decided = data.samples.filter((sample) => decisions.has(sample.index)).length;
    progress.textContent = decided + " of " + data.samples.length + " decided";
    Object.assign(bar, { max: data.samples.length, value: decided });
    undo.disabled = past.length === 0;
  }

  // One card, and what is in it, is reached by Tab; the arrows go to the others.
  function mark(sample) {
    current = sample;
    for (const card of gallery.children) {
      const isCurrent = sample !== null && card.dataset.index === String(sample.index);
      for (const one of [card, ...card.querySelectorAll(".decide > *, .look button")]) one.tabIndex = isCurrent ? 0 : -1;
    }
  }

  function select(sample) {
    mark(sample);
    if (dialog.open) return enlarge(sample);
    const card = cardOf(sample);
    card?.focus({ preventScroll: true });
    card?.scrollIntoView({ block: "nearest" });
  }

  function move(by) {
    const cards = pages.cards(), at = current ? cards.indexOf(current) : -1, next = at < 0 ? 0 : at + by;
    if (next >= 0 && next < cards.length) return select(cards[next]);
    // A row down is no reason to leave the page's last row.
    if (Math.abs(by) > 1) return undefined;
    entering = by > 0 ? "first" : "last";
    if (!pages.turn(by)) { entering = ""; if (current && cardOf(current)) select(current); }
    return undefined;
  }

  function columns() {
    const tops = [...gallery.children].map((card) => card.offsetTop);
    return Math.max(1, tops.filter((top) => top === tops[0]).length);
  }

  function opened() {
    const cards = pages.cards(), asked = entering;
    entering = "";
    if (asked && cards.length) return select(asked === "current" ? current : cards[asked === "first" ? 0 : cards.length - 1]);
    return mark(cards.includes(current) ? current : cards[0] ?? null);
  }

  // --- large ---------------------------------------------------------------------------------------------------------
  function enlarge(sample) {
    mark(sample);
    large = sample;
    const title = document.createElement("p");
    title.className = "soft";
    title.append("#" + sample.index + (sample.card.file ? " \u00b7 " + sample.card.file : ""));
    const frame = document.createElement("div");
    const side = document.createElement("div");
    side.className = "side";
    side.append(pages.look(sample), ...(sample.duplicates.length ? [pages.duplicates(sample)] : []));
    frame.append(side, pages.labels(sample), row(sample), title);
    dialog.replaceChildren(frame);
    if (!dialog.open) dialog.showModal();
    dialog.focus();
  }
  dialog.addEventListener("click", (event) => { if (event.target === dialog || event.target.closest("img")) dialog.close(); });
  // The browser gives the focus back to the card that was enlarged first.
  dialog.addEventListener("close", () => {
    const last = large;
    large = null;
    dialog.replaceChildren();
    if (cardOf(last)) select(last);
  });

  function play(sample) {
    const player = (dialog.open ? dialog : cardOf(sample))?.querySelector("audio");
    if (!player) return false;
    for (const other of document.querySelectorAll("audio")) if (other !== player) other.pause();
    if (player.paused) player.play().catch(() => {}); else player.pause();
    return true;
  }

  // --- the table -----------------------------------------------------------------------------------------------------
  function table() {
    const cell = (value) => '"' + String(value).replaceAll('"', '""') + '"';
    const line = (row) => row.map(cell).join(",");
    const at = (title) => review.titles.indexOf(title);
    const lines = [line(review.titles)];
    const cells = (row, decision) => {
      const full = [...row];
      full[at("decision")] = decision?.word ?? "";
      if (decision?.word === "relabel") {
        full[at("suggested_label")] = decision.new.join(" ");
        // A spreadsheet takes a cell for a formula by its beginning, which alone is quoted.
        if (at("suggested_class") >= 0) full[at("suggested_class")] = decision.new.map((label, place) => (place ? data : review).names[label] ?? "").join("; ");
      }
      return line(full);
    };
    for (const sample of data.samples) lines.push(cells(review.rows[sample.index], decisions.get(sample.index)));
    // What was decided in another report of these data, which this page has no card of.
    for (const [index, decision] of decisions) {
      if (samples.has(index)) continue;
      const row = Object.assign(Array(review.titles.length).fill(""), { [at("index")]: index, [at("given_label")]: decision.given.join(" "), [at("dataset")]: review.mark });
      lines.push(cells(row, decision));
    }
    // The mark in front tells Excel that it is UTF-8.
    return "\ufeff" + lines.join("\r\n") + "\r\n";
  }

  function save() {
    const link = document.createElement("a"), address = URL.createObjectURL(new Blob([table()], { type: "text/csv" }));
    Object.assign(link, { href: address, download: "reviewed.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // --- keys ----------------------------------------------------------------------------------------------------------
  function act(event, sample) {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, onButton = event.target.closest("button");
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[key];
    if (by) move(dialog.open ? Math.sign(by) : by);
    else if (words[key]) { if (press(sample, words[key])) move(1); }
    else if (/^\d$/.test(key) && labelOf(key) >= 0 && labelOf(key) < review.classes) { pick(sample, labelOf(key)); if (!data.several) move(1); }
    else if (key === "Enter" && !onButton && !dialog.open) enlarge(sample);
    else if (key !== " " || onButton || !play(sample)) return;
    event.preventDefault();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, audio")) return;
    // A key acts on what is enlarged or has the focus, which after undo need not be the sample that was undone.
    const card = event.target.closest(".card"), at = large ?? (card ? samples.get(Number(card.dataset.index)) : null);
    const inside = dialog.open || gallery.contains(event.target);
    if (at) current = at;
    if (event.key.toLowerCase() === "u") { takeBack(); event.preventDefault(); }
    else if (inside && current) act(event, current);
    // From anywhere on the page, an arrow to the side leads into the gallery.
    else if (event.target === document.body && ["ArrowRight", "ArrowLeft"].includes(event.key) && current && cardOf(current)) select(current);
  });
  gallery.addEventListener("focusin", (event) => {
    const card = event.target.closest(".card");
    if (card && !large) mark(samples.get(Number(card.dataset.index)));
  });
  undo.addEventListener("click", takeBack);
  download.addEventListener("click", save);
  addEventListener("storage", (event) => { if (event.key === review.key || event.key === null) { read(); update(); } });

  read();
  document.getElementById("review").hidden = false;
  return { row, fill, opened, update, enlarge, wordOf: (sample) => decisions.get(sample.index)?.word ?? "" };
}
