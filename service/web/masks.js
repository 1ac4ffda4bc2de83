// Mask probabilities to pixels, in closed form, at any size and any threshold: the rule of service/masks.py.
//
// A mask is M x N probabilities stretched over its box; between their centres it is bilinear, around them is a ring of
// zeros, and a pixel is foreground where the value at its centre is at least the threshold. Along a row of pixels the
// value is a straight line between two cell centres, so that a row is a few spans whose ends are where the lines cross
// the threshold: no pixel is evaluated.

/** The probabilities of `masks=probability`, with the ring of zeros: { rows, columns, values } without the ring. */
export function decode(mask) {
  const [rows, columns] = mask.size;
  const bytes = atob(mask.data);
  const stride = columns + 2;
  const values = new Float64Array((rows + 2) * stride);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++)
      values[(i + 1) * stride + j + 1] = bytes.charCodeAt(i * columns + j) / 255;
  return { rows, columns, values };
}

/**
 * The part of a grid of `width` x `height` pixels that a mask can touch: { left, top, width, height, inside }, where
 * `inside` has a one for each foreground pixel, row by row; null where there is no such part.
 *
 * `box` is x1, y1, x2, y2 in pixels of the grid, the centre of the first pixel at 0.5: for a grid of another size than
 * the picture's, scale the box.
 */
export function paste(probabilities, box, threshold, width, height) {
  const { rows, columns } = probabilities;
  const across = axis(box[0], box[2], columns, width);
  const down = axis(box[1], box[3], rows, height);
  if (!across || !down) return null;
  const part = { left: across.first, top: down.first, width: across.count, height: down.count };
  const inside = new Uint8Array(part.width * part.height);
  const profile = new Float64Array(columns + 2);
  for (let y = 0; y < part.height; y++) {
    blend(probabilities, (down.first + y + 0.5 - down.low) * down.scale + 0.5, threshold, profile);
    fillSpans(profile, across, inside.subarray(y * part.width, (y + 1) * part.width));
  }
  return { ...part, inside };
}

/** Whether the foreground has any pixel, and how many. */
export function area(part) {
  return part ? part.inside.reduce((sum, one) => sum + one, 0) : 0;
}

function axis(low, high, cells, length) {
  const scale = cells / (high - low);
  if (!(high > low) || !Number.isFinite(scale)) return null;
  const reach = 0.5 / scale + 1; // half a cell beyond the box, where the mask fades into background
  const first = Math.max(0, Math.floor(low - reach));
  const end = Math.min(length, Math.ceil(high + reach));
  return end > first ? { low, scale, first, count: end - first } : null;
}

/** Values less the threshold at every cell centre, at one height: `at` is in cells, the ring's centre is 0. */
function blend({ rows, columns, values }, at, threshold, profile) {
  const stride = columns + 2;
  const row = Math.floor(at);
  if (row < 0 || row > rows) {
    profile.fill(-threshold);
    return;
  }
  const part = at - row;
  for (let j = 0, above = row * stride; j < stride; j++, above++)
    profile[j] = values[above] + part * (values[above + stride] - values[above]) - threshold;
}

function fillSpans(profile, { low, scale, first, count }, line) {
  const place = (cell) => (cell - 0.5) / scale + low - 0.5 - first; // in pixel indices of the line
  let start = null;
  for (let j = 0; j + 1 < profile.length; j++) {
    const here = profile[j];
    const next = profile[j + 1];
    if (here >= 0 === next >= 0) continue;
    const crossing = place(j + here / (here - next));
    if (next >= 0) start = Math.max(0, Math.ceil(crossing));
    else line.fill(1, start, Math.max(start, Math.min(count, Math.floor(crossing) + 1)));
  }
}
