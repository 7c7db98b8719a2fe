"use strict";
// The table of cases and the contact sheet, which shows the same cases in the same order.

const PAGE_ROWS = 50;
const THRESHOLD_SENSITIVITY = "How much the lesion volume depends on the threshold, from 0 (not at all) to 1: (V- - V+) / (V- + V+ + 1 ml). "
  + "V- is the volume of the map above 0.8 times the thresholds of pixels and slices, V+ the volume above 1.25 times. "
  + "Missing if each slice has a threshold of its own.";
const COLUMNS = [
  { key: "name", title: "Case", text: true },
  { key: "threshold_sensitivity", title: "Threshold sensitivity", digits: 2, definition: THRESHOLD_SENSITIVITY },
  { key: "volume_ml", title: "Volume, ml", digits: 1, definition: "Volume of the lesion mask in millilitres." },
  { key: "true_volume_ml", title: "Ground truth, ml", digits: 1, definition: "Volume of the ground truth in millilitres." },
  { key: "dice", title: "Volume Dice", digits: 2, definition: "Volume Dice of mask and ground truth; 1 if both are empty." },
  { key: "lesion_slices", title: "Lesion slices", definition: "Number of slices that were called lesion slices / number of slices.", of: "slices" },
  { key: "anomaly_score", title: "Anomaly score", digits: 3, definition: "The highest anomaly score of the case's slices. High scores mean a lesion." },
  { key: "warnings", title: "Warnings", list: true },
];
const order = { key: "threshold_sensitivity", down: true, text: "", page: 0, rows: PAGE_ROWS };

function columns() {
  return COLUMNS.filter((own) => own.text || own.list || report.cases.some((entry) => entry[own.key] !== null && entry[own.key] !== undefined));
}

function ordered() {
  const text = order.text.toLowerCase();
  const found = report.cases.filter((entry) => !text || [entry.name, ...entry.warnings].some((own) => own.toLowerCase().includes(text)));
  const value = (entry) => (order.key === "warnings" ? entry.warnings.length : entry[order.key]);
  const ways = order.down ? -1 : 1;
  return found.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === y) return a.name.localeCompare(b.name, "en", { numeric: true });
    if (x === null || x === undefined) return 1; // what is not known comes last, either way
    if (y === null || y === undefined) return -1;
    return ways * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  });
}

function drawTable() {
  const found = ordered();
  const pages = Math.max(1, Math.ceil(found.length / order.rows));
  order.page = Math.min(order.page, pages - 1);
  const start = order.page * order.rows;
  const rows = found.slice(start, start + order.rows);
  byId("table").tBodies[0].replaceChildren(...rows.map(row));
  byId("count").textContent = found.length ? `${start + 1} to ${start + rows.length} of ${found.length}` : "no case matches the filter";
  byId("before").disabled = order.page === 0;
  byId("after").disabled = order.page === pages - 1;
  for (const cell of byId("table").tHead.querySelectorAll("th[data-key]")) {
    cell.setAttribute("aria-sort", cell.dataset.key !== order.key ? "none" : order.down ? "descending" : "ascending");
  }
}

function row(entry) {
  return make("tr", {}, ...columns().map((own) => cell(entry, own)), report.anonymous ? null : filesCell(entry));
}

function cell(entry, own) {
  if (own.text) {
    return make("th", { scope: "row" }, make("button", { type: "button", class: "open", onclick: () => openCase(entry.name) }, entry.name));
  }
  if (own.list) {
    if (!entry.warnings.length) return make("td", {}, "none");
    return make("td", {}, make("details", {}, make("summary", {}, `⚠ ${entry.warnings.length}`),
      make("ul", {}, ...entry.warnings.map((text) => make("li", {}, text)))));
  }
  const text = shown(entry[own.key], own.digits ?? 0);
  return make("td", { class: "number" }, own.of ? `${text} / ${shown(entry[own.of])}` : text);
}

