"use strict";
// Charts as SVG. Each has a summary in words and a table of its numbers for those who do not see it.

const CHART = { width: 560, height: 300, left: 62, right: 14, top: 12, bottom: 44 };
const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6"]; // classes in style.css, after Okabe and Ito
const TABLE_ROWS = 300;

// options: title, x and y {label, log, low, high}, series [{name, kind: line|dots|bars, points: [[x, y], ...], faint}],
// marks [{axis, value, text}], summary, definition.
function chart(options) {
  const all = options.series.flatMap((own) => own.points).filter(([x, y]) => x !== null && y !== null);
  if (!all.length) return null;
  const bars = options.series.some((own) => own.kind === "bars");
  const x = axis(options.x, all.map((point) => point[0]), CHART.left, CHART.width - CHART.right,
    marksOn(options, "x"));
  const y = axis(bars ? { low: 0, ...options.y } : options.y, all.map((point) => point[1]),
    CHART.height - CHART.bottom, CHART.top, marksOn(options, "y"));
  const picture = makeSvg("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img",
                                   "aria-label": `${options.title}. ${options.summary || ""}` });
  grid(picture, x, y, options);
  options.series.forEach((own, i) => draw(picture, own, own.colour || COLOURS[i % COLOURS.length], x, y, i));
  for (const mark of options.marks || []) drawMark(picture, mark, x, y);
  return make("figure", { class: "chart" },
    make("figcaption", {}, term(options.title, options.definition)),
    legend(options.series), picture, numbers(options));
}

function marksOn(options, name) {
  return (options.marks || []).filter((mark) => mark.axis === name).map((mark) => mark.value);
}

function axis({ log = false, low = null, high = null }, values, from, to, marks) {
  const usable = [...values, ...marks].filter((value) => Number.isFinite(value) && (!log || value > 0));
  let least = low ?? usable.reduce((a, b) => Math.min(a, b), Infinity);
  let most = high ?? usable.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!Number.isFinite(least)) [least, most] = log ? [0.1, 1] : [0, 1];
  if (least === most) [least, most] = log ? [least / 2, most * 2] : [least - 0.5, most + 0.5];
  const scale = log ? Math.log10 : (value) => value;
  const ticks = log ? decades(least, most) : steps(least, most);
  if (!log && low === null) least = Math.min(least, ticks[0]);
  const place = (value) => from + ((scale(value) - scale(least)) / (scale(most) - scale(least))) * (to - from);
  return { place, ticks: ticks.filter((tick) => tick >= least - 1e-12 && tick <= most + 1e-12), log };
}

function steps(least, most, count = 6) {
  const rough = (most - least) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const ticks = [];
  for (let i = Math.ceil(least / step - 1e-9); i * step <= most + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function decades(least, most) {
  const ticks = [];
  const factors = Math.log10(most / least) > 2.5 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(least)); power <= Math.ceil(Math.log10(most)); power++) {
    ticks.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(6))));
  }
  return ticks;
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) {
    return size >= 1e4 && size < 1e7 ? `${Number((value / 1000).toPrecision(4))}k` : value.toExponential().replace("e+", "e");
  }
  return String(Number(value.toPrecision(6)));
}

