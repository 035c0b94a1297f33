// What is opened on the right: a passage token by token, its layers, or a document.

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
  const place = new URLSearchParams({ query: Q.id, ...(state.by === "documents" && { by: state.by }), ...(item && { side: item.side, rank: item.rank }) });
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
  const what = state.by === "documents" ? "document" : "passage";
  // The sum of a document with sequences that were not scored is not its influence.
  if (!D.n_train || item.score_nats === null || (D.candidates && what === "document")) return null;
  const copy = `To first order, one more copy of this ${what} in the training set would`;
  if (Q.log_prob === null) return h("p", { class: "muted" }, `${copy} change the measurement by ${signed(value(item))}.`);
  const changed = Q.contrast ? "the odds of the answer against the contrast" : "the probability of the answer";
  const factor = Math.exp(value(item));
  if (Q.contrast ? Math.abs(value(item)) > 5 : Q.log_prob + value(item) > 0) {
    return h("p", { class: "muted" }, `${copy} change the log-${Q.contrast ? "odds" : "probability"} by ` +
      `${signed(value(item))} nats: too large for a first-order estimate, so read it as a rank.`);
  }
  const change = Math.abs(value(item)) < 0.05 ? `change ${changed} by ${signed(100 * (factor - 1))} %` : `multiply ${changed} by ${number(factor)}`;
  return h("p", { class: "muted" }, `${copy} ${change}.`);
}

function passageDetail(p) {
  const facts = [
    ["position", p.start !== null && p.end ? `characters ${count(p.start)}–${count(p.end)} of the document` : null],
    ...Object.entries(p.metadata).map(([key, v]) => [key, typeof v === "object" ? JSON.stringify(v) : String(v)]),
    ["sequence", String(p.sequence ?? "–")],
    ["concentration", p.concentration !== null ? `${number(p.concentration)}${p.spurious ? " (spurious)" : ""}` : null],
    ["compressed scan", p.scan_score !== null && p.rescored ? `${signed(p.scan_score, 4)} raw, before rescoring` : null],
  ].filter(([, text]) => text);
  const checked = p.realised_nats !== null && D.verified.how === "proximal" && h("p", { class: "check" }, `Realised: ${unit.exact(p.realised_nats)} `,
    h("span", { class: "muted" }, "measured with a proximal step on one more copy"));
  return [title(p, "Passage"), meaning(p), checked, h("div", { class: "chips" }, chips(p)),
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
      choice("Colour", "mode", [["tokens", "tokens"], ["sentences", "sentences"]], draw, true),
      choice("Value on", "align", [["carried", "the token that carries it", "At position t, whose gradient it is"],
        ["predicted", "the token it predicts", "At position t + 1, the token that position t predicts"]], draw, true),
      choice("Scale of", "scale", [["passage", "this passage", "Full colour at this passage's largest value"],
        ["query", "all", "Full colour at the largest value in any passage of this question"]], draw, true)),
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
  const word = (i, first) => {
    const text = (state.whole ? p.tokens[i] : clip(p.tokens[i], 300)).slice(first ? lead(p.tokens[i]).length : 0);
    return marked.has(i) ? [lead(text), h("u", {}, text.slice(lead(text).length))] : text;
  };
  const nodes = own.map(([a, b, v], k) => {
    const share = strength(v, largest);
    const node = h("span", { class: `t ${side(v)}`, "--a": share.toFixed(3), "--w": share < 0.12 ? "0px" : `${(3.5 * share).toFixed(1)}px`, tip: () => explain(p, a, b, v) },
      Array.from({ length: b - a }, (_, i) => word(a + i, i === 0)));
    const gap = a < b ? lead(p.tokens[a]) : "";
    return state.mode === "sentences" ? [gap, node, h("span", { class: `sum ${side(v)}` }, unit.short(v))] : [gap, node];
  });
  const lost = state.align === "predicted" ? scaled(p.token_scores.at(-1)) : 0;
  const cut = !state.whole && p.tokens.some((text) => text.length > 300);
  return h("div", {}, legend(largest),
    h("div", { class: `passage by-${state.mode}`, dir: "auto", tabindex: 0, onkeydown: stepTokens, "aria-label": "Passage; arrow keys go from token to token" }, nodes),
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
      h("span", { class: "muted" }, apart(relative))),
    p.sums.tokens !== null && h("p", { class: "check" }, `${Math.abs(p.sums.tokens - p.score) <= 1e-3 * Math.abs(p.score) ? "✓" : "✗"} sum over ${plural(p.tokens.length, "token")} ${unit.fixed(scaled(p.sums.tokens))}: `,
      h("span", { class: "muted" }, apart(Math.abs((p.sums.tokens - p.score) / (p.score || 1))))));
}

const apart = (relative) => (relative ? `difference ${number(relative, 2)} of the score` : "no difference in seven digits");

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
    h("p", { class: "gap" }, `The sum over ${sequencesOf(d)}, ${unit.exact(value(d) / (d.sequences || 1))} each on average. `,
      h("span", { class: "muted" }, "Long documents have more sequences to add up; passages of both signs cancel.")),
    h("h3", { class: "gap" }, `Its ${d.side === "positive" ? "most positive" : "most negative"} passages`), h("ol", { class: "best" }, rows)];
}
