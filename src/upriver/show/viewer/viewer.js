// The page: one state, a few functions that draw a part of it.

const $ = (id) => document.getElementById(id);
const state = {
  query: 0, by: "passages", side: "all", open: null, mode: "tokens", align: "carried", scale: "passage", whole: false,
  text: "", least: 0, document: "", overlap: 100, spurious: false, fold: true, filters: false,
};
const narrow = matchMedia("(max-width: 900px)");
let D, Q, unit;

const unitName = () => (D.n_train ? "nats" : "raw");
const value = (item) => item.score_nats ?? item.score;
const scaled = (raw) => (D.n_train ? raw / D.n_train : raw);
const sideName = (item) => (item.side === "positive" ? "pos" : "neg");
const arrow = (item) => (item.side === "positive" ? "▲" : "▼");
const visibleSpace = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
const clip = (text, length) => (text.length > length ? text.slice(0, length) + "…" : text);

// ---- start

async function read() {
  const block = $("data");
  if (block.dataset.encoding === "plain") return JSON.parse(block.textContent);
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack the data in the page (DecompressionStream is missing). " +
      "Use a browser from 2023 or later, or read report.json and top.csv beside this file.");
  }
  const bytes = Uint8Array.from(atob(block.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function unpack(data) {
  for (const query of data.queries) {
    for (const p of query.passages) {
      const packed = p.token_scores;
      if (!Array.isArray(packed)) {
        const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
        p.token_scores = Array.from(new Int8Array(bytes.buffer), (b) => b * packed.step);
      }
      p.text ??= p.tokens.join("");
      p.copies = query.passages.filter((o) => o.side === p.side && o.duplicate_of === p.rank);
    }
  }
  return data;
}

function start(data) {
  D = unpack(data);
  $("message").remove();
  const run = D.run;
  $("run").append(...[run.model, run.corpus, run.sequences && plural(run.sequences, "sequence")]
    .filter(Boolean).map((text) => h("span", {}, text)));
  drawTrust();
  drawHelp();
  $("trust-open").addEventListener("click", () => { close(); $("trust").scrollIntoView({ behavior: "smooth" }); $("trust").focus({ preventScroll: true }); });
  $("help-open").addEventListener("click", () => $("help").showModal());
  const wanted = new URLSearchParams(location.hash.slice(1));
  const at = D.queries.findIndex((q) => String(q.id) === wanted.get("query"));
  ask(Math.max(0, at), wanted.get("rank"), wanted.get("side"));
}

function ask(index, rank, wantedSide) {
  state.query = (index + D.queries.length) % D.queries.length;
  Q = D.queries[state.query];
  unit = unitFor(Q.passages.map(value), unitName());
  Object.assign(state, { open: null, least: 0, document: "", text: "" });
  if (!Q.documents) state.by = "passages";
  drawQueries();
  drawTools();
  drawList();
  const items = visible();
  const found = items.find((item) => String(item.rank) === rank && item.side === wantedSide) ?? (narrow.matches ? null : items[0]);
  open(found ?? null, false);
}

// ---- left: the questions

function drawQueries() {
  const items = D.queries.map((q, i) =>
    h("li", {}, h("button", { type: "button", "aria-current": i === state.query ? "true" : null, onclick: () => { ask(i); scrollTo(0, 0); } },
      h("span", { class: "prompt", dir: "auto" }, tail(q.prompt || "", 70)),
      h("b", { dir: "auto" }, clip(q.completion || "", 60)),
      h("small", {}, q.log_prob === null ? "" : `${q.contrast ? "Δ log p" : "log p"} ${number(q.log_prob)}`))));
  $("queries").replaceChildren(h("h2", {}, plural(D.queries.length, "question")), h("ol", {}, items));
}
const tail = (text, length) => (text.length > length ? "…" + text.slice(-length).replace(/^\S*\s/, "") : text);

// ---- the question, its answer, and how its influence is spread

function answerTokens(tokens, text) {
  if (!tokens?.length) return h("b", {}, text);
  return tokens.map((t) => h("span", { class: "answer", "--p": Math.exp(t.log_prob).toFixed(3), tip: () =>
    `${visibleSpace(t.text)}\nlog p ${number(t.log_prob)} nats, p = ${number(Math.exp(t.log_prob))}` },
  h("b", {}, t.text || "·"), h("small", {}, Math.abs(t.log_prob) < 0.005 ? "0" : `−${Math.abs(t.log_prob).toFixed(2).replace(/^0/, "")}`)));
}

function drawQuestion() {
  const contrast = Q.contrast && h("p", { class: "ask contrast", dir: "auto" }, h("span", { class: "label" }, "rather than"), answerTokens(Q.contrast_tokens, Q.contrast));
  const facts = [
    Q.log_prob !== null && [Q.contrast ? "difference of log-probabilities" : "log-probability of the answer", `${number(Q.log_prob, 4)} nats`],
    Q.log_prob !== null && !Q.contrast && ["probability", number(Math.exp(Math.min(0, Q.log_prob)))],
    Q.generated && ["answer", "the model's own, greedy"],
    Q.rank_error?.correlation != null && ["scan against full rank", `r = ${Q.rank_error.correlation.toFixed(3)}`],
  ].filter(Boolean);
  const words = h("div", { class: "words" },
    h("p", { class: "label" }, `Question ${state.query + 1} of ${D.queries.length} · ${clip(String(Q.id), 60)}`),
    h("p", { class: "ask", dir: "auto" }, h("span", {}, Q.prompt || ""), answerTokens(Q.completion_tokens, Q.completion || "")),
    contrast,
    h("dl", { class: "facts" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))),
    h("p", { class: "sign" }, h("b", {}, D.sign), " ", D.unit));
  $("question").replaceChildren(words, Q.spread ? spreadFigure() : "");
}

function spreadFigure() {
  const spread = Q.spread, item = state.by === "passages" ? state.open : null;
  const share = spread.top_share === null ? "No sequence raises this answer." : [
    `The top ${spread.top_percent} % (`, plural(spread.top_sequences, "sequence"), ") hold ",
    h("b", {}, percent(spread.top_share)), " of all positive influence."];
  return h("figure", {}, survivalPlot(spread, unitName(), item && { value: value(item), rank: item.rank }),
    h("figcaption", {}, share, " ", h("span", { class: "muted" },
      `Share of ${count(spread.sequences)} sequences with at least this score, `,
      h("i", { class: "pos" }, "raising"), " and ", h("i", { class: "neg" }, "lowering"), "; the ring marks the open passage.")));
}

// ---- the tool bar

function choice(name, key, options, draw) {
  return h("div", { class: "choice", role: "group", "aria-label": name }, options.map(([id, label, title]) =>
    h("button", { type: "button", "data-id": id, title, "aria-pressed": String(state[key] === id), onclick: (event) => {
      state[key] = id;
      for (const button of event.currentTarget.parentNode.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      draw();
    } }, label)));
}

function drawTools() {
  const relist = () => { drawList(); if (!visible().includes(state.open)) open(narrow.matches ? null : visible()[0] ?? null, false); };
  const pool = state.by === "documents" ? [...Q.documents.positive, ...Q.documents.negative] : Q.passages;
  const n = (name) => pool.filter((p) => p.side === name).length;
  const largest = Math.max(...Q.passages.map((p) => Math.abs(value(p))), 0);
  const slide = (props, change) => h("input", { type: "range", min: 0, max: 100, ...props, oninput: (e) => { change(Number(e.target.value)); relist(); } });
  const least = h("output", {}, "any"), overlap = h("output", {}, "any");
  const check = (key, label, title) => h("label", { title }, h("input", { type: "checkbox", checked: state[key], onchange: (e) => { state[key] = e.target.checked; relist(); } }), label);
  const panel = h("div", { id: "filters", hidden: !state.filters },
    h("label", {}, "Score at least ", slide({ value: 0 }, (v) => {
      state.least = largest * (v / 100) ** 2;
      least.textContent = v ? unit.exact(state.least).replace("+", "") : "any";
    }), least),
    h("label", {}, "Overlap with the question at most ", slide({ value: state.overlap }, (v) => {
      state.overlap = v;
      overlap.textContent = v < 100 ? `${v} %` : "any";
    }), overlap),
    h("label", {}, "Document ", h("select", { onchange: (e) => { state.document = e.target.value; relist(); } },
      h("option", { value: "" }, "all"),
      [...new Set(Q.passages.map((p) => String(p.document)))].sort().map((name) => h("option", { value: name }, clip(name, 60))))),
    check("spurious", "Hide spurious", "Spurious: a few tokens hold nearly all of the influence (‖tok‖₂ / ‖tok‖₁ above 2/3)"),
    check("fold", "Fold near-duplicates", "Passages that repeat another of the same side: at least half of their five-word runs in common"));
  $("tools").hidden = false;
  $("tools").replaceChildren(
    Q.documents ? choice("Rank by", "by", [["passages", "Passages"], ["documents", "Documents", "Sums over all sequences of a document"]],
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
  return cardShell(p, [cardHead(p), h("p", { class: "excerpt", dir: "auto" }, excerpt(p)),
    h("div", { class: "chips" }, facts.length ? h("span", { class: "meta" }, facts.join(" · ")) : "", chips(p))]);
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
    nodes.push(a < 0.06 ? text : h("span", { class: `t ${side(p.token_scores[i])}`, "--a": (0.8 * a).toFixed(3) }, text));
    length += text.length;
  }
  return i < p.tokens.length ? [...nodes, " …"] : nodes;
}

function documentCard(d) {
  const best = d.best.map((b) => b.passage !== null && Q.passages[b.passage]).find(Boolean);
  return cardShell(d, [cardHead(d),
    best && h("p", { class: "excerpt", dir: "auto" }, excerpt(best)),
    h("div", { class: "chips" }, d.sequences !== null && chip(plural(d.sequences, "sequence")),
      d.best.map((b) => chip(`best ${unit.fixed(value(b))}`)).slice(0, 1))]);
}

// ---- the detail

function open(item, byHand) {
  state.open = item;
  state.whole = false;
  for (const card of document.querySelectorAll(".card")) card.setAttribute("aria-selected", String(card.item === item));
  drawDetail();
  drawQuestion();
  document.body.classList.toggle("reading", Boolean(item && byHand && narrow.matches));
  if (byHand) $("detail").scrollTop = 0;
  if (byHand && narrow.matches) $("detail").focus({ preventScroll: true });
  const place = new URLSearchParams({ query: Q.id, ...(item && state.by === "passages" ? { side: item.side, rank: item.rank } : {}) });
  try { history.replaceState(null, "", `#${place}`); } catch { /* a page without a place of its own */ }
}
const close = () => document.body.classList.remove("reading");

function drawDetail() {
  const item = state.open;
  $("detail").hidden = !item;
  if (!item) return;
  $("detail").replaceChildren(...(state.by === "documents" ? documentDetail(item) : passageDetail(item)).flat().filter(Boolean));
}

function title(item, label) {
  return h("header", { class: sideName(item) },
    h("button", { class: "back", type: "button", onclick: close, "aria-label": "Back to the list" }, "‹ Back"),
    h("p", { class: "label" }, `${arrow(item)} ${label} ${item.rank} · ${item.side === "positive" ? "raises" : "lowers"} the answer`),
    h("h2", { dir: "auto" }, clip(String(item.document ?? "passage"), 200)),
    h("p", { class: "big" }, h("b", {}, unit.fixed(value(item))), h("span", {}, ` ${unit.label}`),
      D.n_train ? h("span", { class: "muted" }, `raw ${signed(item.score, 4)}`) : ""));
}

function meaning(item) {
  if (!D.n_train || item.score_nats === null) return null;
  const what = Q.contrast ? "the odds of the answer against the contrast" : "the probability of the answer";
  const factor = Math.exp(item.score_nats);
  const change = Math.abs(item.score_nats) < 0.05 ? `change ${what} by ${signed(100 * (factor - 1))} %` : `multiply ${what} by ${number(factor)}`;
  const thing = state.by === "documents" ? "document" : "passage";
  return h("p", { class: "muted" }, `To first order, one more copy of this ${thing} in the training set would ${change}.`);
}

function passageDetail(p) {
  const facts = [
    ["position", p.start !== null && p.end !== null ? `characters ${count(p.start)}–${count(p.end)} of the document` : null],
    ...Object.entries(p.metadata).map(([key, v]) => [key, typeof v === "object" ? JSON.stringify(v) : String(v)]),
    ["sequence", String(p.sequence ?? "–")],
    ["concentration", p.concentration !== null ? `${number(p.concentration)}${p.spurious ? " (spurious)" : ""}` : null],
    ["compressed scan", p.scan_score !== null && p.rescored ? `${signed(p.scan_score, 4)} raw, before rescoring` : null],
  ].filter(([, text]) => text);
  return [title(p, "Passage"), meaning(p), h("div", { class: "chips" }, chips(p)),
    p.spurious && h("p", { class: "notice" }, SPURIOUS),
    p.tokens.length ? reader(p) : h("div", { class: "passage", dir: "auto" }, p.text),
    duplicates(p), layersOf(p),
    h("dl", { class: "facts wide" }, facts.map(([name, text]) => h("div", {}, h("dt", {}, clip(name, 40)), h("dd", { dir: "auto" }, clip(text, 300)))))];
}

function duplicates(p) {
  if (!p.copies.length) return null;
  return h("details", { class: "copies" }, h("summary", {}, `${plural(p.copies.length, "near-duplicate")} folded into this passage`),
    h("ol", {}, p.copies.map((c) => h("li", {}, `${arrow(c)} ${c.rank}  ${unit.fixed(value(c))}  ${clip(String(c.document), 80)}: `,
      h("span", { dir: "auto", class: "muted" }, clip(c.text, 160))))));
}

// ---- the passage, token by token or sentence by sentence

function reader(p) {
  const draw = () => box.replaceWith((box = readerBox(p)));
  let box = readerBox(p);
  return h("div", { class: "reader" },
    h("div", { class: "switches" },
      choice("Colour by", "mode", [["tokens", "Tokens"], ["sentences", "Sentences"]], draw),
      choice("Place the value", "align", [["carried", "on the token that carries it", "At position t, whose gradient it is"],
        ["predicted", "on the token it predicts", "At position t + 1, the token that position t predicts"]], draw),
      choice("Colour scale", "scale", [["passage", "this passage", "Full colour at this passage's largest value"],
        ["query", "all passages", "Full colour at the largest value in any passage of this question"]], draw)),
    box);
}

// Values with their token spans, in the mode and alignment chosen.
function parts(p) {
  if (state.mode === "sentences") return p.sentences.map((t) => [t.start, t.end, scaled(t[state.align])]);
  const shift = state.align === "predicted" ? 1 : 0;
  return p.tokens.map((_, i) => [i, i + 1, i >= shift ? scaled(p.token_scores[i - shift]) : 0]);
}

function readerBox(p) {
  const own = parts(p), within = state.scale === "query" ? Q.passages.flatMap(parts) : own;
  const largest = within.reduce((most, [, , v]) => Math.max(most, Math.abs(v)), 0);
  const marked = new Set(p.matches);
  const word = (i) => {
    const text = state.whole ? p.tokens[i] : clip(p.tokens[i], 300);
    return marked.has(i) ? h("u", {}, text) : text;
  };
  const nodes = own.map(([a, b, v], k) => {
    const share = strength(v, largest);
    const node = h("span", { class: `t ${side(v)}`, "--a": share.toFixed(3), "--w": share < 0.12 ? "0px" : `${(3.5 * share).toFixed(1)}px`, tip: () => explain(p, a, b, v) },
      Array.from({ length: b - a }, (_, i) => word(a + i)));
    return state.mode === "sentences" ? [node, h("span", { class: `sum ${side(v)}` }, unit.short(v)), " "] : node;
  });
  const lost = state.align === "predicted" ? scaled(p.token_scores.at(-1)) : 0;
  const cut = !state.whole && p.tokens.some((text) => text.length > 300);
  return h("div", {}, legend(largest),
    h("div", { class: "passage", dir: "auto", tabindex: 0, onkeydown: stepTokens, "aria-label": "Passage; arrow keys go from token to token" }, nodes),
    cut && h("button", { type: "button", onclick: () => { state.whole = true; drawDetail(); } }, "Show the long tokens in full"),
    Math.abs(lost) > 1e-3 * largest && h("p", { class: "muted" }, `${unit.exact(lost)} sits on the last position, whose prediction lies outside the passage.`),
    h("p", { class: "muted hint" }, state.mode === "tokens"
      ? "Single tokens mislead: a token's gradient carries everything that is predicted after it, and neighbours often cancel. Read the sentences, then the documents."
      : "Each sentence is coloured by the sum over its tokens, which is what can be read; the number after it is that sum."));
}

function legend(largest) {
  return h("div", { class: "legend" }, h("span", {}, unit.short(-largest)), h("i", { class: "ramp" }), h("span", {}, unit.short(largest)), h("span", {}, unit.label),
    h("span", { class: "key" }, h("i", { class: "t pos", "--a": 0.8, "--w": "3px" }, "raises"), " bar below"),
    h("span", { class: "key" }, h("i", { class: "t neg", "--a": 0.8, "--w": "3px" }, "lowers"), " bar above"),
    h("span", { class: "key" }, h("u", {}, "word"), " of the question"),
    D.quantised && state.mode === "tokens" && h("span", {}, "values quantised to 8 bits"));
}

function explain(p, a, b, v) {
  const share = p.score ? ` (${percent(v / scaled(p.score), 1)} of the passage)` : "";
  if (state.mode === "sentences") return `${unit.exact(v)}${share}\nsentence of ${plural(b - a, "token")}`;
  const name = (i) => (i < p.tokens.length && i >= 0 ? `“${clip(visibleSpace(p.tokens[i]) || "(part of the character before)", 30)}”` : "the end");
  return state.align === "carried"
    ? `${name(a)}  position ${a}, predicts ${name(a + 1)}\n${unit.exact(v)}${share}`
    : `${name(a)}  predicted at position ${a - 1} by ${name(a - 1)}\n${unit.exact(v)}${share}`;
}

function stepTokens(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...event.currentTarget.querySelectorAll(".t")];
  const at = all.findIndex((node) => node.classList.contains("at"));
  all[at]?.classList.remove("at");
  const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
  next.classList.add("at");
  showTip(next);
}

// ---- layers

function layersOf(p) {
  if (!p.layers.length || p.layers.length !== D.layers.length) return null;
  const nats = p.layers.map(scaled);
  const sums = D.depth.map((_, d) => nats.reduce((sum, v, i) => (D.layers[i].depth === d ? sum + v : sum), 0));
  const difference = p.sums.layers - p.score, relative = Math.abs(difference / (p.score || 1)), fine = relative <= 1e-3;
  return h("section", { class: "layers" }, h("h3", {}, "Where in the model", h("small", {}, unit.label)),
    h("div", { class: "pair" },
      D.depth.length ? h("figure", {}, depthStrip(D.depth, sums, unit), h("figcaption", {}, "Summed by depth")) : "",
      h("figure", {}, heatMap(D.layers, nats, unit), h("figcaption", {}, "Every tracked layer"))),
    h("p", { class: fine ? "check" : "check bad" }, `${fine ? "✓" : "✗"} sum over ${plural(p.layers.length, "layer")} ${unit.fixed(scaled(p.sums.layers))}, score ${unit.fixed(value(p))}: `,
      h("span", { class: "muted" }, `differ by ${number(Math.abs(relative), 2)} of the score`)),
    p.sums.tokens !== null && h("p", { class: "check" }, `${Math.abs(p.sums.tokens - p.score) <= 1e-3 * Math.abs(p.score) ? "✓" : "✗"} sum over ${plural(p.tokens.length, "token")} ${unit.fixed(scaled(p.sums.tokens))}: `,
      h("span", { class: "muted" }, `differ by ${number(Math.abs((p.sums.tokens - p.score) / (p.score || 1)), 2)} of the score`)));
}

// ---- a document

function documentDetail(d) {
  const rows = d.best.map((b) => {
    const p = b.passage === null ? null : Q.passages[b.passage];
    const where = b.start === undefined || b.start === null ? `sequence ${b.sequence}` : `characters ${count(b.start)}–${count(b.end)}`;
    return h("li", { class: side(value(b)) }, h("p", { class: "head" }, h("b", {}, unit.fixed(value(b))), h("span", { class: "muted" }, where),
      p && h("button", { type: "button", onclick: () => { state.by = "passages"; state.side = "all"; drawTools(); drawList(); open(p, true); } }, `Open passage ${arrow(p)} ${p.rank}`)),
    p ? h("p", { class: "excerpt", dir: "auto" }, excerpt(p)) : h("p", { class: "muted" }, "Not among the passages kept with their text (raise --top to keep more)."));
  });
  return [title(d, "Document"), meaning(d),
    h("p", {}, `The sum over ${plural(d.sequences, "sequence")}, ${unit.exact(value(d) / (d.sequences || 1))} each on average. `,
      h("span", { class: "muted" }, "Long documents have more sequences to add up; passages of both signs cancel.")),
    h("h3", {}, `Its ${d.side === "positive" ? "most positive" : "most negative"} passages`), h("ol", { class: "best" }, rows)];
}

// ---- trust, help, tips, keys

function drawTrust() {
  const fact = (f) => h("div", { class: f.state ?? "" }, h("dt", {}, f.label),
    h("dd", {}, f.state ? `${f.state === "ok" ? "✓" : "!"} ` : "", clip(f.value, 80), f.note ? h("small", {}, clip(f.note, 240)) : ""));
  $("trust").replaceChildren(h("h2", {}, "How far to trust this"),
    h("p", { class: "muted" }, "Influence scores are first-order estimates about one training run. They name passages worth reading; they do not prove that a passage caused the answer."),
    h("div", { class: "groups" }, D.trust.map((g) => h("section", {}, h("h3", {}, g.title), h("dl", {}, g.facts.map(fact))))),
    h("p", { class: "muted" }, `Made by upriver ${D.run.upriver ?? ""}. The same data: report.json, report.jsonl, top.csv.`));
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

function step(by) {
  const items = visible(), at = items.indexOf(state.open);
  const next = items[at < 0 ? 0 : Math.min(items.length - 1, Math.max(0, at + by))];
  if (!next) return;
  open(next, !narrow.matches || document.body.classList.contains("reading"));
  [...document.querySelectorAll(".card")].find((card) => card.item === next)?.scrollIntoView({ block: "nearest" });
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

read().then(start).catch((error) => {
  ($("message") ?? $("question")).className = "notice";
  ($("message") ?? $("question")).textContent = error.message;
});