function grid(picture, x, y, options) {
  const bottom = CHART.height - CHART.bottom;
  for (const tick of x.ticks) {
    picture.append(makeSvg("line", { class: "grid", x1: x.place(tick), x2: x.place(tick), y1: CHART.top, y2: bottom }),
      makeSvg("text", { x: x.place(tick), y: bottom + 16, "text-anchor": "middle" }, tickText(tick)));
  }
  for (const tick of y.ticks) {
    picture.append(makeSvg("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: y.place(tick), y2: y.place(tick) }),
      makeSvg("text", { x: CHART.left - 7, y: y.place(tick) + 4, "text-anchor": "end" }, tickText(tick)));
  }
  picture.append(
    makeSvg("text", { class: "label", x: (CHART.left + CHART.width - CHART.right) / 2, y: CHART.height - 8, "text-anchor": "middle" }, options.x.label),
    makeSvg("text", { class: "label", transform: `translate(14 ${(CHART.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, options.y.label));
}

function draw(picture, own, colour, x, y, number) {
  const usable = ([a, b]) => a !== null && b !== null && (!x.log || a > 0) && (!y.log || b > 0);
  const at = ([a, b]) => `${x.place(a).toFixed(1)},${y.place(b).toFixed(1)}`;
  if (own.kind === "line") {
    let path = "";
    let pen = "M";
    for (const point of own.points) {
      if (usable(point)) { path += pen + at(point); pen = "L"; } else pen = "M";
    }
    picture.append(makeSvg("path", { class: `line ${colour}${own.faint ? " faint" : ""} dash${own.faint ? 0 : number % 3}`, d: path }));
    if (own.points.length < 25 && !own.faint) drawDots(picture, own, colour, usable, x, y);
  } else if (own.kind === "dots") drawDots(picture, own, colour, usable, x, y);
  else drawBars(picture, own, colour, x, y);
}

function drawDots(picture, own, colour, usable, x, y) {
  for (const point of own.points.filter(usable)) {
    const dot = makeSvg("circle", { class: `dot ${colour}`, cx: x.place(point[0]), cy: y.place(point[1]), r: 3.5 },
      makeSvg("title", {}, `${point[2] ? `${point[2]}: ` : ""}${shown(point[0])}, ${shown(point[1])}`));
    if (own.open && point[2]) { dot.classList.add("opens"); dot.addEventListener("click", () => own.open(point[2])); }
    picture.append(dot);
  }
}

// Bars: points are [middle, count, width]. A second series is hatched by its stroke, so that colour is not alone.
function drawBars(picture, own, colour, x, y) {
  for (const [middle, count, width] of own.points) {
    if (!count) continue;
    const left = x.place(middle - width / 2);
    picture.append(makeSvg("rect", { class: `barr ${colour}`, x: left, width: Math.max(1, x.place(middle + width / 2) - left - 0.6),
                                     y: y.place(count), height: y.place(0) - y.place(count) },
      makeSvg("title", {}, `${own.name}: ${count} at ${shown(middle)}`)));
  }
}

function drawMark(picture, { axis: name, value, text }, x, y) {
  if (value === null || value === undefined) return;
  if (name === "x") {
    picture.append(makeSvg("line", { class: "mark", x1: x.place(value), x2: x.place(value), y1: CHART.top, y2: CHART.height - CHART.bottom }),
      makeSvg("text", { class: "mark-text", x: x.place(value) + 5, y: CHART.top + 12 }, text));
  } else {
    picture.append(makeSvg("line", { class: "mark", x1: CHART.left, x2: CHART.width - CHART.right, y1: y.place(value), y2: y.place(value) }),
      makeSvg("text", { class: "mark-text", x: CHART.left + 6, y: y.place(value) - 5 }, text));
  }
}

function legend(series) {
  const named = series.map((own, i) => [own, i]).filter(([own]) => own.name && !own.faint);
  if (named.length < 2) return null;
  return make("p", { class: "legend" }, ...named.map(([own, i]) => make("span", {},
    makeSvg("svg", { viewBox: "0 0 26 10", width: "26", height: "10", "aria-hidden": "true" }, own.kind === "line"
      ? makeSvg("path", { class: `line ${own.colour || COLOURS[i % COLOURS.length]} dash${i % 3}`, d: "M0,5L26,5" })
      : makeSvg("rect", { class: `barr ${own.colour || COLOURS[i % COLOURS.length]}`, x: 6, y: 0, width: 14, height: 10 })), own.name)));
}

// The table is built when it is asked for.
function numbers(options) {
  const details = make("details", { class: "numbers" }, make("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (details.querySelector("table")) return;
    const rows = options.series.flatMap((own) => own.points.map((point) => [own.name || point[2] || "", ...point.slice(0, 2)]));
    const body = make("tbody", {}, ...rows.slice(0, TABLE_ROWS).map((row) => make("tr", {},
      make("td", {}, String(row[0])), make("td", {}, shown(row[1])), make("td", {}, shown(row[2])))));
    details.append(make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""),
      make("th", { scope: "col" }, options.x.label), make("th", { scope: "col" }, options.y.label))), body));
    if (rows.length > TABLE_ROWS) details.append(make("p", { class: "hint" }, `The first ${TABLE_ROWS} of ${rows.length} points.`));
  });
  return details;
}

// Counts of values in bins of equal width, as points of bars.
function histogram(values, bins = 20, low = null, high = null) {
  const least = low ?? Math.min(...values);
  const most = Math.max(high ?? Math.max(...values), least + 1e-9);
  const width = (most - least) / bins;
  const counts = new Array(bins).fill(0);
  for (const value of values) counts[Math.min(bins - 1, Math.floor((value - least) / width))]++;
  return counts.map((count, i) => [least + (i + 0.5) * width, count, width]);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
