// The page: a picture goes to the service once, and what the controls change is drawn again from its answer.
//
// The service is asked for everything from a low confidence on, with masks as probabilities, so that neither slider needs
// it again until one goes below what was asked for. JSON is taken from the service itself, by the very request that the
// curl line makes, so that it is the service's answer and not the page's.

import { camera } from "./camera.js";
import { draw, newCanvas, percent, shownOf } from "./draw.js";
import { byId, duration, element, listFound, listModels, markFound, showTimes } from "./panel.js";
import { Problem, curlLine, detect, key, modelNamed, models } from "./service.js";

const LOW = 0.1; // confidence that is asked for at first: lower ones cost the heads more than they show
const TOGGLES = ["boxes", "masks", "keypoints", "labels"];

const state = {
  listed: null, // of GET /models
  model: null, // of GET /models/{name}, the chosen one
  picture: null, // { blob, name, image }; image is null until the browser has read it, or where it cannot
  answer: null,
  skeleton: null, // of the model that gave it
  asked: LOW, // the confidence of `answer`
  kept: null, // index of the detection that was clicked
  passing: null, // and of the one under the mouse
  request: null, // AbortController of the one under way
  json: {}, // the last that was taken: { picture, query, text }
};

const numberOf = (id) => Number(byId(id).value);
const isOn = (id) => byId(id).checked && !byId(id).disabled;

// ---- the models

async function start() {
  try {
    state.listed = await models();
    listModels(state.listed);
    await chooseModel();
    byId("key-panel").hidden = !key.get();
  } catch (problem) {
    startLater(problem);
  }
}

function startLater(problem) {
  if (problem.status === 401) {
    byId("key-panel").hidden = false;
    byId("model-told").textContent = key.get() ? "This API key is not known here" : "This service asks for an API key";
  } else {
    byId("model-told").textContent = problem.title ?? "";
    setTimeout(start, 3000);
  }
}

async function chooseModel() {
  const name = byId("model").value || state.listed.default;
  state.model = await modelNamed(name);
  if (state.model.state === "loading") {
    byId("model-told").textContent = `${state.model.name} is being loaded…`;
    setTimeout(start, 1500);
  }
  fitControls();
}

/** What the model cannot do is switched off, and the sliders get its limits. */
function fitControls() {
  const { stages = [], thresholds } = state.model;
  byId("masks").disabled = !stages.includes("masks");
  byId("keypoints").disabled = !stages.includes("keypoints");
  byId("threshold").disabled = byId("masks").disabled;
  if (!thresholds) return;
  byId("confidence").min = Math.max(0.01, Math.ceil(thresholds.score_floor * 100) / 100);
  byId("threshold").value = thresholds.mask;
  showValues();
}

// ---- asking

/** The options of the request whose answer is the JSON: what is shown, in the service's own words. */
function queryShown() {
  const query = { confidence: numberOf("confidence") };
  if (byId("model").value && byId("model").value !== state.listed?.default) query.model = byId("model").value;
  if (!byId("masks").disabled && !byId("masks").checked) query.masks = "none";
  if (isOn("masks") && numberOf("threshold") !== state.model?.thresholds?.mask) query.mask_threshold = numberOf("threshold");
  if (!byId("keypoints").disabled && !byId("keypoints").checked) query.keypoints = "false";
  return query;
}

/** The options of the request that is drawn from. */
function queryDrawn() {
  const floor = Number(byId("confidence").min);
  const confidence = numberOf("confidence") < LOW ? floor : Math.max(LOW, floor);
  return { confidence, masks: "probability", ...(byId("model").value && { model: byId("model").value }) };
}

async function ask() {
  const picture = state.picture;
  if (!picture) return;
  state.request?.abort();
  const request = (state.request = new AbortController());
  enter("busy");
  try {
    const query = queryDrawn();
    const begun = performance.now();
    const answer = await (await detect(picture.blob, query, request.signal)).json();
    const wallMs = performance.now() - begun;
    picture.image ??= await shownByService(picture.blob, query.model, request.signal);
    if (request.signal.aborted) return;
    const skeleton = state.model?.keypoints?.skeleton ?? [];
    Object.assign(state, { answer, skeleton, asked: query.confidence, kept: null, passing: null });
    const told = `${duration(wallMs)} from here, for all ${answer.detections.length} from ${query.confidence} up`;
    showTimes(answer.timings_ms, told);
    byId("picture-told").textContent = `${picture.name}, ${answer.image.width} × ${answer.image.height}`;
    enter("ready");
    show();
  } catch (problem) {
    if (!request.signal.aborted) fail(problem);
  }
}

