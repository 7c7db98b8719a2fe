"use strict";
// Volumes out of sheets of axial slices, and planes out of volumes. Axes run to the patient's left, back and top.

const PLANES = { // u runs to the right of the screen, v down; "up" turns the axis that runs to the top of the head
  axial: { name: "Axial", u: 0, v: 1, w: 2, up: false, left: "R", right: "L", top: "A", bottom: "P" },
  coronal: { name: "Coronal", u: 0, v: 2, w: 1, up: true, left: "R", right: "L", top: "S", bottom: "I" },
  sagittal: { name: "Sagittal", u: 1, v: 2, w: 0, up: true, left: "A", right: "P", top: "S", bottom: "I" },
};

// One byte for each voxel, x fastest.
async function decode(sheets, { shape, tile, columns, perSheet }) {
  const [nx, ny, nz] = shape;
  const volume = new Uint8Array(nx * ny * nz);
  for (const [number, address] of sheets.entries()) {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const { data, width } = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let z = number * perSheet; z < Math.min(nz, (number + 1) * perSheet); z++) {
      const place = z - number * perSheet;
      const left = (place % columns) * tile[0];
      const top = Math.floor(place / columns) * tile[1];
      for (let y = 0; y < ny; y++) {
        let from = ((top + y) * width + left) * 4;
        let to = (z * ny + y) * nx;
        for (let x = 0; x < nx; x++, from += 4) volume[to++] = data[from];
      }
    }
  }
  return volume;
}

// The size of a plane in voxels and in mm.
function planeSize({ shape, spacing }, plane) {
  return { width: shape[plane.u], height: shape[plane.v], mmWide: shape[plane.u] * spacing[plane.u],
           mmHigh: shape[plane.v] * spacing[plane.v] };
}

// A function (column, row) -> position in the volume, for the plane through `at`.
function cut({ shape }, plane, at) {
  const strides = [1, shape[0], shape[0] * shape[1]];
  const start = at[plane.w] * strides[plane.w];
  const last = shape[plane.v] - 1;
  return (column, row) => start + column * strides[plane.u] + (plane.up ? last - row : row) * strides[plane.v];
}

// Colours of the map: the inferno scale of matplotlib at nine places, dark to bright also without colour vision.
const INFERNO = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10],
                 [249, 201, 50], [252, 255, 164]];
const HEAT = Array.from({ length: 256 }, (_, value) => {
  const place = (value / 255) * (INFERNO.length - 1);
  const i = Math.min(INFERNO.length - 2, Math.floor(place));
  return INFERNO[i].map((from, c) => from + (INFERNO[i + 1][c] - from) * (place - i));
});

// Millimetres of the scanner: [x, y, z] to the right, front and top.
function millimetres({ affine, origin }, at) {
  const voxel = at.map((value, i) => value + origin[i]);
  return affine.map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
}

function position(volume, at) {
  const [x, y, z] = millimetres(volume, at);
  const side = (value, plus, minus) => `${Math.abs(value).toFixed(1)} mm ${value >= 0 ? plus : minus}`;
  return `${side(x, "R", "L")}, ${side(y, "A", "P")}, ${side(z, "S", "I")}`;
}
