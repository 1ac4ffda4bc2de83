// A picture with its detections drawn on it, as service/draw.py draws it: the same colours, order and labels.
//
// Everything is in pixels of the canvas, whose size is free: the window's for the page, the picture's for a file. Lines
// and letters grow with the shorter side.

import { decode, paste } from "./masks.js";

export const COLOURS = [
  [255, 90, 60], [40, 170, 255], [255, 200, 40], [60, 200, 110], [200, 110, 255], [255, 120, 190],
  [30, 200, 200], [255, 150, 60], [150, 210, 50], [120, 140, 255], [235, 80, 130], [190, 160, 110],
];
const VISIBLE = 0.05; // least score of a joint that is drawn
const OPACITY = 0.42; // of a mask
const CASING = "rgba(0, 0, 0, 0.45)"; // a dark edge under every line, so that it stands out on any picture

export const colourOf = (index) => COLOURS[index % COLOURS.length];
export const css = (colour) => `rgb(${colour.join(" ")})`;
export const percent = (score) => `${Math.round(score * 100)}%`;

/** Those above the confidence, as { index, detection }, the best first; the index keeps a detection's colour. */
export function shownOf(answer, confidence) {
  return answer.detections
    .map((detection, index) => ({ index, detection }))
    .filter(({ detection }) => detection.score >= confidence);
}

/**
 * Draws `scene` over the whole canvas. `scene` is { picture, answer, skeleton }: an image, the answer with
 * masks=probability, the model's pairs of joints. `options` is { confidence, threshold, boxes, masks, keypoints, labels,
 * singled, ratio }: what to show, the index of one detection to single out or null, and the device's pixels a CSS pixel.
 */
export function draw(canvas, scene, options) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(scene.picture, 0, 0, width, height);
  if (!scene.answer) return;
  const pen = penFor(context, scene.answer.image, options.ratio);
  const shown = shownOf(scene.answer, options.confidence);
  const order = [...shown].reverse(); // the best on top
  const isFaint = ({ index }) => options.singled !== null && options.singled !== index;
  const layers = [
    options.masks && ((each) => drawMask(pen, each, options.threshold)),
    options.boxes && ((each) => drawBox(pen, each)),
    options.keypoints && ((each) => drawSkeleton(pen, each, scene.skeleton)),
  ];
  for (const layer of layers.filter(Boolean))
    for (const each of order) {
      context.globalAlpha = isFaint(each) ? 0.18 : 1;
      layer(each);
    }
  context.globalAlpha = 1;
  if (options.labels) drawLabels(pen, shown.filter((each) => !isFaint(each)));
}

/** `at` and `boxOf` take the picture's pixels to the canvas's. */
function penFor(context, image, ratio) {
  const { width, height } = context.canvas;
  const [sx, sy] = [width / image.width, height / image.height];
  const shorter = Math.min(width, height);
  context.lineJoin = context.lineCap = "round";
  return {
    context,
    line: Math.max(1.5 * ratio, shorter / 320),
    text: Math.max(12 * ratio, shorter / 50),
    at: ([x, y]) => [x * sx, y * sy],
    boxOf: ([x1, y1, x2, y2]) => [x1 * sx, y1 * sy, x2 * sx, y2 * sy],
  };
}

function drawMask({ context, line, boxOf }, { index, detection }, threshold) {
  if (!detection.mask) return;
  detection.probabilities ??= decode(detection.mask);
  const { width, height } = context.canvas;
  const part = paste(detection.probabilities, boxOf(detection.mask.box), threshold, width, height);
  if (!part) return;
  const filled = filledCanvas(part, colourOf(index));
  const alpha = context.globalAlpha;
  context.globalAlpha = alpha * OPACITY;
  context.drawImage(filled, part.left, part.top);
  const margin = Math.ceil(line);
  context.globalAlpha = alpha * 0.9;
  context.drawImage(outlineOf(filled, line * 0.7, margin), part.left - margin, part.top - margin);
  context.globalAlpha = alpha;
}

function filledCanvas(part, [red, green, blue]) {
  const canvas = newCanvas(part.width, part.height);
  const pixels = new ImageData(part.width, part.height);
  const colour = new Uint32Array(new Uint8ClampedArray([red, green, blue, 255]).buffer)[0];
  const data = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < data.length; i++) data[i] = part.inside[i] * colour;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** A line of `width` just outside the mask: the mask moved all ways, less the mask. */