/** Of a kind that the service reads and this browser does not: as PNG, with nothing on it. */
async function shownByService(blob, model, signal) {
  const query = { format: "png", masks: "none", keypoints: "false", confidence: 1, ...(model && { model }) };
  return createImageBitmap(await (await detect(blob, query, signal)).blob());
}

async function use(blob, name) {
  if (!blob) return;
  state.request?.abort();
  const picture = (state.picture = { blob, name, image: null });
  Object.assign(state, { answer: null, kept: null, passing: null });
  enter("busy");
  picture.image = await createImageBitmap(blob).catch(() => null);
  if (state.picture !== picture) return;
  byId("picture-told").textContent = name;
  redraw();
  await ask();
}

function enter(name) {
  byId("stage").dataset.state = name;
  byId("stage").setAttribute("aria-busy", String(name === "busy"));
  byId("empty").hidden = name !== "empty";
  byId("problem").hidden = name !== "problem";
  byId("busy").hidden = name !== "busy";
  byId("take").hidden = byId("time").hidden = !state.answer;
  if (name === "busy") tell("Looking…");
}

function fail(problem) {
  const known = problem instanceof Problem ? problem : new Problem("The page failed", String(problem));
  state.answer = null;
  byId("problem-title").textContent = known.title;
  byId("problem-detail").textContent = known.detail;
  byId("problem-more").textContent = known.status ? `Status ${known.status}, request ${known.requestId}` : "";
  byId("found").replaceChildren();
  byId("found-count").textContent = "";
  if (known.status === 401) byId("key-panel").hidden = false;
  enter("problem");
  if (known.status === 401) byId("key").focus();
}

// ---- showing

function options(ratio, singled) {
  const shown = Object.fromEntries(TOGGLES.map((name) => [name, isOn(name)]));
  return { ...shown, confidence: numberOf("confidence"), threshold: numberOf("threshold"), singled, ratio };
}

/** Everything that depends on the controls. */
function show() {
  showValues();
  byId("curl").textContent = state.picture ? curlLine(state.picture.name, queryShown()) : "";
  if (!state.answer) return;
  const shown = shownOf(state.answer, numberOf("confidence"));
  listFound(shown, numberOf("confidence"), single);
  markFound(state.kept);
  const told = shown.map(({ detection }) => `${detection.label} ${percent(detection.score)}`).join(", ");
  byId("canvas").setAttribute("aria-label", `${state.picture.name}: ${told || "nothing found"}`);
  tell(`${shown.length} found`);
  redraw();
}

function showValues() {
  for (const id of ["confidence", "threshold"]) byId(`${id}-told`).textContent = numberOf(id).toFixed(2);
}

function single(index, how) {
  if (how === "kept") state.kept = state.kept === index ? null : index;
  else state.passing = index;
  markFound(state.kept);
  redraw();
}

let frame = 0;
function redraw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (state.picture?.image) paint(byId("canvas"), state.picture.image);
  });
}

/** As large as fits the stage, in the device's own pixels. */
function paint(canvas, image) {
  const stage = byId("stage");
  const ratio = window.devicePixelRatio || 1;
  const { width, height } = state.answer?.image ?? image;
  const zoom = Math.min(stage.clientWidth / width, stage.clientHeight / height);
  const [wide, high] = [width, height].map((side) => Math.max(1, Math.round(side * zoom * ratio)));
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  stage.style.setProperty("--aspect", width / height);
  canvas.style.width = `${wide / ratio}px`;
  canvas.style.height = `${high / ratio}px`;
  const scene = { picture: scaled(image, wide, high), answer: state.answer, skeleton: state.skeleton };
  draw(canvas, scene, options(ratio, state.passing ?? state.kept));
}

