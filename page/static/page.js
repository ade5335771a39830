"use strict";
// The page: settings, drawing requests and what comes back. Everything goes to this machine's own service.

const REST_MS = 600; // the pen rests that long before the full setting is drawn
const WATCH_MS = 500; // between looks at the progress
const DEFAULT_METHOD = "ab2"; // ODE_METHOD of the commands
const SKETCH_STEPS = 2; // of a first, rough look at one image
const LONG_PREVIEW = 1; // seconds; a preview that takes longer comes after a sketch
const byId = (id) => document.getElementById(id);
let model, editor, reply, shownIndex = 0, count = 1, frames = null;
let running = null, restTimer = 0, changeTime = 0, isFresh = false; // fresh: the image belongs to the mask and settings
let pace = 0; // seconds per network call and pixel, of the latest drawing
let look = null, looks = null, reference = null, referencePicture = ""; // chosen look, training images' looks with pictures, own image's look

// ---------------------------------------------------------------------------------------------------- service

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The page's service does not answer. Does app.py still run?");
  }
  let values;
  try {
    values = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The page's service broke off its answer. Does app.py still run?");
  }
  const checkpoint = response.headers.get("X-Checkpoint");
  if (model && checkpoint && checkpoint !== model.checkpoint) {
    throw new Error("app.py runs with another checkpoint now. Reload this page to use it: your drawing stays.");
  }
  if (!response.ok) throw new Error(values.error);
  return values;
}

/** Send a file, or values as JSON. */
function post(path, values, signal) {
  return ask(path, { method: "POST", body: values instanceof Blob ? values : JSON.stringify(values), signal });
}

function toBase64(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}

function fromBase64(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let index = 0; index < bytes.length; index += 1) bytes[index] = letters.charCodeAt(index);
  return bytes;
}

/** 16-bit numbers, low byte first, whatever this machine's own order is. */
function packLabel(label) {
  const bytes = new Uint8Array(2 * label.length);
  for (let index = 0; index < label.length; index += 1) {
    bytes[2 * index] = label[index] & 255;
    bytes[2 * index + 1] = label[index] >> 8;
  }
  return toBase64(bytes);
}

function unpackLabel(text) {
  const bytes = fromBase64(text);
  const label = new Uint16Array(bytes.length / 2);
  for (let index = 0; index < label.length; index += 1) label[index] = bytes[2 * index] | (bytes[2 * index + 1] << 8);
  return label;
}

// ---------------------------------------------------------------------------------------------------- drawing

const STAGES = { // of a drawing, one after another; `words` for the user
  sketch: { next: "preview", words: "Rough sketch" },
  preview: { next: "full", words: "Preview" },
  full: { next: null, words: "Final image" },
};

function solverOf(stage) {
  if (stage === "full") return { method: byId("method").value, num_steps: wholeOf("steps") };
  return { method: "ab2", num_steps: stage === "sketch" ? SKETCH_STEPS : wholeOf("preview") };
}

function request(stage) {
  return {
    width: editor.width, height: editor.height, label: packLabel(editor.label), kind: editor.kind,
    blur: Number(byId("blur").value), seed: wholeOf("seed"), count, ...solverOf(stage),
    cfg_scale: model.has_guidance ? Number(byId("guidance").value) : 1, look,
    only: stage === "sketch" ? Math.min(shownIndex, count - 1) : null,
  };
}

/** Seconds that a preview is likely to take. */
function previewSeconds() { return pace * (wholeOf("preview") + 1) * count * editor.label.length; }

/** A number field as a whole number within its own bounds. */
function wholeOf(id) {
  const field = byId(id);
  const value = Math.round(Number(field.value) || 0);
  return Math.min(Number(field.max || Number.MAX_SAFE_INTEGER), Math.max(Number(field.min || 0), value));
}

function stop() {
  clearTimeout(restTimer);
  if (running) running.abort();
  running = null;
  setState("idle");
}

