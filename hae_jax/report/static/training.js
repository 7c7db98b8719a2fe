"use strict";
// The page of a training run.

const CURVES = [ // title, definition, unit, names of columns, logarithmic
  ["Loss", "Training loss (mean since the previous log line), and loss of the EMA weights on fixed validation slices.", "loss", ["loss", "validation_loss", "validation_loss_null"], true],
  ["Loss by timestep", "Training loss by quarter of the timesteps; quarter 1 of 4 has the least noise.", "loss", /^loss_t\d+of\d+$/, true],
  ["Localization on validation slices", "How well lesions are found. Expected Dice and slice AUC need image labels alone, Dice needs ground truth.", "metric", /^localization_|^reconstruction_error$/, false],
  ["Learning rate", "", "learning rate", ["learning_rate"], false],
  ["Throughput", "Training images per second, over all devices.", "images per second", ["images_per_second"], false],
  ["Input wait", "Share of time in which the devices wait for data.", "share of time", ["input_wait_share"], false],
  ["Gradient norm", "", "norm", ["gradient_norm"], true],
  ["Memory", "", "GiB", ["device_memory_gib"], false],
  ["Distance of the EMA weights", "Relative distance between the EMA weights and the parameters.", "distance", ["ema_distance"], false],
  ["Parameter norm", "", "norm", ["parameter_norm"], false],
  ["Skipped steps", "Steps whose loss or gradient was not finite.", "steps", ["skipped_steps"], false],
];

function runCharts() {
  return CURVES.map(([title, definition, unit, wanted, log]) => {
    const names = Object.keys(report.columns).filter((name) => (wanted instanceof RegExp ? wanted.test(name) : wanted.includes(name)));
    if (!names.length) return null;
    const series = names.map((name) => ({ name: readable(name), kind: "line", points: report.columns[name] }));
    const last = (own) => own.points.filter((point) => point[1] !== null).at(-1);
    return chart({ title, definition, x: { label: "step" }, y: { label: unit, log }, series,
      summary: series.filter(last).map((own) => `${own.name} ${shown(last(own)[1], 4)} at step ${shown(last(own)[0])}`).join("; ") });
  });
}

function readable(name) {
  const quarter = /^loss_t(\d+)of(\d+)$/.exec(name);
  if (quarter) return `quarter ${quarter[1]} of ${quarter[2]}`;
  return name.replace(/^localization_/, "").replaceAll("_", " ");
}

function startSamples() {
  const { samples } = report;
  if (!samples.length) return;
  byId("samples").hidden = false;
  const slider = byId("sample");
  slider.max = samples.length - 1;
  slider.value = samples.length - 1;
  const show = async () => {
    const [step, name] = samples[slider.value];
    byId("sample-step").textContent = `step ${shown(step)}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    try {
      const content = await pictures(name);
      if (samples[slider.value][1] !== name) return; // moved on meanwhile
      byId("sample-picture").src = content.picture;
      byId("sample-picture").alt = `Samples at step ${step}: a row for each sample, a column for each guidance strength`;
    } catch (error) {
      byId("sample-step").textContent += `: ${error.message}`;
    }
  };
  slider.addEventListener("input", show);
  show();
}
