"use strict";
// Elements, numbers and charts. Text reaches the page as text nodes and attributes only, never as markup.

const TIPS = new WeakMap();
const SPACE = document.querySelector("svg").namespaceURI;

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "tip") TIPS.set(node, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}
const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const s = (tag, props, ...children) => fill(document.createElementNS(SPACE, tag), props, children);

// ---- numbers

const superscript = (n) => String(n).replace("-", "⁻").replace(/\d/g, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);

function number(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x), sign = x < 0 ? "−" : "";
  if (size === 0) return "0";
  if (size >= Math.min(1000, 10 ** (digits - 1))) return sign + Math.round(size).toLocaleString("en");
  if (size >= 0.001) return sign + size.toPrecision(digits);
  const [mantissa, exponent] = size.toExponential(digits - 1).split("e");
  return `${sign}${mantissa}×10${superscript(Number(exponent))}`;
}
const signed = (x, digits) => (x > 0 ? "+" : "") + number(x, digits);
const percent = (x, digits = 0) => (x === null || x === undefined ? "–" : `${(100 * x).toFixed(digits)} %`);
const count = (n) => (n ?? 0).toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

// One power of ten for all scores of a query, so that they can be compared at a glance.
function unitFor(values, name) {
  const largest = Math.max(...values.map(Math.abs), 0);
  const exponent = largest >= 0.1 || largest === 0 ? 0 : 3 * Math.floor(Math.log10(largest) / 3);
  const factor = 10 ** exponent, top = largest / factor;
  const decimals = top >= 1000 ? 0 : top >= 100 ? 1 : top >= 10 ? 2 : 3;
  return {
    label: exponent ? `×10${superscript(exponent)} ${name}` : name,
    fixed: (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x / factor).toFixed(decimals),
    short: (x) => signed(x / factor, 2),
    exact: (x) => `${signed(x / factor)} ${exponent ? `×10${superscript(exponent)} ` : ""}${name}`,
  };
}

// ---- charts

const side = (x) => (x < 0 ? "neg" : "pos");
const strength = (x, largest) => (largest > 0 ? Math.min(1, Math.abs(x) / largest) : 0);

function decades(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first) / 4));
  return Array.from({ length: Math.max(0, Math.floor((last - first) / step) + 1) }, (_, i) => first + i * step);
}