function setState(state) {
  document.body.dataset.state = state;
  document.body.dataset.busy = running ? 1 : 0;
  byId("busy").hidden = true;
  for (const name of ["style", "aria-valuenow"]) byId("progress").removeAttribute(name);
}

const WORDS = { way: "From noise to image", looks: "Looks", layout: "Random layout", mask: "Mask", cells: "Cells" };
for (const [stage, { words }] of Object.entries(STAGES)) WORDS[stage] = words;

/** Show how far a request is, until it ends or another one replaces it. */
async function watch(own, ticket, state) {
  for (;;) {
    await new Promise((done) => { setTimeout(done, WATCH_MS); });
    if (running !== own) return;
    let progress;
    try {
      progress = await ask(`/api/progress?${new URLSearchParams({ of: ticket })}`);
    } catch (error) {
      return; // the request itself says what is wrong
    }
    if (running === own && progress.state !== "unknown") showProgress(WORDS[state], progress);
  }
}

function showProgress(what, { state, share, seconds }) {
  const left = share > 0 ? seconds * (1 - share) / share : 0;
  const parts = state === "waiting" ? ["waits for other requests"] : [`${Math.round(100 * share)} %`];
  if (left >= 1) parts.push(left < 90 ? `about ${Math.ceil(left)} s left` : `about ${Math.round(left / 60)} min left`);
  byId("busy_text").textContent = [what, ...parts].join(" · ");
  byId("stop").textContent = "Stop";
  byId("busy").hidden = false;
  if (!(share > 0)) return;
  byId("progress").style.setProperty("--share", share);
  byId("progress").ariaValueNow = Math.round(100 * share);
}

/** The user does not want to wait; the button draws after all. */
function stopOrDraw() {
  if (!running) {
    changed();
    return;
  }
  stop();
  offerToDraw("Stopped");
}

/** What was asked for in place of a drawing has failed. */
function offerIfUnfinished() {
  if (byId("copy").disabled) offerToDraw("Stopped");
}

function offerToDraw(why) {
  byId("busy_text").textContent = why;
  byId("status").textContent = why;
  byId("stop").textContent = "Draw";
  byId("busy").hidden = false;
}

/** Something that decides the image has changed: a preview at once, after a sketch if it takes long, then all steps. */
function changed() {
  stop();
  changeTime = performance.now();
  forgetWay();
  setFresh(false);
  showCount();
  showOutlines();
  keep();
  hideError();
  draw(previewSeconds() > LONG_PREVIEW ? "sketch" : "preview");
}

/** Whether the image belongs to the mask and the settings. An older one is shown pale, if it stays for long. */
function setFresh(value, isFinal = false) {
  isFresh = value;
  for (const id of ["picture", "thumbs", "verdict"]) byId(id).classList.toggle("stale", !value);
  byId("way").disabled = !isFinal;
  for (const id of ["image", "mask", "sheet"]) document.querySelector(`[data-file="${id}"]`).disabled = !isFinal;
  byId("copy").disabled = !isFinal;
}

function forgetWay() {
  frames = null;
  byId("way").value = byId("way").max;
}

let changeTimer = 0;
function changedSoon() {
  clearTimeout(changeTimer);
  changeTimer = setTimeout(changed, 150);
}

async function draw(stage) {
  await onlyRequest(stage, "/api/draw", request(stage), (values) => {
    pace = values.seconds / values.nfe / values.images.length / editor.label.length;
    if (stage === "sketch") {
      showSketch(values);
      draw("preview");
      return;
    }
    show(values, stage);
    setState(stage === "preview" ? "previewed" : "done");
    if (stage === "preview") restTimer = setTimeout(() => draw("full"), Math.max(0, REST_MS - (performance.now() - changeTime)));
    else if (model.looks && looks === null) loadLooks();
  }, () => offerToDraw("Not drawn"));
}

