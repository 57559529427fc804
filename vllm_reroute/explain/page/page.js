"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const slider = document.getElementById("stage");
const tokenLine = document.getElementById("token");
const shade = document.getElementById("shade");
const panels = data.panels.map(buildPanel);
const panelOf = new Map();
panels.forEach((panel) => panel.tokens.forEach((token) => panelOf.set(token, panel)));
const stages = data.stages.map((stage) => ({
  ...stage,
  kept: new Set(stage.kept),
  back: new Set(stage.back),
  candidates: stage.ranks ? stage.ranks.filter((rank) => rank > 0).length : 0,
}));
let current = 0;
let shownToken = null;

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

function corners(box) {
  const [x, y, width, height] = box;
  return `M${x} ${y}h${width}v${height}h${-width}z`;
}

function buildPanel(given, index) {
  const figure = document.createElement("figure");
  const svg = element("svg", {
    viewBox: `0 0 ${given.width} ${given.height}`, role: "application", tabindex: 0, "aria-describedby": "help",
  });
  // No taller than the window, so that slider and picture are seen together.
  svg.style.maxWidth = `calc(78vh * ${given.width / given.height})`;
  element("image", { href: data.images[given.image], width: given.width, height: given.height, preserveAspectRatio: "none" }, svg);
  const step = Math.max(given.width, given.height) / 60;
  const hatch = element("pattern", {
    id: `hatch-${index}`, width: step, height: step, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
  }, element("defs", {}, svg));
  element("rect", { width: step, height: step, fill: "#8b919c", "fill-opacity": 0.9 }, hatch);
  element("rect", { width: step / 2, height: step, fill: "#b4b9c2", "fill-opacity": 0.9 }, hatch);
  const whole = corners([0, 0, given.width, given.height]);
  element("path", { class: "unseen", fill: `url(#hatch-${index})`, d: whole + given.boxes.map(corners).join("") }, svg);
  const rects = given.tokens.map((token, place) => {
    const [x, y, width, height] = given.boxes[place];
    const rect = element("rect", { class: "patch", x, y, width, height }, svg);
    rect.token = token;
    return rect;
  });
  const marks = element("g", {}, svg);
  const cursor = element("g", {}, svg);
  const caption = document.createElement("figcaption");
  figure.append(svg, caption);
  document.getElementById("pictures").append(figure);
  const panel = { ...given, svg, rects, marks, cursor, caption };
  svg.addEventListener("pointermove", (event) => pointAt(event.target.token));
  svg.addEventListener("pointerdown", (event) => pointAt(event.target.token));
  svg.addEventListener("keydown", (event) => moveCursor(event, panel));
  svg.addEventListener("focus", () => {
    if (!panel.tokens.includes(shownToken)) pointAt(panel.tokens[0]);
  });
  return panel;
}

function fate(stage, token) {
  if (stage.back.has(token)) return "came back";
  if (stage.kept.has(token)) return "runs";
  return stage.scores && stage.scores[token] === null ? "no candidate any more" : data.away;
}

function pointAt(token) {
  if (token === undefined) return;
  shownToken = token;
  showToken();
}

function showToken() {
  for (const panel of panels) panel.cursor.replaceChildren();
  if (shownToken === null) {
    tokenLine.textContent = "Point at a picture, or move there with Tab and the arrow keys.";
    return;
  }
  const stage = stages[current];
  const panel = panelOf.get(shownToken);
  const [x, y, width, height] = panel.boxes[panel.tokens.indexOf(shownToken)];
  element("rect", { class: "here outer", x, y, width, height }, panel.cursor);
  element("rect", { class: "here", x, y, width, height }, panel.cursor);
  const score = stage.scores && stage.scores[shownToken];
  const ranked = typeof score === "number"
    ? `score ${score.toPrecision(3)}, rank ${stage.ranks[shownToken]} of ${stage.candidates}`
    : "not ranked here";
  const strong = document.createElement("b");
  strong.textContent = fate(stage, shownToken);
  const past = stages.map((each, number) => `${number} ${fate(each, shownToken)}`).join(", ");
  tokenLine.replaceChildren(`Token ${shownToken}: `, strong, ` · ${ranked}. By stage: ${past}.`);
}

