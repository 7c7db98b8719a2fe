"use strict";
// The case view: three planes of one volume at one scale, with map, mask, ground truth and pseudo-healthy images.

const FLICKER_MS = 700; // slower than what is a risk for people with photosensitive epilepsy
const MASK_BIT = 1;
const TRUTH_BIT = 2;
const BAR_MM = 50;
const LABEL_PX = 13;
const TALL = 44; // of the bar of scores, in its own units

const view = { entry: null, volume: null, at: [0, 0, 0], flicker: null, healthyShown: false, frame: 0 };

async function openCase(name) {
  const entry = report.cases.find((own) => own.name === name);
  if (!entry) return;
  Object.assign(view, { entry, volume: null, healthyShown: false });
  byId("viewer-title").textContent = entry.name;
  byId("viewer-figures").textContent = figures(entry);
  warn(entry.warnings);
  byId("scores").replaceChildren();
  byId("views").replaceChildren();
  if (!byId("viewer").open) byId("viewer").showModal();
  byId("viewer-title").focus({ preventScroll: true });
  byId("viewer-status").textContent = "Loading the volumes.";
  try {
    const volume = await load(name);
    if (view.entry !== entry) return; // another case was opened meanwhile
    if (volume) begin(volume);
    else byId("viewer-status").textContent = "None of the volumes of this case can be shown.";
  } catch (error) {
    if (view.entry === entry) warn([...entry.warnings, error.message]);
    byId("viewer-status").textContent = "None of the volumes of this case can be shown.";
  }
}

function figures(entry) {
  const parts = [`mask ${shown(entry.volume_ml, 1)} ml`];
  if (entry.true_volume_ml !== null && entry.true_volume_ml !== undefined) parts.push(`ground truth ${shown(entry.true_volume_ml, 1)} ml`);
  if (entry.dice !== null && entry.dice !== undefined) parts.push(`volume Dice ${shown(entry.dice, 2)}`);
  parts.push(`${entry.lesion_slices} of ${entry.slices} slices called lesion`);
  return (report.phantom ? "Phantom metrics: " : "") + parts.join(", ");
}

function warn(warnings) {
  byId("viewer-warnings").hidden = !warnings.length;
  byId("viewer-warnings").replaceChildren(...warnings.map((text) => make("li", {}, text)));
}

async function load(name) {
  const volume = await pictures(name);
  if (!volume) return null;
  for (const image of volume.images) {
    image.bytes = await decode(image.sheets, volume);
    image.healthyBytes = image.healthy && await decode(image.healthy, volume);
  }
  if (volume.map) volume.map.bytes = await decode(volume.map.sheets, volume);
  volume.labelBytes = volume.labels && await decode(volume.labels, volume);
  return volume;
}

function begin(volume) {
  view.volume = volume;
  const kept = byId("modality").selectedIndex;
  byId("modality").replaceChildren(...volume.images.map((image) => make("option", { value: image.name }, image.name)));
  byId("modality").selectedIndex = Math.min(Math.max(kept, 0), volume.images.length - 1);
  byId("show-map").disabled = byId("map-opacity").disabled = !volume.map;
  byId("show-mask").disabled = !volume.hasMask;
  byId("show-truth").disabled = !volume.hasTruth;
  byId("healthy").disabled = !volume.images.some((image) => image.healthy);
  byId("healthy").title = byId("healthy").disabled ? "not saved; translate.py --save-healthy writes pseudo-healthy reconstructions" : "";
  byId("slice").max = volume.shape[2] - 1;
  view.at = firstLook(volume, view.entry);
  byId("scores").replaceChildren(scoreBar(volume, view.entry));
  drawScale(volume.map);
  layOut();
}

function drawScale(map) {
  byId("scale").replaceChildren();
  if (!map) return;
  const colours = make("canvas", { width: 256, height: 1, class: "colours", "aria-hidden": "true" });
  const pixels = new ImageData(256, 1);
  HEAT.forEach((colour, i) => pixels.data.set([...colour, 255], 4 * i));
  colours.getContext("2d").putImageData(pixels, 0, 0);
  byId("scale").append("Map: 0 ", colours, ` ${map.high}${map.threshold ? `; threshold of the mask ${map.threshold}` : ""}.`);
}

// The most anomalous slice, at the brightest place of its map.
function firstLook(volume, entry) {
  const [nx, ny, nz] = volume.shape;
  const best = entry.score.length ? entry.index[entry.score.indexOf(Math.max(...entry.score))] - volume.origin[2] : nz >> 1;
  const z = Math.max(0, Math.min(nz - 1, best));
  const at = [nx >> 1, ny >> 1, z];
  if (volume.map) {
    const plane = volume.map.bytes.subarray(z * nx * ny, (z + 1) * nx * ny);
    let brightest = 0;
    for (let i = 0; i < plane.length; i++) if (plane[i] > plane[brightest]) brightest = i;
    if (plane[brightest]) [at[0], at[1]] = [brightest % nx, Math.floor(brightest / nx)];
  }
  return at;
}