/** Ask for something that any later request replaces. `done` gets the answer; `failed` comes before the message. */
async function onlyRequest(state, path, body, done, failed = offerIfUnfinished, query = {}) {
  const own = new AbortController();
  running = own;
  setState(state);
  const ticket = crypto.getRandomValues(new Uint32Array(4)).join("-");
  watch(own, ticket, state);
  try {
    const values = await post(`${path}?${new URLSearchParams({ ...query, ticket })}`, body, own.signal);
    if (running !== own) return;
    running = null;
    done(values);
  } catch (error) {
    if (error.name === "AbortError" || running !== own) return;
    stop();
    failed();
    showError(error.message);
  }
}

function show(values, stage) {
  reply = values;
  shownIndex = Math.min(shownIndex, values.images.length - 1);
  setFresh(true, stage === "full");
  showImage();
  const hadFocus = byId("thumbs").contains(document.activeElement);
  const thumbs = values.images.length > 1 ? values.images.map(thumbOf) : [];
  byId("thumbs").replaceChildren(...thumbs);
  byId("thumbs").classList.toggle("many", thumbs.length > 6);
  choose(byId("thumbs"), thumbs[shownIndex]);
  if (hadFocus && thumbs.length) thumbs[shownIndex].focus();
  showSeen(values);
  showCommand(values.command);
  showStage(stage, values);
}

/** A rough image in place of the one that is shown; the others stay pale. */
function showSketch(values) {
  setFresh(true);
  byId("thumbs").classList.add("stale");
  for (const thumb of byId("thumbs").children) thumb.disabled = true;  // images of an older mask
  byId("image").src = `data:image/png;base64,${values.images[0].picture}`;
  byId("image").hidden = false;
  byId("image").alt = "Rough sketch of the image";
  byId("verdict").hidden = true;
  showOutlines();
  showSeen(values);
  showStage("sketch", values);
}

function showSeen(values) {
  byId("sees").src = `data:image/png;base64,${values.mask_picture}`;
  byId("sees").hidden = false;
}

function showStage(stage, values) {
  const { method, num_steps: steps } = solverOf(stage);
  const words = STAGES[stage].words + (values.images.length > 1 ? `, ${values.images.length} images` : "");
  byId("status").textContent = `${words} · ${steps} steps (${method}) · ${values.seconds.toFixed(1)} s`;
  byId("status").title = `${values.nfe} network calls`;
}

/** A command line that breaks between its words only, not at their hyphens. */
function showCommand(line) {
  byId("command").replaceChildren(...line.split(" ").flatMap((word) => {
    const part = document.createElement("span");
    part.textContent = word;
    return [part, " "];
  }));
}

function showImage() {
  byId("image").src = `data:image/png;base64,${reply.images[shownIndex].picture}`;
  byId("image").hidden = false;
  const all = reply.images.length;
  byId("image").alt = all > 1 ? `Image ${shownIndex + 1} of ${all}` : "Image of the mask";
  byId("which").textContent = `${shownIndex + 1} of ${all}`;
  byId("which").hidden = all === 1;
  const verdict = reply.verdicts[shownIndex];
  byId("verdict").hidden = !verdict || !isFresh;
  showOutlines();
  if (!verdict) return;
  const keys = ["drawn", "found"].map((name) => {
    const key = document.createElement("span");
    key.className = `key ${name}`;
    return key;
  });
  const dice = ` found in the image by a segmenter · Dice ${verdict.dice.toFixed(3)}`;
  byId("verdict").replaceChildren(keys[0], "drawn · ", keys[1], dice);
}

/** Outlines over the image: of the drawn mask and, with a judge, of what it finds. */
function showOutlines() {
  const maps = [{ width: editor.width, height: editor.height, label: editor.label, color: "#ffd34d" }];
  const verdict = isFresh && !byId("verdict").hidden && reply.verdicts[shownIndex];
  if (verdict) maps.push({ ...verdict, label: unpackLabel(verdict.label), color: "#4dd2ff" });
  showBorders(byId("outline"), maps, viewOfImage());
}