function outlineOf(filled, width, margin) {
  const canvas = newCanvas(filled.width + 2 * margin, filled.height + 2 * margin);
  const context = canvas.getContext("2d");
  for (let step = 0; step < 8; step++) {
    const angle = (step * Math.PI) / 4;
    context.drawImage(filled, margin + width * Math.cos(angle), margin + width * Math.sin(angle));
  }
  context.globalCompositeOperation = "destination-out";
  context.drawImage(filled, margin, margin);
  return canvas;
}

function drawBox({ context, line, boxOf }, { index, detection }) {
  const [x1, y1, x2, y2] = boxOf(detection.box);
  const inset = line / 2; // a box at the border keeps its whole line
  const { width, height } = context.canvas;
  const [left, top] = [Math.max(x1, inset), Math.max(y1, inset)];
  const [right, bottom] = [Math.min(x2, width - inset), Math.min(y2, height - inset)];
  context.beginPath();
  context.rect(left, top, Math.max(0, right - left), Math.max(0, bottom - top));
  strokeCased(context, line, css(colourOf(index)));
}

function drawSkeleton({ context, line, at }, { index, detection }, skeleton) {
  if (!detection.keypoints) return;
  const points = detection.keypoints;
  const seen = (joint) => points[joint][2] >= VISIBLE;
  context.beginPath();
  for (const [one, other] of skeleton ?? []) {
    if (!seen(one) || !seen(other)) continue;
    context.moveTo(...at(points[one]));
    context.lineTo(...at(points[other]));
  }
  strokeCased(context, line, css(colourOf(index)));
  for (const [joint, point] of points.entries()) {
    if (!seen(joint)) continue;
    context.beginPath();
    context.arc(...at(point), 1.6 * line, 0, 2 * Math.PI);
    strokeCased(context, line * 0.8, css(colourOf(index)));
    context.fillStyle = "#fff";
    context.fill();
  }
}

function strokeCased(context, width, colour) {
  context.strokeStyle = CASING;
  context.lineWidth = width * 1.8;
  context.stroke();
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.stroke();
}

/** None over another: what finds no place has no label. */
function drawLabels(pen, shown) {
  const taken = [];
  for (const { index, detection } of shown) {
    const free = placesOf(pen, detection).find((place) => !taken.some((other) => meet(place, other)));
    if (!free) continue;
    taken.push(free);
    drawLabel(pen, free, colourOf(index));
  }
}

/**
 * Where a label may stand, the best first, all within the picture: above its box, if need be with the score alone; below,
 * where it hides no face; inside, first where there is nothing above.
 */
function placesOf({ context, text, boxOf }, { label, score, box }) {
  const [x1, y1, x2, y2] = boxOf(box);
  const height = text * 1.45;
  const bottom = context.canvas.height - height;
  context.font = `600 ${text}px system-ui, sans-serif`;
  const [full, short] = [`${label} ${percent(score)}`, percent(score)].map((told) => {
    const width = context.measureText(told).width + (2 * text) / 3;
    const at = (x, y) => ({ told, x: clamp(x, context.canvas.width - width), y: clamp(y, bottom), width, height });
    return {
      above: y1 >= height ? [at(x1, y1 - height), at(x2 - width, y1 - height)] : [at(x1, y1), at(x2 - width, y1)],
      inside: [at(x1, y1), at(x2 - width, y1)],
      below: y2 <= bottom ? [at(x1, y2)] : [],
    };
  });
  return [full.above, short.above, full.below, short.below, full.inside, short.inside].flat();
}

const clamp = (at, most) => Math.max(0, Math.min(at, most));

const meet = (one, other) =>
  one.x < other.x + other.width && other.x < one.x + one.width && one.y < other.y + other.height && other.y < one.y + one.height;

function drawLabel({ context, text }, { told, x, y, width, height }, colour) {
  context.fillStyle = css(colour);
  context.beginPath();
  context.roundRect(x, y, width, height, text / 5);
  context.fill();
  context.fillStyle = inkOn(colour);
  context.textBaseline = "middle";
  context.fillText(told, x + text / 3, y + height / 2 + text * 0.04);
}

/** Black on light colours, white on dark ones, by the luma of ITU-R BT.601. */
function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 128 ? "#000" : "#fff";
}

export function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}