// Share of all sequences with at least this score, both axes logarithmic, with a mark at the passage opened.
function survivalPlot(spread, unitName, mark) {
  const curves = [["pos", spread.survival.positive], ["neg", spread.survival.negative]].filter(([, points]) => points.length);
  const high = Math.max(...curves.map(([, points]) => points[0][0])) * 1.15;
  const low = Math.max(high / 2e4, Math.min(...curves.map(([, points]) => points[points.length - 1][0])));
  const least = 0.7 / spread.sequences;
  const W = 360, H = 178, L = 44, R = 10, T = 8, B = 34;
  const x = (v) => L + ((W - L - R) * Math.log(v / low)) / Math.log(high / low);
  const y = (v) => T + ((H - T - B) * Math.log(v)) / Math.log(least);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img", "aria-label":
    `Survival plot of ${count(spread.sequences)} scores: from ${number(spread.smallest)} to ${number(spread.largest)} ${unitName}` });
  for (const e of decades(low, high)) {
    svg.append(s("line", { class: "grid", x1: x(10 ** e), x2: x(10 ** e), y1: T, y2: H - B }),
      s("text", { x: x(10 ** e), y: H - B + 13, "text-anchor": "middle" }, `10${superscript(e)}`));
  }
  for (const e of decades(least, 1)) {
    svg.append(s("line", { class: "grid", x1: L, x2: W - R, y1: y(10 ** e), y2: y(10 ** e) }),
      s("text", { x: L - 6, y: y(10 ** e) + 3, "text-anchor": "end" }, e === 0 ? "all" : e > -6 ? `${Number((100 * 10 ** e).toPrecision(1))} %` : `10${superscript(e + 2)} %`));
  }
  svg.append(s("text", { x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle", class: "axis" }, `size of the score, ${unitName}`));
  for (const [name, points] of curves) {
    const shown = points.filter(([v]) => v >= low);
    svg.append(s("path", { class: `curve ${name}`, d: "M" + shown.map(([v, share]) => `${x(v).toFixed(1)} ${y(share).toFixed(1)}`).join("L") }));
    if (shown.length < 40) svg.append(...shown.map(([v, share]) => s("circle", { class: `dot ${name}`, cx: x(v), cy: y(share), r: 1.6 })));
  }
  if (mark && Math.abs(mark.value) >= low) {
    svg.append(s("circle", { class: `mark ${side(mark.value)}`, cx: x(Math.abs(mark.value)), cy: y(mark.rank / spread.sequences), r: 5 }));
  }
  return svg;
}

// What was predicted against what was measured; a ring marks the open passage, a dashed line where the two are equal.
function verifiedPlot(pairs, unit, sequence) {
  const W = 360, H = 200, L = 52, R = 10, T = 8, B = 34;
  const ends = [0, 1].map((i) => [Math.min(...pairs.map((p) => p[i])), Math.max(...pairs.map((p) => p[i]))]);
  const [[x0, x1], [y0, y1]] = ends.map(([a, b]) => [Math.min(0, a), Math.max(0, b)]).map(([a, b]) => [a - 0.06 * (b - a || 1), b + 0.06 * (b - a || 1)]);
  const x = (v) => L + ((W - L - R) * (v - x0)) / (x1 - x0), y = (v) => H - B - ((H - T - B) * (v - y0)) / (y1 - y0);
  const line = (kind, a, b, c, d) => s("line", { class: kind, x1: x(a), y1: y(b), x2: x(c), y2: y(d) });
  const low = Math.max(x0, y0), high = Math.min(x1, y1);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img", "aria-label": `Predicted against realised, ${plural(pairs.length, "passage")}` },
    line("zero", x0, 0, x1, 0), line("zero", 0, y0, 0, y1), line("even", low, low, high, high),
    ends[0].map((v) => s("text", { x: x(v), y: H - B + 13, "text-anchor": "middle" }, unit.short(v))),
    ends[1].map((v) => s("text", { x: L - 6, y: y(v) + 3, "text-anchor": "end" }, unit.short(v))),
    s("text", { x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle", class: "axis" }, `predicted, ${unit.label}; upwards: realised`));
  for (const [predicted, realised, shown, row] of pairs) {
    const at = { cx: x(predicted), cy: y(realised) };
    svg.append(s("circle", { class: `dot ${shown ? side(predicted) : "random"}`, ...at, r: 3,
      tip: () => `sequence ${row}\npredicted ${unit.exact(predicted)}\nrealised ${unit.exact(realised)}` }));
    if (shown && row === sequence) svg.append(s("circle", { class: "mark", ...at, r: 6 }));
  }
  return svg;
}

// Sums of groups as bars from zero, each with the line of its interval.
function groupBars(rows, unit, level) {
  const W = 360, L = 104, R = 58, tall = 17, H = rows.length * tall + 8;
  const ends = rows.flatMap((r) => [r.sum, r.low, r.high, 0]), low = Math.min(...ends), high = Math.max(...ends);
  const x = (v) => L + ((W - L - R) * (v - low)) / (high - low || 1);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img", "aria-label": "Sums by group" });
  rows.forEach((r, i) => {
    const y = 4 + i * tall, middle = y + tall / 2 - 1;
    svg.append(
      s("text", { x: L - 7, y: middle + 3.5, "text-anchor": "end", class: r.group === null ? "" : "value" }, clip(r.group ?? "no value", 16)),
      s("rect", { class: `bar ${side(r.sum)}`, x: Math.min(x(0), x(r.sum)), y: y + 2, width: Math.max(1, Math.abs(x(r.sum) - x(0))), height: tall - 6, rx: 1.5 }),
      s("path", { class: "whisker", d: `M${x(r.low)} ${middle - 3}v6m0-3H${x(r.high)}m0-3v6` }),
      s("text", { x: W, y: middle + 3.5, "text-anchor": "end" }, unit.short(r.sum)),
      s("rect", { class: "hit", x: 0, y, width: W, height: tall, tip: () => `${r.group ?? "no value"}: ${plural(r.documents, "document")}, ${plural(r.sequences, "sequence")}\n` +
        `sum ${unit.exact(r.sum)}\n${percent(level)}: ${unit.short(r.low)} to ${unit.short(r.high)}\nper document ${unit.exact(r.mean)}` }));
  });
  svg.append(s("line", { class: "zero", x1: x(0), x2: x(0), y1: 2, y2: H - 2 }));
  return svg;
}

// Bars up and down from zero, one per depth group.
function depthStrip(depth, sums, unit) {
  const high = Math.max(0, ...sums), low = Math.min(0, ...sums), span = high - low || 1;
  const W = 360, L = 4, T = 14, B = 30 + (low < 0 ? 12 : 0), H = 84 + B;
  const y = (v) => T + ((H - T - B) * (high - v)) / span;
  const width = (W - 2 * L) / sums.length;
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot strip", role: "img", "aria-label": "Influence by depth: " +
    sums.map((v, i) => `${depthName(depth[i])} ${unit.short(v)}`).join(", ") });
  sums.forEach((v, i) => {
    const left = L + i * width, top = Math.min(y(v), y(0)), tall = Math.max(1, Math.abs(y(v) - y(0)));
    const middle = left + width / 2;
    svg.append(
      s("rect", { class: `bar ${side(v)}`, x: left + width * 0.14, y: top, width: width * 0.72, height: tall, rx: 1.5,
        tip: () => `${depthName(depth[i])}: ${unit.exact(v)}` }),
      s("text", { x: middle, y: v < 0 ? top + tall + 10 : top - 4, "text-anchor": "middle", class: "value" },
        Math.abs(v) < 0.01 * span ? "≈0" : unit.short(v)),
      s("text", { x: middle, y: H - 16, "text-anchor": "middle" },
        depth[i].first === depth[i].last ? String(depth[i].first) : `${depth[i].first}–${depth[i].last}`));
  });
  svg.append(s("line", { class: "zero", x1: L, x2: W - L, y1: y(0), y2: y(0) }),
    s("text", { x: W / 2, y: H - 2, "text-anchor": "middle", class: "axis" }, "block, first to last"));
  return svg;
}
const depthName = (group) => (group.first === group.last ? `block ${group.first}` : `blocks ${group.first}–${group.last}`);

// Every tracked layer: modules down, blocks across.
function heatMap(layers, values, unit) {
  const kinds = [...new Set(layers.map((layer) => layer.kind))];
  const blocks = [...new Set(layers.map((layer) => layer.block))].sort((a, b) => (a ?? 1e9) - (b ?? 1e9));
  const largest = Math.max(...values.map(Math.abs));
  const W = 360, L = 74, cell = (W - L - 4) / blocks.length, tall = Math.min(24, Math.max(14, cell)), H = kinds.length * tall + 18;
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot heat", role: "img",
    "aria-label": `Influence of ${layers.length} layers, ${kinds.length} modules by ${blocks.length} blocks` });
  kinds.forEach((kind, row) => svg.append(s("text", { x: L - 6, y: row * tall + tall / 2 + 3.5, "text-anchor": "end" }, String(kind).slice(0, 14))));
  const every = Math.ceil(blocks.length / 16);
  blocks.forEach((block, column) => column % every === 0 &&
    svg.append(s("text", { x: L + cell * (column + 0.5), y: H - 4, "text-anchor": "middle" }, String(block ?? "–"))));
  layers.forEach((layer, i) => {
    const v = values[i], x = L + cell * blocks.indexOf(layer.block), y = kinds.indexOf(layer.kind) * tall;
    svg.append(s("rect", { class: `cell ${side(v)}`, x: x + 0.75, y: y + 0.75, width: cell - 1.5, height: tall - 1.5, rx: 2,
      "--a": strength(v, largest).toFixed(3), tip: () => `${layer.name}: ${unit.exact(v)}` }));
    if (v < 0) svg.append(s("line", { class: "minus", x1: x + cell / 2 - 3, x2: x + cell / 2 + 3, y1: y + tall / 2, y2: y + tall / 2 }));
  });
  return svg;
}