// A bar for each slice: as tall as its anomaly score, and below it two rows, called lesion and ground truth.
function scoreBar(volume, entry) {
  const slices = volume.shape[2];
  const limit = report.calibration.threshold;
  const most = Math.max(1e-9, ...entry.score, (limit ?? 0) * 1.2);
  const picture = makeSvg("svg", { class: "scorebar", viewBox: `0 0 ${slices} ${TALL + 12}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Anomaly score of ${entry.score.length} slices, highest ${shown(Math.max(0, ...entry.score))}; `
      + `${entry.lesion.filter(Boolean).length} called lesion` });
  entry.index.forEach((index, i) => {
    const x = index - volume.origin[2];
    const height = Math.max(0, (entry.score[i] / most) * (TALL - 2));
    picture.append(makeSvg("rect", { class: entry.lesion[i] ? "called" : "healthy", x: x + 0.08, width: 0.84, y: TALL - height, height }));
    if (entry.lesion[i]) picture.append(makeSvg("rect", { class: "called", x, width: 1, y: TALL + 1.5, height: 4 }));
    if (entry.truth && entry.truth[i]) picture.append(makeSvg("rect", { class: "true", x, width: 1, y: TALL + 7, height: 4 }));
  });
  if (limit !== null && limit !== undefined) {
    const y = TALL - (limit / most) * (TALL - 2);
    picture.append(makeSvg("line", { class: "limit", x1: 0, x2: slices, y1: y, y2: y }));
  }
  picture.append(makeSvg("rect", { id: "here", class: "here", x: 0, width: 1, y: 0, height: TALL + 12 }));
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    go(2, Math.floor(((event.clientX - box.left) / box.width) * slices));
  });
  return make("div", {}, picture, make("p", { class: "hint" }, "Anomaly score of every slice from bottom to top (dashed: the threshold); rows below: ",
    make("span", { class: "key called-key" }), "called lesion", ...(entry.truth ? [", ", make("span", { class: "key true-key" }), "ground truth"] : []), "."));
}

// One canvas for each plane, two where the pseudo-healthy image lies beside; all at the same pixels per mm.
function layOut() {
  if (!view.volume) return;
  const beside = byId("healthy").value === "beside" && !byId("healthy").disabled;
  const wanted = ["axial", "coronal", "sagittal"].flatMap((name) => (beside && name === "axial" ? [[name, false], [name, true]] : [[name, false]]));
  const sizes = wanted.map(([name]) => planeSize(view.volume, PLANES[name]));
  const room = byId("views").clientWidth || innerWidth - 40;
  const wide = sizes.reduce((sum, size) => sum + size.mmWide, 0);
  const tall = Math.max(...sizes.map((size) => size.mmHigh));
  const inOneRow = room > 760;
  const across = inOneRow ? (room - 14 * sizes.length) / wide : (room - 14) / Math.max(...sizes.map((size) => size.mmWide));
  const scale = Math.max(0.5, Math.min(across, Math.max(240, innerHeight * 0.62) / tall));
  byId("views").replaceChildren(...wanted.map(([name, healthy], i) => frame(name, healthy, sizes[i], scale)));
  byId("swap").hidden = byId("healthy").value !== "flicker";
  flickerOn(byId("healthy").value === "flicker" && !byId("healthy").disabled);
  paint();
}

function frame(name, healthy, size, scale) {
  const ratio = devicePixelRatio || 1;
  const canvas = make("canvas", { role: "img", tabindex: "0", width: Math.round(size.mmWide * scale * ratio), height: Math.round(size.mmHigh * scale * ratio) });
  canvas.style.width = `${size.mmWide * scale}px`;
  canvas.style.height = `${size.mmHigh * scale}px`;
  Object.assign(canvas, { plane: PLANES[name], healthy, perMm: scale * ratio });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    go(canvas.plane.w, view.at[canvas.plane.w] + (event.deltaY < 0 ? 1 : -1));
  }, { passive: false });
  canvas.addEventListener("click", (event) => point(canvas, event));
  canvas.addEventListener("keydown", (event) => arrow(event, canvas.plane.w));
  return make("figure", {}, make("figcaption", {}, PLANES[name].name + (healthy ? ", pseudo-healthy" : "")), canvas);
}

function point(canvas, event) {
  const { plane } = canvas;
  const { shape } = view.volume;
  const column = Math.floor((event.offsetX / canvas.clientWidth) * shape[plane.u]);
  const row = Math.floor((event.offsetY / canvas.clientHeight) * shape[plane.v]);
  view.at[plane.u] = clamp(column, shape[plane.u]);
  view.at[plane.v] = clamp(plane.up ? shape[plane.v] - 1 - row : row, shape[plane.v]);
  paint();
}

