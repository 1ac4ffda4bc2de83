// A picture from the camera: a live view where the browser gives one, which it does on https and on the own machine
// alone; else the camera of a phone, by way of its file dialogue.

import { newCanvas } from "./draw.js";
import { byId } from "./panel.js";

/** Wires the dialogue; `use(blob, name)` gets the picture. Returns what opens it. */
export function camera(use) {
  const dialog = byId("camera");
  const video = byId("video");
  byId("shoot").addEventListener("click", async () => {
    const blob = await frameOf(video);
    dialog.close();
    use(blob, "camera.jpg");
  });
  byId("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => stop(video));
  return () => (navigator.mediaDevices?.getUserMedia ? open(dialog, video) : byId("file-camera").click());
}

async function open(dialog, video) {
  byId("shoot").disabled = true;
  byId("camera-told").textContent = "Waiting for the camera…";
  dialog.showModal();
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1440 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
    if (!dialog.open) return stop(video); // closed while the browser was asking
    await video.play();
    byId("camera-told").textContent = "";
    byId("shoot").disabled = false;
    byId("shoot").focus();
  } catch (error) {
    const denied = error.name === "NotAllowedError";
    byId("camera-told").textContent = denied ? "The browser may not use the camera: allow it for this page." : "No camera was found.";
  }
}

function stop(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

function frameOf(video) {
  const canvas = newCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
}