function filesCell(entry) {
  const links = entry.files.flatMap((file, i) => [i ? ", " : "", make("a", { href: file.href }, file.text)]);
  const commands = entry.commands.length ? make("details", {}, make("summary", {}, "open in"),
    make("p", { class: "hint" }, "Run these commands in the folder of this page:"),
    ...entry.commands.map((own) => make("p", { class: "command" }, make("span", {}, own.program), make("code", {}, own.text),
      make("button", { type: "button", "aria-label": `Copy the command for ${own.program}`, onclick: (event) => copy(own.text, event.currentTarget) }, "Copy")))) : null;
  return make("td", {}, ...links, commands);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function drawHead() {
  const cells = columns().map((own) => make("th", { scope: "col", "data-key": own.key, class: own.text || own.list ? null : "number" },
    make("button", { type: "button", class: "sort", title: own.definition, onclick: () => sortBy(own) }, own.title)));
  byId("table").tHead.replaceChildren(make("tr", {}, ...cells, report.anonymous ? null : make("th", { scope: "col" }, "Files")));
}

function sortBy(own) {
  if (order.key === own.key) order.down = !order.down;
  else Object.assign(order, { key: own.key, down: !own.text });
  order.page = 0;
  drawTable();
  drawThumbnails();
}

const THUMBNAILS = 100; // at once, so that the page stays quick
let sheetNumber = 0;

function drawThumbnails() {
  const found = ordered();
  const number = ++sheetNumber;
  const sheet = byId("thumbnails");
  sheet.replaceChildren();
  const some = (start) => {
    if (number !== sheetNumber) return;
    sheet.append(...found.slice(start, start + THUMBNAILS).map(thumbnail));
    if (start + THUMBNAILS < found.length) setTimeout(some, 0, start + THUMBNAILS);
  };
  setTimeout(some, 0, 0);
}

function thumbnail(entry) {
  const dice = entry.dice === null || entry.dice === undefined ? "" : `, Dice ${shown(entry.dice, 2)}`;
  const picture = entry.thumbnail ? make("img", { src: entry.thumbnail, alt: "", loading: "lazy" }) : make("span", { class: "nothing" }, "no picture");
  return make("button", { type: "button", onclick: () => openCase(entry.name), "aria-label": `Open ${entry.name}` }, picture,
    make("span", { class: "name" }, entry.name), make("span", { class: "hint" }, `${shown(entry.volume_ml, 1)} ml${dice}`));
}

function startTable() {
  if (!report.cases.some((entry) => entry.threshold_sensitivity !== null)) order.key = "anomaly_score";
  drawHead();
  drawTable();
  drawThumbnails();
  byId("filter").addEventListener("input", debounce(() => {
    Object.assign(order, { text: byId("filter").value, page: 0 });
    drawTable();
    drawThumbnails();
  }, 120));
  byId("before").addEventListener("click", () => { order.page--; drawTable(); });
  byId("after").addEventListener("click", () => { order.page++; drawTable(); });
  addEventListener("beforeprint", () => { order.rows = Infinity; drawTable(); });
  addEventListener("afterprint", () => { order.rows = PAGE_ROWS; drawTable(); });
}

// Charts of a folder of results.
const DISTRIBUTIONS = [
  ["dice", "Volume Dice", 0, 1], ["iou", "Volume IoU", 0, 1], ["hd95_mm", "HD95, mm", 0, null], ["volume_ml", "Volume of the mask, ml", 0, null],
];
const SCORE_POINTS = 20000; // of all lines together

function resultCharts() {
  return [scoreChart(), calibrationChart(), diceChart(), ...DISTRIBUTIONS.map(distribution)];
}

function scoreChart() {
  const known = report.cases.filter((entry) => entry.score.length);
  const each = Math.max(12, Math.floor(SCORE_POINTS / Math.max(1, known.length)));
  const series = known.map((entry) => ({
    name: entry.name, kind: "line", faint: known.length > 1, colour: entry.truth && !entry.truth.some(Boolean) ? "c2" : "c1",
    points: thinned(entry.score.map((score, i) => [(100 * i) / Math.max(1, entry.score.length - 1), score]), each),
  }));
  const healthy = series.some((own) => own.colour === "c2");
  if (healthy) series.push({ name: "case with a lesion", kind: "line", colour: "c1", points: [] }, { name: "case without a lesion", kind: "line", colour: "c2", points: [] });
  return chart({
    title: "Slice score against slice position", definition: "Each line is a case: the anomaly score of its slices from the bottom (0 %) to the top (100 %) of the head.",
    x: { label: "position in the head, % (bottom to top)", low: 0, high: 100 }, y: { label: "anomaly score" }, series,
    marks: [{ axis: "y", value: report.calibration.threshold, text: "threshold of slices" }],
    summary: `${known.length} cases; the slice threshold is ${shown(report.calibration.threshold)}.`,
  });
}

function thinned(points, most) {
  const size = Math.ceil(points.length / most);
  if (size <= 1) return points;
  return points.filter((_, i) => i % size === 0);
}

function calibrationChart() {
  const { histogram: found, threshold } = report.calibration;
  if (!found) return null;
  const bars = (counts) => counts.map((own, i) => [(found.edges[i] + found.edges[i + 1]) / 2, own, found.edges[i + 1] - found.edges[i]]);
  const sum = (counts) => counts.reduce((a, b) => a + b, 0);
  return chart({
    title: "Calibration: scores of validation slices", definition: "Anomaly scores of healthy and lesion validation slices, by image labels, and the threshold from which a slice is called a lesion slice.",
    x: { label: "anomaly score" }, y: { label: "slices" }, marks: [{ axis: "x", value: threshold, text: "threshold" }],
    series: [{ name: "healthy", kind: "bars", colour: "c2", points: bars(found.healthy) }, { name: "lesion", kind: "bars", colour: "c1", points: bars(found.lesion) }],
    summary: `${sum(found.healthy)} healthy and ${sum(found.lesion)} lesion slices, threshold ${shown(threshold)}.`,
  });
}

function diceChart() {
  const points = report.cases.filter((entry) => entry.true_volume_ml > 0 && entry.dice !== null).map((entry) => [entry.true_volume_ml, entry.dice, entry.name]);
  if (!points.length) return null;
  return chart({
    title: "Dice against lesion volume", definition: "Each dot is a case with a lesion: the volume Dice of its mask against the volume of the ground truth. A click opens the case.",
    x: { label: "ground truth volume, ml", log: true }, y: { label: "volume Dice", low: 0, high: 1 },
    series: [{ name: "", kind: "dots", colour: "c1", points, open: openCase }],
    summary: `${points.length} cases, median Dice ${shown(median(points.map((own) => own[1])), 2)}.`,
  });
}

function distribution([key, title, low, high]) {
  const values = report.cases.map((entry) => entry[key]).filter((value) => value !== null && value !== undefined);
  if (values.length < 2) return null;
  const middle = median(values);
  return chart({
    title: `Distribution: ${title}`, x: { label: title, low, high }, y: { label: "cases" },
    series: [{ name: "", kind: "bars", colour: "c3", points: histogram(values, 20, low, high) }],
    marks: [{ axis: "x", value: middle, text: `median ${shown(middle, 2)}` }],
    summary: `${values.length} cases, from ${shown(Math.min(...values), 2)} to ${shown(Math.max(...values), 2)}, median ${shown(middle, 2)}.`,
  });
}
