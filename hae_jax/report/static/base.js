"use strict";
// What all parts of the page share. Text from files reaches the page through textContent alone.

const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// An element with attributes and children; "on..." attributes are listeners, null ones are left out.
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (digits < 3) return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: 3 });
}

// Definitions appear on hover and focus, and are read aloud.
let tips = 0;
function term(text, definition) {
  if (!definition) return make("span", {}, text);
  const id = `tip-${tips++}`;
  const tip = byId("tip");
  const show = (event) => {
    tip.textContent = definition;
    tip.hidden = false;
    const box = event.currentTarget.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    const below = box.bottom + 6;
    tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  return make("span", { class: "term", tabindex: "0", "aria-describedby": id, onmouseenter: show, onmouseleave: hide,
                        onfocus: show, onblur: hide },
    text, make("span", { id, class: "hidden" }, definition));
}

function describe(list, pairs) {
  for (const [name, text] of pairs) list.append(make("dt", {}, name), make("dd", {}, text));
}

// Pictures lie in the page, or in files beside it that call haePictures when they are loaded.
const inside = new Map([...document.querySelectorAll("script.pictures")].map((own) => [own.dataset.name, own]));
const arrived = new Map();
function haePictures(name, content) { arrived.set(name, content); }

async function pictures(name) {
  if (inside.has(name)) return JSON.parse(inside.get(name).textContent);
  const address = Object.hasOwn(report.outside, name) ? report.outside[name] : null;
  if (!address) return null;
  await new Promise((resolve, reject) => {
    const tag = make("script", { src: address, onload: resolve, onerror: () => reject(
      new Error(`pictures are missing; the page needs the folder ${address.split("/")[0]} beside it`)) });
    document.head.append(tag);
    tag.remove();
  });
  const content = arrived.get(name);
  arrived.delete(name); // one case in memory at a time
  return content;
}

function debounce(call, milliseconds) {
  let timer;
  return () => { clearTimeout(timer); timer = setTimeout(call, milliseconds); };
}
