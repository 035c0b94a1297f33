// The page: one state, a few functions that draw a part of it.

const $ = (id) => document.getElementById(id);
const state = {
  query: 0, by: "passages", side: "all", open: null, mode: "tokens", align: "carried", scale: "passage", whole: false,
  text: "", least: 0, document: "", overlap: 100, spurious: false, fold: true, filters: false, spread: true, groups: {},
};
const narrow = matchMedia("(max-width: 900px)");
let D, Q, unit;

const unitName = () => (D.n_train ? "nats" : "raw");
const value = (item) => item.calibrated_nats ?? item.score_nats ?? item.score;
const scaled = (raw) => (D.n_train ? (raw / D.n_train) * (Q.calibration ?? 1) : raw);
const sideName = (item) => (item.side === "positive" ? "pos" : "neg");
const arrow = (item) => (item.side === "positive" ? "▲" : "▼");
const visibleSpace = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
const clip = (text, length) => (text.length > length ? text.slice(0, length) + "…" : text);

// ---- start

// Text of a data block; the packed ones are unpacked when they are asked for.
async function read(id) {
  const block = $(id);
  if (block.dataset.encoding !== "gzip") return JSON.parse(block.textContent);
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack the page (no DecompressionStream). " +
      "Use one from 2023 or later, or read the .json and .csv files beside it.");
  }
  const bytes = Uint8Array.from(atob(block.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const KEPT = new Map();

async function question(index) {
  if (!KEPT.has(index)) KEPT.set(index, unpack(await read(`question-${index}`)));
  if (KEPT.size > 8) KEPT.delete(KEPT.keys().next().value);
  return KEPT.get(index);
}

function unpack(query) {
  for (const p of query.passages) {
    const packed = p.token_scores;
    if (!Array.isArray(packed)) {
      const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
      p.token_scores = Array.from(new Int8Array(bytes.buffer), (b) => b * packed.step);
    }
    if (p.mark) p.tokens = p.tokens.split(p.mark);
    p.text ??= p.tokens.join("");
    p.copies = query.passages.filter((o) => o.side === p.side && o.duplicate_of === p.rank);
  }
  return query;
}

async function start(data) {
  D = data;
  state.spread = !narrow.matches;
  $("message").remove();
  const run = D.run;
  $("run").append(...[run.model, run.corpus, run.sequences && plural(run.sequences, "sequence")]
    .filter(Boolean).map((text) => h("span", {}, text)));
  drawTrust();
  drawHelp();
  $("trust-open").addEventListener("click", () => { close(); $("trust").scrollIntoView({ behavior: "smooth" }); $("trust").focus({ preventScroll: true }); });
  $("help-open").addEventListener("click", () => $("help").showModal());
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.get("by") === "documents") state.by = "documents";
  if (wanted.get("mode") === "sentences") state.mode = "sentences";
  const at = D.queries.findIndex((q) => String(q.id) === wanted.get("query"));
  drawQueries();
  await ask(Math.max(0, at), wanted.get("rank"), wanted.get("side"));
}

async function ask(index, rank, wantedSide) {
  const at = state.query = (index + D.queries.length) % D.queries.length;
  const found = await question(at);
  if (state.query !== at) return; // another one was asked for meanwhile
  Q = found;
  unit = unitFor(Q.passages.map(value), unitName());
  Object.assign(state, { open: null, least: 0, document: "", text: "" });
  if (!Q.documents) state.by = "passages";
  const nav = $("queries").lastChild, named = nav.children[at];
  for (const button of nav.querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
  named.firstChild.setAttribute("aria-current", "true");
  nav.scrollLeft = named.offsetLeft - 40;
  drawTools();
  drawList();
  const items = visible();
  const shown = items.find((item) => String(item.rank) === rank && item.side === wantedSide) ?? (narrow.matches ? null : items[0]);
  open(shown ?? null, false);
  if (rank && shown && shown !== items[0]) cardOf(shown).scrollIntoView({ block: "center" });
}

// ---- left: the questions

function drawQueries() {
  const items = D.queries.map((q, i) =>
    h("li", {}, h("button", { type: "button", onclick: () => { ask(i); scrollTo(0, 0); } },
      h("span", { class: "prompt", dir: "auto" }, tail(q.prompt || "", 70)),
      h("b", { dir: "auto" }, clip(q.completion || (q.prompt ? "" : String(q.id)), 60)),
      h("small", {}, q.members ? `${count(q.members)} members · ` : "", q.log_prob === null ? `measurement ${number(q.measurement)}` : `${q.contrast ? "Δ log p" : "log p"} ${number(q.log_prob)}`))));
  $("queries").replaceChildren(h("h2", {}, plural(D.queries.length, "question")), h("ol", {}, items));
}
// White space before a word stays outside its colour.
const lead = (text) => (text.trim() ? text.match(/^\s*/)[0] : "");
const tail = (text, length) => (text.length > length ? "…" + text.slice(-length).replace(/^\S*\s/, "") : text);

// ---- the question, its answer, and how its influence is spread

// Labels of short pieces alternate between two rows, so that the answer keeps its spacing.
function answerTokens(tokens, text) {
  if (!tokens?.length) return h("b", {}, text);
  let low = false, short = false;
  return tokens.map((t) => {
    const before = short;
    short = t.text.length < 3;
    low = !low && (before || short) && t !== tokens[0];
    const size = Math.abs(t.log_prob), label = size < 0.005 ? "0" : `−${size.toFixed(size < 10 ? 2 : 1).replace(/^0/, "")}`;
    return [t.text.match(/^\s*/)[0], h("span", { class: low ? "answer low" : "answer", "--p": Math.exp(t.log_prob).toFixed(3), tip: () =>
      `${visibleSpace(t.text)}\nlog p ${number(t.log_prob)} nats, p = ${number(Math.exp(t.log_prob))}` },
    h("b", {}, t.text.trimStart() || "·"), h("small", {}, label))];
  });
}

function askedLines(q) {
  const several = Array.isArray(q.contrast), contrasts = (several ? q.contrast : [q.contrast]).filter(Boolean);
  return [h("p", { class: "ask", dir: "auto" }, h("span", {}, q.prompt || ""), answerTokens(q.completion_tokens, q.completion || "")),
    ...contrasts.map((text, i) => h("p", { class: "ask contrast", dir: "auto" },
      h("span", { class: "label" }, i ? "or" : "rather than"), answerTokens(several ? q.contrast_tokens?.[i] : q.contrast_tokens, text)))];
}

function drawQuestion() {
  const S = Q.solution ?? {}, facts = [
    Q.log_prob !== null && [Q.contrast ? "difference of log-probabilities" : "log-probability of the answer", `${number(Q.log_prob, 4)} nats`],
    Q.log_prob !== null && !Q.contrast && !Q.members && ["probability", number(Math.exp(Math.min(0, Q.log_prob)))],
    Q.generated && ["answer", "the model's own, greedy"],
    Q.log_prob === null && Q.measurement !== null && ["measurement", number(Q.measurement, 4)],
    Q.rank_correlation !== null && ["scan against full rank", `r = ${Q.rank_correlation.toFixed(3)}`],
    S.converged === false && ["solution", "not converged"],
    S.best_energy && ["held-out energy", `${number(S.best_energy)} (gradient ${number(S.gradient?.best_energy)})`],
    S.best_energy && ["best scale", number(S.best_scale, 2)],
    ...Object.entries(Q.labels ?? {}).map(([name, x]) => [clip(name, 30), clip(typeof x === "string" ? x : JSON.stringify(x), 80)]),
  ].filter(Boolean);
  const words = h("div", { class: "words" },
    h("p", { class: "label" }, `Question ${state.query + 1} of ${D.queries.length} · ${clip(String(Q.id), 60)}`),
    Q.members ? membersOf() : askedLines(Q),
    h("dl", { class: "facts" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))),
    h("p", { class: "sign" }, h("b", {}, D.sign), " ", D.unit), h("div", { class: "bys" }, groupFigures()));
  $("question").replaceChildren(words, h("div", {}, Q.spread && spreadFigure(), Q.verified?.pairs.length && verifiedFigure()));
}

function groupFigures() {
  return D.groups.flatMap((of, i) => Q.groups[i].map(({ minus, rows, of: total }, k) => {
    const own = unitFor(rows.flatMap((r) => [r.sum, r.low, r.high]), of.unit), numbers = rows.some((r) => r.from !== null);
    const shown = numbers ? rows : [...rows].sort((a, b) => b.sum - a.sum), place = `${i} ${k}`;
    return h("details", { class: "by", open: state.groups[place] ?? !i, ontoggle: (e) => { state.groups[place] = e.target.open; } },
      h("summary", {}, minus === null ? `By ${of.field}` : `By ${of.field}, minus ${clip(minus, 40)}`, h("small", {}, own.label)),
      h("figure", {}, groupBars(shown, own, of.level), h("figcaption", { class: "muted" },
        `Sums over documents${of.candidates ? " (their scored sequences)" : ""}${of.bin ? `, in bins of ${number(of.bin)}` : ""}; lines hold ` +
        `${percent(of.level)} of ${count(of.draws)} bootstraps.${total > rows.length ? ` The largest ${rows.length} of ${count(total)} groups.` : ""}`)));
  }));
}

const member = (m) => h("li", { dir: "auto" }, tail(m.prompt ?? "", 160), h("b", {}, clip(m.completion ?? "", 160)));
const membersOf = () => h("details", { class: "members" }, h("summary", {}, `A set: the mean of ${plural(Q.members.length, "question")}`), h("ol", {}, Q.members.map(member)));

function verifiedFigure() {
  const { shown, random, pairs, residual } = Q.verified, proximal = D.verified.how === "proximal";
  const own = unitFor(pairs.flatMap(([a, b]) => [a, b]), proximal ? "nats" : "per unit of step");
  return h("details", { class: "spread", open: state.spread }, h("summary", {}, "Is it true?"),
    h("figure", {}, verifiedPlot(pairs, own, state.by === "passages" ? state.open?.sequence : null),
      h("figcaption", {}, "Predicted against realised: ", h("b", {}, `r = ${number(shown.pearson)}`), ` over ${plural(shown.pairs, "passage")} shown; `,
        h("span", { class: "muted" }, `hollow: ${count(random.pairs)} random. Realised ${number(shown.scale, 2)} for each nat predicted, by ` +
          (proximal ? `a proximal step of residual ${number(residual, 2)}.` : "a gradient step on the passage.")))));
}

function spreadFigure() {
  const spread = Q.spread, item = state.by === "passages" ? state.open : null;
  const share = spread.top_share === null ? "No sequence raises this answer." : [
    `The top ${spread.top_percent} % (`, plural(spread.top_sequences, "sequence"), ") hold ",
    h("b", {}, percent(spread.top_share)), " of all positive influence."];
  return h("details", { class: "spread", open: state.spread, ontoggle: (e) => { state.spread = e.target.open; } },
    h("summary", {}, "How the influence is spread"),
    h("figure", {}, survivalPlot(spread, unitName(), item && { value: value(item), rank: item.rank }),
    h("figcaption", {}, share, " ", h("span", { class: "muted" },
      `Share of ${count(spread.sequences)} sequences with at least this score, `,
      h("i", { class: "pos" }, "raising"), " and ", h("i", { class: "neg" }, "lowering"), "; the ring marks the open passage."))));
}

// ---- the tool bar

function choice(name, key, options, draw, named) {
  const group = h("div", { class: "choice", role: "group", "aria-label": name }, options.map(([id, label, title]) =>
    h("button", { type: "button", "data-id": id, title, "aria-pressed": String(state[key] === id), onclick: (event) => {
      state[key] = id;
      for (const button of event.currentTarget.parentNode.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      draw();
    } }, label)));
  return named ? h("div", { class: "named" }, h("span", {}, name), group) : group;
}

function drawTools() {
  const relist = () => { drawList(); if (!visible().includes(state.open)) open(narrow.matches ? null : visible()[0] ?? null, false); };
  const pool = state.by === "documents" ? [...Q.documents.positive, ...Q.documents.negative] : Q.passages;
  const n = (name) => pool.filter((p) => p.side === name).length;
  const largest = Math.max(...Q.passages.map((p) => Math.abs(value(p))), 0);
  const slide = (props, change) => h("input", { type: "range", min: 0, max: 100, ...props, oninput: (e) => { change(Number(e.target.value)); relist(); } });
  const least = h("output"), overlap = h("output");
  const label = () => {
    least.textContent = state.least ? unit.exact(state.least).replace("+", "") : "any";
    overlap.textContent = state.overlap < 100 ? `${state.overlap} %` : "any";
  };
  label();
  const check = (key, label, title) => h("label", { title }, h("input", { type: "checkbox", checked: state[key], onchange: (e) => { state[key] = e.target.checked; relist(); } }), label);
  const panel = h("div", { id: "filters", hidden: !state.filters },
    h("label", {}, "Score at least ", slide({ value: largest ? 100 * Math.sqrt(state.least / largest) : 0 }, (v) => {
      state.least = largest * (v / 100) ** 2;
      label();
    }), least),
    h("label", {}, "Overlap with the question at most ", slide({ value: state.overlap }, (v) => {
      state.overlap = v;
      label();
    }), overlap),
    h("label", {}, "Document ", h("select", { onchange: (e) => { state.document = e.target.value; relist(); } },
      h("option", { value: "" }, "all"),
      [...new Set(Q.passages.map((p) => String(p.document)))].sort().map((name) =>
        h("option", { value: name, selected: state.document === name }, clip(name, 60))))),
    check("spurious", "Hide spurious", "Spurious: a few tokens hold nearly all of the influence (‖tok‖₂ / ‖tok‖₁ above 2/3)"),
    check("fold", "Fold near-duplicates", "Passages that repeat another of the same side: at least half of their five-word runs in common"));
  $("tools").hidden = false;
  $("tools").replaceChildren(
    Q.documents ? choice("Rank by", "by", [["passages", "Passages"], ["documents", "Documents", `Sums over ${D.candidates ? "only the scored" : "all"} sequences of a document`]],
      () => { state.open = null; drawTools(); relist(); }) : "",
    choice("Side", "side", [["all", "All"], ["positive", `▲ Raise ${n("positive")}`], ["negative", `▼ Lower ${n("negative")}`]], relist),
    h("input", { id: "search", type: "search", placeholder: "Search text, document, metadata  ( / )", "aria-label": "Search", value: state.text,
      oninput: (e) => { state.text = e.target.value; relist(); } }),
    h("button", { type: "button", "aria-expanded": String(state.filters), "aria-controls": "filters", onclick: (e) => {
      state.filters = !state.filters;
      panel.hidden = !state.filters;
      e.currentTarget.setAttribute("aria-expanded", String(state.filters));
    } }, "Filters"),
    panel);
}

function visible() {
  const text = state.text.toLowerCase();
  const wanted = (p) => (state.side === "all" || p.side === state.side) && Math.abs(value(p)) >= state.least &&
    (!state.document || String(p.document) === state.document);
  if (state.by === "documents") {
    return [...Q.documents.positive, ...Q.documents.negative].filter((d) => wanted(d) && (!text || String(d.document).toLowerCase().includes(text)));
  }
  return Q.passages.filter((p) => wanted(p) && !(state.fold && p.duplicate_of !== null) && !(state.spurious && p.spurious) &&
    100 * (p.overlap ?? 0) <= state.overlap &&
    (!text || `${p.text}\n${p.document}\n${JSON.stringify(p.metadata)}`.toLowerCase().includes(text)));
}

// ---- the middle: cards

function drawList() {
  const items = visible(), total = state.by === "documents" ? Q.documents.positive.length + Q.documents.negative.length : Q.passages.length;
  const folded = state.by === "passages" && state.fold ? Q.passages.filter((p) => p.duplicate_of !== null).length : 0;
  const card = state.by === "documents" ? documentCard : passageCard;
  const sections = ["positive", "negative"].map((name) => {
    const own = items.filter((item) => item.side === name);
    const title = `${name === "positive" ? "▲ Raise" : "▼ Lower"} ${Q.contrast ? "the answer against the contrast" : "this answer"}`;
    return own.length ? [h("h3", { class: name === "positive" ? "pos" : "neg" }, title, h("small", {}, unit.label)),
      h("ol", { role: "listbox", "aria-label": title }, own.map(card))] : "";
  });
  const empty = !items.length && h("p", { class: "notice" }, total ? "Nothing passes these filters." : "This query has no ranked passages.");
  $("list").replaceChildren(...[sections, empty, h("p", { class: "muted count", role: "status" },
    `${items.length} of ${total} ${state.by} shown${folded ? `, ${folded} near-duplicates folded` : ""}.`)].flat(2).filter(Boolean));
}

function cardShell(item, children) {
  const node = h("li", { class: `card ${sideName(item)}`, role: "option", tabindex: 0, "aria-selected": String(item === state.open),
    "aria-label": `${item.side === "positive" ? "raises" : "lowers"}, rank ${item.rank}, ${unit.exact(value(item))}, ${item.document}`,
    onclick: () => open(item, true), onkeydown: (e) => { if (e.key === "Enter") open(item, true); } }, children);
  node.item = item;
  return node;
}

function cardHead(item) {
  const largest = Math.max(...(state.by === "documents" ? [...Q.documents.positive, ...Q.documents.negative] : Q.passages).map((p) => Math.abs(value(p))));
  return [h("div", { class: "head" }, h("span", { class: "rank" }, `${arrow(item)} ${item.rank}`),
    h("span", { class: "source", dir: "auto" }, clip(String(item.document ?? ""), 80)),
    h("span", { class: "score" }, unit.fixed(value(item)))),
  h("div", { class: "meter", "--a": strength(value(item), largest).toFixed(3) })];
}

const chip = (text, tip, kind) => h("span", { class: `chip ${kind ?? ""}`, tip: tip && (() => tip) }, text);

function chips(p) {
  return [
    p.copies.length && chip(`×${p.copies.length + 1}`, "Near-duplicates on this side, folded into this card", "strong"),
    p.spurious && chip("spurious", SPURIOUS, "warn"),
    p.tfidf_rank !== null && chip(`TF-IDF rank ${count(p.tfidf_rank)}`, "The rank that word overlap alone (TF-IDF) gives this passage among all sequences"),
    p.overlap !== null && chip(`overlap ${percent(p.overlap)}`, "Share of the question's distinct tokens that occur in the passage"),
    p.rescored === false && chip("scan only", "Score of the compressed scan, not recomputed at full rank", "warn"),
  ].filter(Boolean);
}
const SPURIOUS = "A few tokens hold nearly all of the influence of this passage (‖tok‖₂ / ‖tok‖₁ above 2/3); such scores are often accidents of a single position.";

function passageCard(p) {
  const facts = Object.values(p.metadata).filter((v) => ["string", "number"].includes(typeof v)).slice(0, 2).map((v) => clip(String(v), 40));
  return cardShell(p, [cardHead(p), p.text && h("p", { class: "excerpt", dir: "auto" }, excerpt(p)),
    h("div", { class: "chips" }, facts.length ? h("span", { class: "meta" }, facts.join(" · ")) : "", chips(p),
      D.n_train ? h("span", { class: "raw" }, `raw ${signed(p.score)}`) : "")]);
}

// About 200 characters from the start of the sentence that counts most on the passage's own side.
function excerpt(p) {
  if (!p.tokens.length) return clip(p.text, 200);
  const sign = p.side === "positive" ? 1 : -1;
  const best = p.sentences.reduce((a, b) => (sign * b.carried > sign * a.carried ? b : a));
  const largest = Math.max(...p.token_scores.map(Math.abs));
  const nodes = best.start ? ["… "] : [];
  let length = 0, i = best.start;
  for (; i < p.tokens.length && length < 200; i++) {
    const text = clip(i === best.start ? p.tokens[i].trimStart() : p.tokens[i], 120).replace(/\s+/g, " ");
    const a = strength(p.token_scores[i], largest);
    if (a < 0.06) nodes.push(text);
    else nodes.push(lead(text), h("span", { class: `t ${side(p.token_scores[i])}`, "--a": (0.8 * a).toFixed(3) }, text.slice(lead(text).length)));
    length += text.length;
  }
  return i < p.tokens.length ? [...nodes, " …"] : nodes;
}

const sequencesOf = (d) => plural(d.sequences, D.candidates ? "scored sequence" : "sequence");

function documentCard(d) {
  const best = d.best.map((b) => b.passage !== null && Q.passages[b.passage]).find(Boolean);
  return cardShell(d, [cardHead(d),
    best && h("p", { class: "excerpt", dir: "auto" }, excerpt(best)),
    h("div", { class: "chips" }, d.sequences !== null && chip(sequencesOf(d)),
      d.best.map((b) => chip(`best ${unit.fixed(value(b))}`)).slice(0, 1))]);
}

// ---- trust, help, tips, keys

function drawTrust() {
  const fact = (f) => h("div", { class: f.state ?? "" }, h("dt", {}, f.label),
    h("dd", {}, f.state ? `${f.state === "ok" ? "✓" : "!"} ` : "", clip(f.value, 80), f.note ? h("small", {}, clip(f.note, 240)) : ""));
  const warned = D.trust.flatMap((g) => g.facts).filter((f) => f.state === "warn").length;
  $("trust-open").append(h("span", { class: warned ? "badge warn" : "badge" }, warned ? `! ${warned}` : "✓"));
  $("trust").replaceChildren(h("h2", {}, "How far to trust this"),
    h("p", { class: "muted" }, "Influence scores are first-order estimates about one training run. They name passages worth reading; they do not prove that a passage caused the answer."),
    h("div", { class: "groups" }, D.trust.map((g) => h("section", {}, h("h3", {}, g.title), h("dl", {}, g.facts.map(fact))))),
    h("p", { class: "muted" }, `Made by upriver ${D.run.upriver ?? ""}. The same data: the .json, .jsonl and .csv files beside this page.`));
}

const KEYS = [["j  k", "next, previous card"], ["[  ]", "previous, next question"], ["/", "search"], ["s", "tokens or sentences"],
  ["p", "on the token that carries it, or that it predicts"], ["d", "passages or documents"], ["← →", "from token to token, in the passage"], ["Esc", "back to the list"], ["?", "this help"]];

function drawHelp() {
  $("help").replaceChildren(h("h2", {}, "Keyboard"), h("dl", {}, KEYS.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)))),
    h("h2", {}, "Colours"), h("p", {}, "Blue with a bar below raises the answer, red with a bar above lowers it; the scale is symmetric about zero. Dotted words occur in the question."),
    h("p", {}, D.sign, " ", D.unit),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
}