/** The place and scale of the canvas, in pixels of the image's square: both show the same part. */
function viewOfImage() {
  const ratio = byId("outline").clientWidth / (editor.canvas.clientWidth || 1);
  return { left: ratio * editor.left, top: ratio * editor.top, scale: ratio * editor.scale };
}

/** The image follows the zoom of the canvas. */
function followView() {
  const { left, top, scale } = viewOfImage();
  const [width, height] = [byId("outline").clientWidth, byId("outline").clientHeight];
  const fit = Math.min(width / editor.width, height / editor.height) || 1;
  const zoom = scale / fit;
  const [right, down] = [left - zoom * (width - fit * editor.width) / 2, top - zoom * (height - fit * editor.height) / 2];
  byId("image").style.transform = editor.isFit ? "none" : `translate(${right}px, ${down}px) scale(${zoom})`;
  showOutlines();
}

function thumbOf(image, index) {
  const button = document.createElement("button");
  const picture = document.createElement("img");
  picture.src = `data:image/png;base64,${image.picture}`;
  const verdict = reply.verdicts[index];
  button.title = `Image ${index + 1} of ${reply.images.length}${verdict ? `, Dice ${verdict.dice.toFixed(3)}` : ""}`;
  picture.alt = button.title;
  button.append(picture);
  button.addEventListener("click", () => {
    shownIndex = index;
    choose(byId("thumbs"), button);
    forgetWay();
    showImage();
  });
  return button;
}

async function showWay() {
  if (!reply) return;
  if (frames !== null) {
    showFrame();
    return;
  }
  stop();
  await onlyRequest("way", "/api/trajectory", { ...request("full"), index: shownIndex }, (values) => {
    const way = byId("way");
    frames = values.frames;
    const share = way.value / way.max;
    way.max = frames.length - 1;
    way.value = Math.round(share * way.max);
    setState("done");
    showFrame();
  });
}

function showFrame() {
  const way = byId("way");
  byId("image").src = `data:image/png;base64,${frames[way.value]}`;
  const part = Math.round(100 * way.value / way.max);
  byId("status").textContent = `From noise to image: ${part} %`;
}

// ------------------------------------------------------------------------------------------------------ looks

/** Pictures of the present mask in the looks of some training images. */
async function loadLooks() {
  await onlyRequest("looks", "/api/looks", { ...request("preview"), look: null }, (values) => {
    looks = values.looks;
    showLooks();
    setState("done");
  }, () => { looks = []; });
}

function showLooks() {
  const choices = [
    { value: null, title: "Of a training image that the seed draws", text: "by seed" },
    { value: "none", title: "No look", text: "none" },
    ...(reference ? [{ value: reference, title: `Reference image ${reference.name}`, text: "reference", picture: referencePicture }] : []),
    ...(looks || []).map((one) => (
      { value: one.index, title: `Training image ${one.name}`, text: one.name, picture: `data:image/png;base64,${one.picture}` })),
  ];
  byId("looks").replaceChildren(...choices.map(({ value, title, text, picture }) => {
    const button = document.createElement("button");
    button.title = title;
    button.setAttribute("aria-label", title);
    if (picture) {
      const image = document.createElement("img");
      image.src = picture;
      image.alt = "";
      image.addEventListener("error", () => image.replaceWith(text)); // a browser shows no TIFF
      button.append(image);
    } else {
      button.append(text);
    }
    button.addEventListener("click", () => { look = value; choose(byId("looks"), button); changed(); });
    return button;
  }));
  choose(byId("looks"), byId("looks").children[choices.findIndex((one) => one.value === look)]);
}

async function loadReference(file) {
  if (!file || isTooLarge(file)) return;
  try {
    reference = await ask(`/api/look?${new URLSearchParams({ name: file.name })}`, { method: "POST", body: file });
  } catch (error) {
    showError(error.message);
    return;
  }
  URL.revokeObjectURL(referencePicture);
  referencePicture = URL.createObjectURL(file);
  look = reference;
  showLooks();
  changed();
}