const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));

function go(axisNumber, value) {
  if (!view.volume) return;
  view.at[axisNumber] = clamp(value, view.volume.shape[axisNumber]);
  paint();
}

function paint() {
  cancelAnimationFrame(view.frame);
  view.frame = requestAnimationFrame(paintNow);
}

function paintNow() {
  if (!view.volume) return;
  document.querySelectorAll("#views canvas").forEach(paintCanvas);
  byId("slice").value = view.at[2];
  byId("here")?.setAttribute("x", view.at[2]);
  const text = saySlice();
  byId("slice").setAttribute("aria-valuetext", text);
  byId("viewer-status").textContent = text;
}

function saySlice() {
  const { volume, entry, at } = view;
  const slice = at[2] + volume.origin[2];
  const i = entry.index.indexOf(slice);
  const score = i < 0 ? "not translated" : `anomaly score ${shown(entry.score[i])}, called ${entry.lesion[i] ? "lesion" : "healthy"}`
    + (entry.truth ? `, ground truth ${entry.truth[i] ? "lesion" : "healthy"}` : "");
  return `Axial slice ${slice}: ${score}. Cross-hair at ${position(volume, at)}.`;
}

function paintCanvas(canvas) {
  const { plane } = canvas;
  const size = planeSize(view.volume, plane);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, canvas.width, canvas.height);
  const pick = cut(view.volume, plane, view.at);
  const healthy = canvas.healthy || (byId("healthy").value === "flicker" && view.healthyShown);
  context.drawImage(slicePicture(size, pick, healthy), 0, 0, canvas.width, canvas.height);
  const labels = view.volume.labelBytes;
  if (labels && byId("show-truth").checked) drawLabel(context, canvas, size, pick, TRUTH_BIT, "#56b4e9", true);
  if (labels && byId("show-mask").checked) drawLabel(context, canvas, size, pick, MASK_BIT, "#e69f00", false);
  annotate(context, canvas, plane, size);
  canvas.setAttribute("aria-label", `${plane.name} plane${healthy ? ", pseudo-healthy" : ""} at ${position(view.volume, view.at)}, `
    + `${count(size, pick, MASK_BIT)} voxels of the mask in it. Left edge ${plane.left}, right edge ${plane.right}.`);
}

function slicePicture({ width, height }, pick, healthy) {
  const image = view.volume.images[byId("modality").selectedIndex];
  const grey = image && ((healthy && image.healthyBytes) || image.bytes);
  const map = byId("show-map").checked && !healthy ? view.volume.map?.bytes : null;
  const opacity = byId("map-opacity").value / 100;
  const pixels = new ImageData(width, height);
  for (let row = 0, to = 0; row < height; row++) {
    for (let column = 0; column < width; column++, to += 4) {
      const place = pick(column, row);
      const base = grey ? grey[place] : 0;
      const heat = map ? map[place] : 0;
      const share = opacity * Math.min(1, heat / 96); // faint values let the image through
      for (let c = 0; c < 3; c++) pixels.data[to + c] = base + (HEAT[heat][c] - base) * share;
      pixels.data[to + 3] = 255;
    }
  }
  const sheet = document.createElement("canvas");
  [sheet.width, sheet.height] = [width, height];
  sheet.getContext("2d").putImageData(pixels, 0, 0);
  return sheet;
}

function count({ width, height }, pick, bit) {
  if (!view.volume.labelBytes) return 0;
  let found = 0;
  for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) if (view.volume.labelBytes[pick(column, row)] & bit) found++;
  return found;
}

// Edges between a voxel inside and one outside, on the voxels' borders; dashed for the ground truth.
function drawLabel(context, canvas, { width, height }, pick, bit, colour, dashed) {
  const labels = view.volume.labelBytes;
  const [sx, sy] = [canvas.width / width, canvas.height / height];
  const is = (column, row) => column >= 0 && row >= 0 && column < width && row < height && (labels[pick(column, row)] & bit) > 0;
  context.save();
  context.globalAlpha = byId("mask-opacity").value / 100;
  context.beginPath();
  const filled = byId("drawn").value === "fill";
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      if (!is(column, row)) continue;
      if (filled) { context.rect(column * sx, row * sy, sx + 0.5, sy + 0.5); continue; }
      if (!is(column - 1, row)) line(context, column * sx, row * sy, column * sx, (row + 1) * sy);
      if (!is(column + 1, row)) line(context, (column + 1) * sx, row * sy, (column + 1) * sx, (row + 1) * sy);
      if (!is(column, row - 1)) line(context, column * sx, row * sy, (column + 1) * sx, row * sy);
      if (!is(column, row + 1)) line(context, column * sx, (row + 1) * sy, (column + 1) * sx, (row + 1) * sy);
    }
  }
  const ratio = devicePixelRatio || 1;
  context.lineWidth = 1.6 * ratio;
  context.strokeStyle = context.fillStyle = colour;
  if (dashed) context.setLineDash([0.55 * sx, 0.45 * sx]); // one dash for each voxel's edge
  if (filled) { context.globalAlpha *= 0.6; context.fill(); } else context.stroke();
  context.restore();
}