function showTip(node) {
  const tip = $("tip"), make = node && TIPS.get(node);
  tip.hidden = !make;
  if (!make) return;
  tip.textContent = make();
  const box = node.getClientRects()[0] ?? node.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(innerWidth - own.width - 8, box.left + box.width / 2 - own.width / 2))}px`;
  tip.style.top = `${box.top - own.height - 8 > 0 ? box.top - own.height - 8 : box.bottom + 8}px`;
}

function withTip(target) {
  for (let node = target; node && node !== document; node = node.parentNode) if (TIPS.has(node)) return node;
  return null;
}

const cardOf = (item) => [...document.querySelectorAll(".card")].find((card) => card.item === item);

function step(by) {
  const items = visible(), at = items.indexOf(state.open);
  const next = items[at < 0 ? 0 : Math.min(items.length - 1, Math.max(0, at + by))];
  if (!next) return;
  open(next, !narrow.matches || document.body.classList.contains("reading"));
  cardOf(next).scrollIntoView({ block: "nearest" });
}

const press = (key, id) => document.querySelector(`[data-id="${state[key] === id[0] ? id[1] : id[0]}"]`)?.click();
const SHORTCUTS = {
  j: () => step(1), k: () => step(-1), "]": () => ask(state.query + 1), "[": () => ask(state.query - 1),
  "/": () => $("search").focus(), "?": () => $("help").showModal(), s: () => press("mode", ["tokens", "sentences"]),
  p: () => press("align", ["carried", "predicted"]), d: () => press("by", ["passages", "documents"]),
};

document.addEventListener("pointerover", (event) => showTip(withTip(event.target)));
document.addEventListener("scroll", () => showTip(null), { capture: true, passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { close(); showTip(null); event.target.blur?.(); }
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || $("help").open) return;
  if (SHORTCUTS[event.key] && D) { event.preventDefault(); SHORTCUTS[event.key](); }
});

read("data").then(start).catch((error) => {
  ($("message") ?? $("question")).className = "notice";
  ($("message") ?? $("question")).textContent = error.message;
}).finally(() => { document.documentElement.dataset.ready = ""; });
