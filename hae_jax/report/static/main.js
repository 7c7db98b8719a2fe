"use strict";
// Fills the page.

function startTheme() {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  byId("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
}

function startSummary() {
  describe(byId("facts"), report.facts);
  if (report.notes.length) {
    byId("notes").hidden = false;
    byId("notes").append(...report.notes.map((text) => make("li", {}, text)));
  }
  if (report.versions.length) {
    byId("versions").hidden = false;
    describe(byId("versions").querySelector("dl"), report.versions);
  }
  const sections = [...document.querySelectorAll("main > section")].filter((own) => !own.hidden);
  byId("contents").append(...sections.map((own) => make("a", { href: `#${own.id}` }, own.querySelector("h2").textContent)));
}

function tile(value, name, definition, hint) {
  byId("tiles").append(make("div", { class: "tile" }, make("strong", {}, value), term(name, definition), hint ? make("span", { class: "hint" }, hint) : null));
}

function resultTiles() {
  tile(shown(report.cases.length), "cases done");
  tile(shown(report.failed.length), "cases failed");
  const flagged = report.cases.filter((entry) => entry.lesion_slices > 0).length;
  tile(`${flagged} of ${report.cases.length}`, "cases with a lesion slice", "Cases in which at least one slice was called a lesion slice.");
  for (const row of report.metrics.rows.filter((own) => own.headline && own.values[0])) {
    const [mean, low, high] = row.values[0];
    tile(shown(mean), report.phantom ? `${row.title} (phantom)` : row.title, row.definition, interval(low, high));
  }
}

const interval = (low, high) => (low === null || low === undefined ? "" : `[${shown(low)}, ${shown(high)}]`);

function startMetrics() {
  const { methods, rows } = report.metrics;
  if (!rows.length) return;
  byId("metrics").hidden = false;
  const value = (own) => (own ? [shown(own[0]), interval(own[1], own[2]), own[3] ? `n = ${own[3]}` : ""] : ["–", "", ""]);
  const body = [];
  let group = null;
  for (const own of rows) {
    if (own.group !== group) body.push(make("tr", { class: "group" }, make("th", { colspan: 1 + 3 * methods.length, scope: "colgroup" }, own.group)));
    group = own.group;
    body.push(make("tr", {}, make("th", { scope: "row" }, term(own.name, own.definition)),
      ...own.values.flatMap((found) => value(found).map((text) => make("td", { class: "number" }, text)))));
  }
  byId("metrics-table").append(make("table", {},
    make("caption", {}, "Metrics over the cases with a segmentation"),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), ...methods.map((name) => make("th", { scope: "colgroup", colspan: 3 }, name)))),
    make("tbody", {}, ...body)));
  describe(byId("definitions").querySelector("dl"), rows.filter((own) => own.definition).map((own) => [`${own.group}: ${own.name}`, own.definition]));
}

function startFailed() {
  if (!report.failed.length) return;
  byId("failed").hidden = false;
  byId("failed").querySelector("ul").append(...report.failed.map(([name, why]) => make("li", {}, make("strong", {}, name), `: ${why}`)));
}

function startCharts(charts) {
  const there = charts.filter(Boolean);
  byId("charts").append(...there);
  if (!there.length) byId("charts").append(make("p", {}, "There are no numbers to draw yet."));
  if (report.kind === "results" && report.cases.length && !report.calibration.histogram) {
    byId("charts").append(make("p", { class: "hint" }, "The calibration was made without keeping the scores of its validation slices, so their distribution is not shown."));
  }
}

startTheme();
if (report.kind === "results") {
  resultTiles();
  startFailed();
  startMetrics();
  startTable();
  startViewer();
  startCharts(resultCharts());
} else {
  const [done, all] = report.progress;
  tile(shown(done), all ? `of ${shown(all)} steps` : "steps");
  for (const name of ["loss", "validation_loss", "localization_dice", "images_per_second"]) {
    const last = (report.columns[name] || []).filter((point) => point[1] !== null).at(-1);
    if (last) tile(shown(last[1]), name.replaceAll("_", " "), "", `at step ${shown(last[0])}`);
  }
  startSamples();
  startCharts(runCharts());
}
startSummary();
document.documentElement.dataset.ready = "yes";