function moveCursor(event, panel) {
  const turn = { PageDown: 1, PageUp: -1 }[event.key];
  if (turn) {
    event.preventDefault();
    show(current + turn);
    return;
  }
  const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!direction) return;
  event.preventDefault();
  const from = panel.boxes[panel.tokens.indexOf(shownToken)] || panel.boxes[0];
  const middle = (box) => [box[0] + box[2] / 2, box[1] + box[3] / 2];
  let best = null;
  panel.boxes.forEach((box, place) => {
    const away = middle(box).map((value, axis) => value - middle(from)[axis]);
    const ahead = away[0] * direction[0] + away[1] * direction[1];
    const aside = Math.abs(away[0] * direction[1]) + Math.abs(away[1] * direction[0]);
    if (ahead < 1e-6 || aside > ahead) return;
    const cost = ahead + 4 * aside;
    if (!best || cost < best.cost) best = { cost, token: panel.tokens[place] };
  });
  if (best) pointAt(best.token);
}

function show(number) {
  current = Math.min(Math.max(number, 0), stages.length - 1);
  const stage = stages[current];
  slider.value = current;
  slider.setAttribute("aria-valuetext", `${stage.title}: ${stage.counts}`);
  document.getElementById("stage-title").textContent = stage.title;
  document.getElementById("stage-counts").textContent = stage.counts;
  document.querySelectorAll("tbody tr").forEach((row, index) => {
    if (index === current) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
  for (const panel of panels) paint(panel, stage);
  showToken();
}

function paint(panel, stage) {
  const shading = shade.checked && stage.ranks !== null;
  panel.svg.classList.toggle("shaded", shading);
  const back = [];
  const waits = [];
  panel.rects.forEach((rect, place) => {
    const token = rect.token;
    rect.classList.toggle("away", !stage.kept.has(token));
    if (shading) {
      const rank = stage.ranks[token];
      rect.style.setProperty("--low", rank ? (rank - 1) / Math.max(1, stage.candidates - 1) : 1);
    }
    if (stage.back.has(token)) back.push(panel.boxes[place]);
    if (!stage.kept.has(token)) waits.push(panel.boxes[place]);
  });
  panel.marks.replaceChildren();
  // Tells what waits from what runs where the picture itself is dark.
  const strike = ([x, y, width, height]) => `M${x} ${y + height}l${width} ${-height}`;
  if (!shading) element("path", { class: "strike", d: waits.map(strike).join("") }, panel.marks);
  element("path", { class: "back frame", d: back.map(corners).join("") }, panel.marks);
  const triangle = ([x, y, width, height]) => {
    const side = Math.min(width, height) / 3;
    return `M${x} ${y}h${side}l${-side} ${side}z`;
  };
  element("path", { class: "back corner", d: back.map(triangle).join("") }, panel.marks);
  const run = panel.tokens.filter((token) => stage.kept.has(token)).length;
  let words = `${panel.title}: ${run} of ${panel.tokens.length} run`;
  if (back.length) words += `, ${back.length} came back`;
  if (panel.placeless.length) {
    const others = panel.placeless.filter((token) => stage.kept.has(token)).length;
    words += `; of tokens that cover no part of it, ${others} of ${panel.placeless.length}`;
  }
  panel.caption.textContent = words;
  panel.svg.setAttribute("aria-label", `${stage.title}. ${words}.`);
}

slider.addEventListener("input", () => show(Number(slider.value)));
shade.addEventListener("change", () => show(current));
document.querySelectorAll("tbody button").forEach((button, index) => {
  button.disabled = false;
  button.addEventListener("click", () => show(index));
});
for (const id of ["controls", "legend", "help"]) document.getElementById(id).hidden = false;
const wide = panels.length > 6 ? "13rem" : panels.length > 1 ? "18rem" : "26rem";
document.getElementById("pictures").style.setProperty("--wide", wide);
show(0);