/** Scaled once for each size: a photo of many megapixels would make every step of a slider slow. */
let kept = { image: null, canvas: null };
function scaled(image, width, height) {
  if (kept.image !== image || kept.canvas.width !== width || kept.canvas.height !== height) {
    const canvas = newCanvas(width, height);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    kept = { image, canvas };
  }
  return kept.canvas;
}

function tell(words) {
  byId("told").textContent = words;
}

// ---- taking

/** The answer to the curl line, as it came; asked for once for each setting. */
async function jsonText() {
  const { picture } = state;
  const options = queryShown();
  const query = JSON.stringify(options);
  if (state.json.picture !== picture || state.json.query !== query)
    state.json = { picture, query, text: await (await detect(picture.blob, options)).text() };
  return state.json.text;
}

function drawnPicture() {
  const { width, height } = state.answer.image;
  const canvas = newCanvas(width, height);
  const scene = { picture: state.picture.image, answer: state.answer, skeleton: state.skeleton };
  draw(canvas, scene, options(1, state.kept));
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

function save(blob, ending) {
  const stem = state.picture.name.replace(/\.\w+$/, "");
  const link = element("a", { href: URL.createObjectURL(blob), download: `${stem}${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Browsers give the clipboard to secure pages alone; elsewhere the old command still works. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser refuses to copy");
}

/** The promise itself, not its picture: browsers forget the click while that is drawn. */
const copyPicture = () => navigator.clipboard.write([new ClipboardItem({ "image/png": drawnPicture() })]);

/** Does it and says so on the button itself. */
function onTake(id, said, act) {
  const button = byId(id);
  const name = button.textContent;
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await act();
      button.textContent = said;
    } catch (problem) {
      button.textContent = problem.title ?? "It failed";
    }
    button.disabled = false;
    button.focus();
    tell(button.textContent);
    setTimeout(() => (button.textContent = name), 1500);
  });
}

// ---- wiring

function wireSources() {
  byId("choose").addEventListener("click", () => byId("file").click());
  for (const id of ["file", "file-camera"])
    byId(id).addEventListener("change", ({ target }) => {
      use(target.files[0], target.files[0]?.name);
      target.value = ""; // so that the same file can be chosen again
    });
  byId("use-camera").addEventListener("click", camera(use));
  byId("sample").addEventListener("click", async () => use(await (await fetch("web/sample.jpg")).blob(), "sample.jpg"));
  byId("again").addEventListener("click", ask);
  document.addEventListener("paste", ({ clipboardData }) => {
    const file = [...clipboardData.files][0];
    if (file) use(file, file.name || "pasted.png");
  });
}

function wireDrop() {
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0; // dragenter and dragleave come for every element on the way
  const mark = (change) => document.body.classList.toggle("dropping", (depth = Math.max(0, depth + change)) > 0);
  document.addEventListener("dragenter", (event) => isFile(event) && mark(1));
  document.addEventListener("dragleave", (event) => isFile(event) && mark(-1));
  document.addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(-depth);
    const file = event.dataTransfer.files[0];
    use(file, file?.name);
  });
}

function wireControls() {
  for (const id of [...TOGGLES, "threshold"]) byId(id).addEventListener("input", show);
  byId("confidence").addEventListener("input", show);
  byId("confidence").addEventListener("change", () => numberOf("confidence") < state.asked && state.answer && ask());
  byId("model").addEventListener("change", async () => {
    await chooseModel().catch(fail);
    await ask();
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    key.set(byId("key").value.trim());
    await start();
    if (state.listed) await ask();
  });
  new ResizeObserver(redraw).observe(byId("stage"));
}

function wireTaking() {
  onTake("save-picture", "Saved", async () => save(await drawnPicture(), "-drawn.png"));
  onTake("save-json", "Saved", async () => save(new Blob([await jsonText()], { type: "application/json" }), ".json"));
  onTake("copy-json", "Copied", async () => copy(await jsonText()));
  byId("copy-picture").hidden = !navigator.clipboard?.write || !("ClipboardItem" in window); // no way but a secure page's
  onTake("copy-picture", "Copied", copyPicture);
  onTake("copy-curl", "Copied", () => copy(byId("curl").textContent));
}

wireSources();
wireDrop();
wireControls();
wireTaking();
start();