// ------------------------------------------------------------------------------------------------------ masks

/** Show a label that the service gives. */
function take(values, kind = editor.kind) {
  editor.replace(unpackLabel(values.label), values.width, values.height, kind);
}

/** Say so if the service would not take a file, before it is sent. */
function isTooLarge(file) {
  const mebibytes = (bytes) => Math.ceil(bytes / 2 ** 20);
  if (file.size <= model.most.bytes) return false;
  showError(`${file.name} has ${mebibytes(file.size)} MiB. The page takes at most ${mebibytes(model.most.bytes)} MiB: cut it into pieces.`);
  return true;
}

async function load(file) {
  if (!file || isTooLarge(file)) return;
  stop();
  await onlyRequest("mask", "/api/mask", file, take, undefined, {
    name: file.name, kind: editor.kind, mask_type: byId("mask_type").value, whole: byId("whole").checked ? 1 : 0,
  });
}

async function randomLayout() {
  stop();
  await onlyRequest("layout", "/api/layout", {
    width: editor.width, height: editor.height, kind: editor.kind, cell_size: Number(byId("cell_size").value),
    density: Number(byId("density").value), seed: Math.floor(Math.random() * 2 ** 31),
  }, take);
}

let newestMasks = 0; // number of the newest request for masks of the folder

/** Thumbnails of the folder's masks whose names hold the text: the first ones, or more of them. */
async function showMasks(more) {
  const group = byId("masks");
  const first = more ? group.children.length : 0;
  const request = ++newestMasks;
  let found;
  try {
    found = await post("/api/masks", { contains: byId("mask_filter").value, first });
  } catch (error) {
    showError(error.message);
    return;
  }
  if (request !== newestMasks) return;  // another click came after
  if (!more) group.replaceChildren();
  for (const { index, name, picture } of found.masks) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = `data:image/png;base64,${picture}`;
    image.alt = "";
    button.title = name;
    button.setAttribute("aria-label", name);
    button.append(image);
    button.addEventListener("click", () => startFrom(index, button));
    group.append(button);
  }
  choose(group, null);
  byId("more_masks").disabled = group.children.length >= found.total;
  byId("masks_note").textContent = `${group.children.length} of ${found.total} in ${model.masks.name}`;
}

async function startFrom(index, button) {
  stop();
  choose(byId("masks"), button);
  await onlyRequest("mask", "/api/start", { index, kind: editor.kind, whole: byId("whole").checked }, take);
}

// ----------------------------------------------------------------------------------------------------- showing

/** Show a message. Where it names a type of mask, it says how to choose this here. */
function showError(message) {
  byId("error_text").textContent = message.replace(/mask_type=(\w+)/g, (all, name) => `File holds: ${MASK_WORDS[name] || name}`);
  byId("error").hidden = false;
}

function hideError() { byId("error").hidden = true; }

function showCount() {
  const found = editor.count();
  const word = editor.kind === "cells" ? (found === 1 ? "cell" : "cells") : (found === 1 ? "class" : "classes");
  const hint = editor.kind === "cells" ? "Each stroke is a cell. Start inside a cell to add to it." : "Paint with the chosen class.";
  byId("count").textContent = `${found} ${word} · ${editor.width} × ${editor.height} px · ${hint}`;
  byId("undo").disabled = !editor.past.length;
  byId("redo").disabled = !editor.future.length;
}

function showSizes() {
  const side = model.image_size;
  const sizes = [1, 2, 3, 4, 8].map((factor) => factor * side).filter((one) => one <= model.most.side);
  const names = sizes.map((one) => `${one} × ${one}`);
  const own = `${editor.width} × ${editor.height}`;
  if (!names.includes(own)) names.push(own);
  setOptions("size", names, own);
}

function setOptions(id, names, chosen, words = {}) {
  byId(id).replaceChildren(...names.map((name) => new Option(words[name] || name, name, false, name === chosen)));
}

