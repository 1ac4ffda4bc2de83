// What stands beside the picture: the detections, the times, the choice of models.

import { colourOf, css } from "./draw.js";

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** `shown` as draw.js's shownOf gives it; `single` is called with an index, or null, to single a detection out. */
export function listFound(shown, confidence, single) {
  byId("found-count").textContent = `${shown.length}, from ${confidence.toFixed(2)} up`;
  byId("found-none").hidden = shown.length > 0;
  byId("found-none").textContent = "Nothing with that confidence.";
  byId("found").replaceChildren(...shown.map((each) => foundItem(each, single)));
}

function foundItem({ index, detection }, single) {
  const button = element("button", { type: "button" });
  button.dataset.index = index;
  button.setAttribute("aria-pressed", "false");
  button.append(swatch(index), element("span", { textContent: detection.label }));
  button.append(element("span", { className: "score", textContent: detection.score.toFixed(3) }));
  button.addEventListener("click", () => single(index, "kept"));
  button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && single(index, "passing"));
  button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && single(null, "passing"));
  const item = element("li");
  item.append(button);
  return item;
}

export function markFound(kept) {
  for (const button of byId("found").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === kept));
}

function swatch(index) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 8 8");
  svg.setAttribute("aria-hidden", "true");
  const square = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ width: 8, height: 8, rx: 2, fill: css(colourOf(index)) }))
    square.setAttribute(name, value);
  svg.append(square);
  return svg;
}

/** `timings` in milliseconds by stage, as the answer has them; `told` says what they are of. */
export function showTimes(timings, told) {
  const stages = Object.entries(timings);
  const total = stages.reduce((sum, [, ms]) => sum + ms, 0);
  byId("time-total").textContent = `${duration(total)} in the service`;
  byId("time-bar").replaceChildren(...stages.map(timePart));
  byId("time-stages").replaceChildren(...stages.map(timeLine));
  byId("time-told").textContent = told;
}

function timePart([, ms], index) {
  const part = element("span", { className: shade(index), hidden: !ms });
  part.style.flexGrow = ms; // by script: the page's policy allows no style in the markup
  return part;
}

function timeLine([name, ms], index) {
  const line = element("div", { className: shade(index) });
  line.append(element("dt", { textContent: name }), element("dd", { textContent: duration(ms) }));
  return line;
}

const shade = (index) => `tint-${index % 6}`; // of page.css, one a stage

export function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 10 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

/** Fills the choice from `GET /models`: every version that can be asked, the default first; hidden where it is one. */
export function listModels(listed) {
  const options = listed.models.flatMap((model) => choicesOf(model, listed.default));
  options.sort((one, other) => Number(other.dataset.default) - Number(one.dataset.default));
  byId("model").replaceChildren(...options);
  byId("model-choice").hidden = options.length < 2;
  byId("model-told").hidden = options.length > 1;
  byId("model-told").textContent = options[0]?.textContent ?? "";
}

/** A model's own name stands for the version that answers; its others are asked for by name@version. */
function choicesOf(model, defaultName) {
  const others = model.versions.filter(({ version }) => version !== model.version);
  const each = (version, value, isDefault) => {
    const state = version.state === "ready" ? "" : ` (${version.state})`;
    const option = element("option", { value, textContent: `${model.name} ${version.version}${state}` });
    option.disabled = version.state !== "ready";
    option.dataset.default = Number(isDefault);
    return option;
  };
  const own = each(model, model.name, model.name === defaultName);
  return [own, ...others.filter(({ state }) => state === "ready").map((one) => each(one, `${model.name}@${one.version}`))];
}

export function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