function line(context, x1, y1, x2, y2) {
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
}

// Cross-hair, sides of the patient, and a bar of so many mm.
function annotate(context, canvas, plane, { width, height }) {
  const ratio = devicePixelRatio || 1;
  const { shape } = view.volume;
  const [w, h] = [canvas.width, canvas.height];
  const x = ((view.at[plane.u] + 0.5) / width) * w;
  const y = ((plane.up ? shape[plane.v] - 1 - view.at[plane.v] : view.at[plane.v]) + 0.5) / height * h;
  const gap = 9 * ratio;
  context.save();
  context.strokeStyle = "rgba(255,255,255,0.45)";
  context.lineWidth = ratio;
  context.beginPath();
  line(context, x, 0, x, y - gap); line(context, x, y + gap, x, h);
  line(context, 0, y, x - gap, y); line(context, x + gap, y, w, y);
  context.stroke();
  context.font = `600 ${LABEL_PX * ratio}px system-ui, sans-serif`;
  const label = (text, left, top, align) => {
    context.textAlign = align;
    context.lineWidth = 3 * ratio;
    context.strokeStyle = "#000";
    context.strokeText(text, left, top);
    context.fillStyle = "#fff";
    context.fillText(text, left, top);
  };
  context.textBaseline = "middle";
  label(plane.left, 6 * ratio, h / 2, "left");
  label(plane.right, w - 6 * ratio, h / 2, "right");
  label(plane.top, w / 2, 10 * ratio, "center");
  label(plane.bottom, w / 2, h - 10 * ratio, "center");
  const bar = BAR_MM * canvas.perMm;
  if (bar < w * 0.6) {
    context.fillStyle = "#fff";
    context.fillRect(w - bar - 8 * ratio, h - 8 * ratio, bar, 2 * ratio);
    label(`${BAR_MM} mm`, w - 8 * ratio, h - 18 * ratio, "right");
  }
  context.restore();
}

function flickerOn(on) {
  clearInterval(view.flicker);
  view.healthyShown = false;
  view.flicker = on && !matchMedia("(prefers-reduced-motion: reduce)").matches ? setInterval(swap, FLICKER_MS) : null;
}

function swap() {
  view.healthyShown = !view.healthyShown;
  paint();
}

function arrow(event, axisNumber) {
  const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
  if (steps === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  go(axisNumber, view.at[axisNumber] + steps);
}

const KEYS = {
  a: () => toggle("show-map"), m: () => toggle("show-mask"), t: () => toggle("show-truth"),
  o: () => choose("drawn"), h: () => (byId("healthy").value === "flicker" ? swap() : choose("healthy")),
  n: () => neighbour(1), p: () => neighbour(-1),
};

function toggle(id) {
  if (!byId(id).disabled) byId(id).click();
}

function choose(id) {
  const list = byId(id);
  if (list.disabled) return;
  list.selectedIndex = (list.selectedIndex + 1) % list.options.length;
  list.dispatchEvent(new Event("change"));
}

function neighbour(step) {
  const order = ordered();
  const here = order.findIndex((own) => own.name === view.entry.name);
  const next = order[here + step];
  if (next) openCase(next.name);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (!event.target.matches("input, select")) arrow(event, 2);
  if (event.defaultPrevented || event.target.matches("select")) return;
  const number = Number(event.key);
  if (number >= 1 && number <= (view.volume?.images.length ?? 0)) { byId("modality").selectedIndex = number - 1; paint(); }
  KEYS[event.key]?.();
}

function startViewer() {
  const dialog = byId("viewer");
  dialog.addEventListener("keydown", onKey);
  dialog.addEventListener("close", () => { flickerOn(false); Object.assign(view, { entry: null, volume: null }); });
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous-case").addEventListener("click", () => neighbour(-1));
  byId("next-case").addEventListener("click", () => neighbour(1));
  byId("swap").addEventListener("click", swap);
  byId("slice").addEventListener("input", () => go(2, Number(byId("slice").value)));
  for (const id of ["modality", "show-map", "show-mask", "show-truth", "map-opacity", "mask-opacity", "drawn"]) byId(id).addEventListener("input", paint);
  byId("drawn").addEventListener("change", paint);
  byId("healthy").addEventListener("change", layOut);
  addEventListener("resize", debounce(() => { if (dialog.open) layOut(); }, 150));
}