/** Mark one button of a group. The Tab key reaches only this one, or the first; arrow keys go to the others. */
function choose(group, button) {
  [...group.querySelectorAll("button")].forEach((other, place) => {
    other.classList.toggle("on", other === button);
    other.setAttribute("aria-checked", other === button);
    other.setAttribute("role", "radio");
    other.tabIndex = other === button || (!button && place === 0) ? 0 : -1;
  });
}

function setTool(name) {
  editor.tool = name;
  byId("mask").classList.toggle("move", name === "move");
  choose(byId("tools"), byId("tools").querySelector(`[data-tool="${name}"]`));
  editor.paint();
}

function showClasses() {
  byId("kind").value = editor.kind;
  if (showClasses.kind === editor.kind) return;
  showClasses.kind = editor.kind;
  const buttons = editor.kind === "cells" ? [] : model.class_colors.map((color, number) => {
    const button = document.createElement("button");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${color.join(",")})`;
    button.append(swatch, String(number));
    button.title = number ? `Class ${number}` : "Background";
    button.addEventListener("click", () => { editor.currentClass = number; choose(byId("classes"), button); });
    return button;
  });
  byId("classes").replaceChildren(...buttons);
  if (buttons.length) choose(byId("classes"), buttons[editor.currentClass]);
}

function showNumbers() {
  editor.brush = Number(byId("brush").value);
  byId("brush_shown").textContent = `${editor.brush} px`;
  byId("guidance_shown").textContent = Number(byId("guidance").value) === 1 ? "none" : byId("guidance").value;
  byId("blur_shown").textContent = Number(byId("blur").value) ? `${byId("blur").value} px` : "hard";
  byId("density_shown").textContent = `${Math.round(100 * byId("density").value)} %`;
}

// --------------------------------------------------------------------------------------------------- downloads

async function download(what) {
  if (what === "label_png" || what === "label_tif") {
    const drawn = editor.state();
    save(await (what === "label_png" ? labelPng : labelTiff)(drawn), what === "label_png" ? "label.png" : "label.tif");
    editor.isSaved = true;
    return;
  }
  const image = reply.images[shownIndex];
  const files = {
    image: [image.file, `image_${wholeOf("seed")}_${shownIndex}${image.suffix}`],
    mask: [reply.mask.content, reply.mask.name],
    sheet: [reply.sheet, "samples.png"],
  };
  const [content, name] = files[what];
  save(new Blob([fromBase64(content)]), name);
}

// ------------------------------------------------------------------------------------------------------ reload

const KEPT = "drawing"; // in the memory of this tab
const KEPT_FIELDS = ["seed", "guidance", "blur", "steps", "method", "preview"];

/** Remember the drawing and its settings for a reload of the page. */
function keep() {
  const fields = Object.fromEntries(KEPT_FIELDS.map((id) => [id, byId(id).value]));
  const { width, height, label, kind, isSaved } = editor;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ width, height, kind, isSaved, fields, label: packLabel(label) }));
  } catch (error) {
    sessionStorage.removeItem(KEPT); // too large: better none than an old one
  }
}

/** Bring back what an earlier load of the page drew, if this model can take it. Returns whether it did. */
function recall() {
  let kept, label;
  try {
    kept = JSON.parse(sessionStorage.getItem(KEPT));
    label = unpackLabel(kept.label);
  } catch (error) {
    return false; // nothing is kept
  }
  const { width, height, kind } = kept;
  if (!model.kinds.includes(kind) || label.length !== width * height || Math.max(width, height) > model.most.side) return false;
  if (kind === "classes" && label.some((value) => value >= model.num_classes)) return false;
  editor.setLabel(width, height, label, kind);
  editor.isSaved = kept.isSaved;
  for (const id of KEPT_FIELDS) if (kept.fields[id]) byId(id).value = kept.fields[id];
  if (!byId("method").value) byId("method").value = DEFAULT_METHOD;
  return true;
}

// ------------------------------------------------------------------------------------------------------- start

function listen() {
  byId("tools").addEventListener("click", (event) => { if (event.target.dataset.tool) setTool(event.target.dataset.tool); });
  byId("counts").addEventListener("click", (event) => {
    if (!event.target.dataset.count) return;
    count = Number(event.target.dataset.count);
    choose(byId("counts"), event.target);
    changed();
  });
  byId("undo").addEventListener("click", () => editor.undo());
  byId("redo").addEventListener("click", () => editor.redo());
  byId("clear").addEventListener("click", () => editor.clear());
  byId("zoom_in").addEventListener("click", () => editor.zoom(1.5));
  byId("zoom_out").addEventListener("click", () => editor.zoom(1 / 1.5));
  byId("zoom_fit").addEventListener("click", () => editor.fit());
  byId("next").addEventListener("click", nextSeed);
  byId("layout").addEventListener("click", randomLayout);
  byId("way").addEventListener("input", () => { clearTimeout(showWay.timer); showWay.timer = setTimeout(showWay, frames ? 0 : 120); });
  byId("keep_outline").addEventListener("change", () => byId("picture").classList.toggle("outlined", byId("keep_outline").checked));
  for (const id of ["brush", "density"]) byId(id).addEventListener("input", () => { showNumbers(); editor.paint(); });
  for (const id of ["guidance", "blur"]) byId(id).addEventListener("input", () => { showNumbers(); changedSoon(); });
  for (const id of ["seed", "steps", "method", "preview"]) byId(id).addEventListener("change", changed);
  byId("kind").addEventListener("change", () => setKind(byId("kind").value));
  byId("size").addEventListener("change", () => {
    const [width, height] = byId("size").value.split(" × ").map(Number);
    editor.resizeTo(width, height);
  });
  byId("choose_file").addEventListener("click", () => byId("file").click());
  byId("choose_look_file").addEventListener("click", () => byId("look_file").click());
  byId("stop").addEventListener("click", stopOrDraw);
  byId("more_masks").addEventListener("click", () => showMasks(true));
  byId("mask_filter").addEventListener("input", () => {
    clearTimeout(showMasks.timer);
    showMasks.timer = setTimeout(() => showMasks(false), 250);
  });
  byId("file").addEventListener("change", () => { load(byId("file").files[0]); byId("file").value = ""; });
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
  document.addEventListener("dragover", () => document.body.classList.add("dropping"));
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (event.target.closest("#looks_card")) loadReference(file); else load(file);
  });
  byId("look_file").addEventListener("change", () => { loadReference(byId("look_file").files[0]); byId("look_file").value = ""; });
  byId("renew_looks").addEventListener("click", () => { stop(); loadLooks(); });
  for (const button of document.querySelectorAll("[data-file]")) button.addEventListener("click", () => download(button.dataset.file));
  byId("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(reply.command);
    } catch (error) {
      showError("This browser does not let the page copy. Select the command and copy it by hand.");
      return;
    }
    byId("copy").textContent = "Copied";
    setTimeout(() => { byId("copy").textContent = "Copy command"; }, 1500);
  });
  byId("error_close").addEventListener("click", hideError);
  document.addEventListener("keydown", onKey);
  window.addEventListener("beforeunload", (event) => { if (!editor.isSaved) event.preventDefault(); });
  new ResizeObserver(followView).observe(byId("picture"));
}

function nextSeed() {
  byId("seed").value = wholeOf("seed") + 1;
  changed();
}

/** Cells become class 1, and class 2 where they touch. Connected areas of class 1 become cells. Undo goes back. */
async function setKind(kind) {
  byId("kind").value = editor.kind; // until the label is of the other kind
  if (kind === "classes") {
    const label = editor.label.map((value, index) => (editor.isBoundary(index) ? 2 : Math.min(value, 1)));
    editor.replace(label, editor.width, editor.height, kind);
    return;
  }
  stop();
  const { width, height, label } = editor;
  await onlyRequest("cells", "/api/cells", { width, height, label: packLabel(label) }, (values) => take(values, kind));
}

const MASK_WORDS = {
  auto: "find out", binary: "cell or not", classes: "class numbers", probability: "probabilities", instances: "cell numbers",
};
const KEYS = { b: "brush", o: "outline", e: "ellipse", f: "fill", x: "eraser", r: "remove", m: "move" };

function onKey(event) {
  const typing = event.target.matches("input:not([type=range]):not([type=checkbox]), select");
  if (typing || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "escape") {
    if (!byId("error").hidden) hideError();
    else if (running) stopOrDraw();
  }
  if (key.startsWith("arrow")) chooseBeside(event);
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") { event.preventDefault(); if (event.shiftKey) editor.redo(); else editor.undo(); }
    if (key === "y") { event.preventDefault(); editor.redo(); }
    return;
  }
  if (KEYS[key]) setTool(KEYS[key]);
  if (key === "n") nextSeed();
  if (key === "l") randomLayout();
  if (key === "+") editor.zoom(1.5);
  if (key === "-") editor.zoom(1 / 1.5);
  if (key === "0") editor.fit();
  if (key === "[" || key === "]") {
    byId("brush").value = editor.brush + (key === "[" ? -1 : 1);
    showNumbers();
    editor.paint();
  }
}

/** Arrow keys go through the choices of a group. */
function chooseBeside(event) {
  const group = event.target.closest("[role=radiogroup]");
  if (!group) return;
  event.preventDefault();
  const buttons = [...group.querySelectorAll("button")];
  const step = event.key === "ArrowLeft" || event.key === "ArrowUp" ? -1 : 1;
  const next = buttons[(buttons.indexOf(event.target) + step + buttons.length) % buttons.length];
  next.focus();
  next.click();
}

async function start() {
  try {
    model = await ask("/api/model");
  } catch (error) {
    showError(error.message);
    return;
  }
  const side = model.image_size;
  const images = { 1: "gray", 3: "RGB" }[model.channels] || `${model.channels} channels`;
  byId("model").textContent = `${model.model} · step ${model.step} · ${side} px, ${images}, ${model.num_classes} classes · on this machine only`;
  editor = new LabelCanvas(byId("mask"), { onStart: stop, onChange: () => { showSizes(); showClasses(); changed(); }, onView: followView });
  editor.kind = model.kinds[0];
  editor.classColors = model.class_colors;
  editor.hasBoundary = model.num_classes === 3;
  editor.setLabel(side, side, new Uint16Array(side * side));
  byId("brush").max = Math.max(12, Math.round(side / 3));
  byId("brush").value = Math.max(3, Math.round(side / 12));
  byId("cell_size").value = Math.min(side, Math.max(6, Math.min(24, Math.round(side / 5))));
  byId("steps").max = model.most.steps;
  byId("blur").max = Math.min(model.most.blur, Math.max(3, side / 16));
  byId("guidance_row").hidden = !model.has_guidance;
  byId("blur_row").hidden = !model.has_soft_masks;
  byId("kind_row").hidden = model.kinds.length < 2;
  setOptions("method", model.methods, DEFAULT_METHOD);
  setOptions("kind", model.kinds, model.kinds[0]);
  setOptions("mask_type", model.mask_types, "auto", MASK_WORDS);
  byId("looks_card").hidden = !model.looks;
  byId("masks_card").hidden = !model.masks;
  if (model.masks) byId("masks_hint").textContent = "Or drop it anywhere on the page.";
  listen();
  showLooks();
  setTool("brush");
  choose(byId("counts"), byId("counts").querySelector("[data-count='1']"));
  const isRecalled = recall();
  showSizes();
  showClasses();
  showNumbers();
  showCount();
  if (isRecalled) changed();
  else await randomLayout(); // a page that shows at once what it does
  if (model.masks) showMasks(false); // after the first preview
}

start();
