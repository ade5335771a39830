"use strict";
// A label map that a person draws: one whole number per pixel, no antialiasing.

const MOST_UNDO = 40;
const LARGEST_LABEL = 65535;
const PEN_ERASER = 5; // button of a pointer event: the other end of the pen

class LabelCanvas {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{onStart: function(), onChange: function(), onView: function()}} calls onStart: a stroke begins; onChange:
   *   the label changed; onView: another part is shown, or at another scale.
   */
  constructor(canvas, calls) {
    this.canvas = canvas;
    this.calls = calls;
    this.tool = "brush";
    this.brush = 6; // diameter in label pixels
    this.kind = "cells";
    this.currentClass = 1;
    this.classColors = [[0, 0, 0], [255, 255, 255]];
    this.hasBoundary = false; // show pixels of cells that touch another cell as class 2
    this.isSaved = true; // nothing was drawn by hand since the label was saved
    this.store = document.createElement("canvas"); // one pixel per label pixel
    this.pointer = null;
    this.stroke = null;
    this.setLabel(64, 64, new Uint16Array(64 * 64));
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.cancel(event));
    canvas.addEventListener("pointerleave", () => { this.pointer = null; this.paint(); });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("blur", () => { this.pointer = null; this.paint(); });
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  // ------------------------------------------------------------------------------------------------ label

  /** Begin anew with a label map of this size. */
  setLabel(width, height, label, kind = this.kind) {
    [this.past, this.future] = [[], []];
    this.put({ width, height, label, kind });
    this.fit();
  }

  put({ width, height, label, kind }) {
    const isOtherSize = width !== this.width || height !== this.height;
    [this.width, this.height, this.label, this.kind] = [width, height, label, kind];
    if (!isOtherSize) return;
    [this.store.width, this.store.height] = [width, height];
    this.pixels = this.store.getContext("2d").createImageData(width, height);
    this.fit();
  }

  /** Replace the label, also by one of another size or kind; undo brings the old one back. */
  replace(label, width = this.width, height = this.height, kind = this.kind) {
    this.remember();
    this.put({ width, height, label, kind });
    this.finish();
  }

  /** Change the size and keep what is drawn, in the middle. */
  resizeTo(width, height) {
    const label = new Uint16Array(width * height);
    const [down, right] = [Math.floor((height - this.height) / 2), Math.floor((width - this.width) / 2)];
    this.label.forEach((value, index) => {
      const [row, column] = [Math.floor(index / this.width) + down, (index % this.width) + right];
      if (row >= 0 && column >= 0 && row < height && column < width) label[row * width + column] = value;
    });
    this.replace(label, width, height);
  }

  state() { return { width: this.width, height: this.height, label: this.label.slice(), kind: this.kind }; }

  remember() {
    this.past.push(this.state());
    if (this.past.length > MOST_UNDO) this.past.shift();
    this.future = [];
  }

  undo() { this.step(this.past, this.future); }

  redo() { this.step(this.future, this.past); }

  step(from, to) {
    if (!from.length || this.stroke) return;
    to.push(this.state());
    this.put(from.pop());
    this.finish();
  }

  clear() {
    if (this.label.some((value) => value)) this.replace(new Uint16Array(this.label.length));
  }

  finish() {
    this.paint();
    this.calls.onChange();
  }

  /** The number that the next cell gets: the smallest that no cell has. */
  freeId() {
    const used = new Uint8Array(LARGEST_LABEL + 2);
    for (const value of this.label) used[value] = 1;
    let id = 1;
    while (used[id]) id += 1;
    return id;
  }

  /** How many cells or classes there are. */
  count() { return new Set(this.label).size - (this.label.includes(0) ? 1 : 0); }

  // ---------------------------------------------------------------------------------------------- strokes

  /** Where a pointer event lies, in label pixels. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left - this.left) / this.scale, (event.clientY - box.top - this.top) / this.scale];
  }

  at(x, y) {
    const [column, row] = [Math.floor(x), Math.floor(y)];
    return column < 0 || row < 0 || column >= this.width || row >= this.height ? -1 : row * this.width + column;
  }

  down(event) {
    if (this.stroke) return;
    this.canvas.setPointerCapture(event.pointerId);
    const [x, y] = this.place(event);
    if (event.button === 1 || event.shiftKey || this.tool === "move") {
      this.stroke = { pan: true, left: this.left - event.clientX, top: this.top - event.clientY };
    } else if (event.button === 0 || event.button === PEN_ERASER) {
      this.begin(x, y, event.button === PEN_ERASER ? "eraser" : this.tool);
    }
    if (this.stroke) this.stroke.pointer = event.pointerId;
  }

  /** Whether an event comes from a second finger, or from the hand beside the pen. */
  isOther(event) { return this.stroke && this.stroke.pointer !== event.pointerId; }

  begin(x, y, tool) {
    this.calls.onStart();
    const before = this.label.slice();
    const index = this.at(x, y);
    this.stroke = { tool, before, x, y, startX: x, startY: y, id: this.strokeId(tool, index), points: [[x, y]] };
    if (tool === "brush" || tool === "eraser") this.stamp(x, y, x, y);
    if (tool === "fill" && index >= 0) this.fill(index);
    if (tool === "remove" && index >= 0) this.removeAt(index);
    this.paint();
  }

  strokeId(tool, index) {
    if (tool === "eraser") return 0;
    if (this.kind === "classes") return this.currentClass;
    const under = index >= 0 ? this.label[index] : 0;
    const adds = tool === "brush" || tool === "outline";
    return adds && under ? under : this.freeId();
  }

  move(event) {
    if (this.isOther(event)) return;
    const [x, y] = this.place(event);
    this.pointer = [x, y];
    const stroke = this.stroke;
    if (stroke && stroke.pan) {
      this.pan(stroke.left + event.clientX, stroke.top + event.clientY);
    } else if (stroke) {
      if (stroke.tool === "brush" || stroke.tool === "eraser") this.stamp(stroke.x, stroke.y, x, y);
      if (stroke.tool === "ellipse") this.ellipse(stroke, x, y);
      if (stroke.tool === "outline") this.polygon(stroke, x, y);
      [stroke.x, stroke.y] = [x, y];
    }
    this.paint();
  }

  up(event) {
    if (!this.stroke || this.isOther(event)) return;
    if (this.stroke.pan) this.stroke = null;
    else this.end(...this.place(event));
  }

  end(x, y) {
    const stroke = this.stroke;
    this.stroke = null;
    if (stroke.tool === "ellipse" && Math.hypot(x - stroke.startX, y - stroke.startY) < 1) {
      const half = this.brush; // a click makes a round cell of twice the brush
      this.ellipse({ ...stroke, startX: x - half, startY: y - half }, x + half, y + half);
    }
    this.close(stroke);
  }

  /** Draw without a mouse: arrows move the pen (with shift by 8 pixels), the space bar uses the tool where it is. */
  key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!(move || event.key === " ") || this.stroke || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (this.tool === "move") {
      if (move) this.pan(this.left - 24 * move[0], this.top - 24 * move[1]);
      return;
    }
    const [x, y] = this.pointer || [Math.floor(this.width / 2) + 0.5, Math.floor(this.height / 2) + 0.5];
    this.pointer = [x, y];
    if (move) {
      const step = event.shiftKey ? 8 : 1;
      const within = (value, side) => Math.min(side - 0.5, Math.max(0.5, value));
      this.pointer = [within(x + step * move[0], this.width), within(y + step * move[1], this.height)];
    } else {
      this.begin(x, y, this.tool);
      this.end(x, y);
    }
    this.paint();
  }

  cancel(event) {
    if (this.isOther(event)) return;
    const stroke = this.stroke;
    this.stroke = null;
    if (stroke && !stroke.pan) this.close(stroke);
  }

  close(stroke) {
    const drawn = this.label;
    if (stroke.before.some((value, index) => value !== drawn[index])) {
      this.label = stroke.before;
      this.remember();
      this.label = drawn;
      this.isSaved = false;
    }
    this.finish();
  }

  /** Write a pixel. Only the eraser takes pixels from other cells; classes are painted over. */
  set(index, id) {
    if (id === 0 || this.kind === "classes" || this.label[index] === 0) this.label[index] = id;
  }

  /** A disk moved along a line. */
  stamp(x0, y0, x1, y1) {
    const radius = this.brush / 2;
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)));
    for (let step = 0; step <= steps; step += 1) {
      const [x, y] = [x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps];
      this.disk(x, y, radius, radius, this.stroke.id);
    }
  }

  /** All pixels whose centre lies in an ellipse, and the pixel at its centre. */
  disk(x, y, radiusX, radiusY, id) {
    const centre = this.at(x, y);
    if (centre >= 0) this.set(centre, id);
    const [first, last] = [Math.max(0, Math.floor(y - radiusY)), Math.min(this.height - 1, Math.ceil(y + radiusY))];
    for (let row = first; row <= last; row += 1) {
      const share = 1 - ((row + 0.5 - y) / radiusY) ** 2;
      if (share < 0) continue;
      const half = radiusX * Math.sqrt(share);
      const [from, to] = [Math.max(0, Math.ceil(x - half - 0.5)), Math.min(this.width - 1, Math.floor(x + half - 0.5))];
      for (let column = from; column <= to; column += 1) this.set(row * this.width + column, id);
    }
  }

  ellipse(stroke, x, y) {
    this.label.set(stroke.before);
    const [radiusX, radiusY] = [Math.abs(x - stroke.startX) / 2, Math.abs(y - stroke.startY) / 2];
    if (radiusX < 0.5 || radiusY < 0.5) return;
    this.disk((x + stroke.startX) / 2, (y + stroke.startY) / 2, radiusX, radiusY, stroke.id);
  }

  /** All pixels whose centre lies inside the closed line through the points so far and (x, y). */
  polygon(stroke, x, y) {
    stroke.points.push([x, y]);
    this.label.set(stroke.before);
    const { points } = stroke;
    for (let row = 0; row < this.height; row += 1) {
      const crossings = [];
      points.forEach(([x1, y1], place) => {
        const [x0, y0] = points[(place || points.length) - 1];
        if ((y0 <= row + 0.5) !== (y1 <= row + 0.5)) crossings.push(x0 + (x1 - x0) * (row + 0.5 - y0) / (y1 - y0));
      });
      crossings.sort((left, right) => left - right);
      for (let place = 0; place + 1 < crossings.length; place += 2) {
        const from = Math.max(0, Math.ceil(crossings[place] - 0.5));
        const to = Math.min(this.width - 1, Math.floor(crossings[place + 1] - 0.5));
        for (let column = from; column <= to; column += 1) this.set(row * this.width + column, stroke.id);
      }
    }
  }

  /** Pixels of one value that hang together by their sides, and the values around them. */
  region(start) {
    const { width, height, label } = this;
    const value = label[start];
    const seen = new Uint8Array(label.length);
    const found = [start];
    const around = new Set();
    let open = false; // reaches the canvas' border
    seen[start] = 1;
    for (let place = 0; place < found.length; place += 1) {
      const index = found[place];
      const [column, row] = [index % width, Math.floor(index / width)];
      if (!column || !row || column === width - 1 || row === height - 1) open = true;
      const beside = [];
      if (column) beside.push(index - 1);
      if (column < width - 1) beside.push(index + 1);
      if (row) beside.push(index - width);
      if (row < height - 1) beside.push(index + width);
      for (const other of beside) {
        if (label[other] !== value) around.add(label[other]);
        else if (!seen[other]) { seen[other] = 1; found.push(other); }
      }
    }
    return { found, around, open };
  }

  fill(start) {
    if (this.kind === "cells" && this.label[start]) return;
    const { found, around, open } = this.region(start);
    const id = this.kind === "cells" && !open && around.size === 1 ? [...around][0] : this.stroke.id;
    for (const index of found) this.label[index] = id;
  }

  removeAt(start) {
    const value = this.label[start];
    if (!value) return;
    const found = this.kind === "cells" ? this.label.keys() : this.region(start).found;
    for (const index of found) if (this.label[index] === value) this.label[index] = 0;
  }

  // ------------------------------------------------------------------------------------------------ showing

  color(value) {
    if (this.kind === "classes") return this.classColors[value] || [255, 0, 255];
    if (!value) return [0, 0, 0];
    const hue = (value * 137.508) % 360; // golden angle: neighbours in number differ in colour
    const channel = (n) => {
      const k = (n + hue / 30) % 12;
      return Math.round(255 * (0.66 - 0.27 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    return [channel(0), channel(8), channel(4)];
  }

  /** Whether a pixel of a cell has another cell among its eight neighbours. */
  isBoundary(index) {
    const value = this.label[index];
    if (!this.hasBoundary || this.kind !== "cells" || !value) return false;
    const column = index % this.width;
    for (let down = -1; down <= 1; down += 1) {
      for (let right = -1; right <= 1; right += 1) {
        const other = column + right < 0 || column + right >= this.width ? 0 : this.label[index + down * this.width + right];
        if (other && other !== value) return true;
      }
    }
    return false;
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const whole = this.isFit;
    this.canvas.width = Math.max(1, Math.round(this.canvas.clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(this.canvas.clientHeight * ratio));
    if (whole) this.fit(); else this.paint();
  }

  fit() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.scale = Math.min(width / this.width, height / this.height) || 1;
    this.left = (width - this.scale * this.width) / 2;
    this.top = (height - this.scale * this.height) / 2;
    this.isFit = true;
    this.paint();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const least = 0.5 * Math.min(this.canvas.clientWidth / this.width, this.canvas.clientHeight / this.height);
    const scale = Math.min(64, Math.max(least, this.scale * factor));
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.isFit = false;
    this.paint();
  }

  /** Move the label; some of it stays in sight. */
  pan(left, top) {
    const within = (value, side, shown) => Math.min(side - 20, Math.max(20 - shown, value));
    this.left = within(left, this.canvas.clientWidth, this.scale * this.width);
    this.top = within(top, this.canvas.clientHeight, this.scale * this.height);
    this.isFit = false;
    this.paint();
  }

  wheel(event) {
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    this.zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }

  paint() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => { this.waits = false; this.paintNow(); });
  }

  paintLabel() {
    const words = new Uint32Array(this.pixels.data.buffer); // a pixel each
    const wordOf = (color = [255, 0, 255]) => new Uint32Array(Uint8Array.of(...color, 255).buffer)[0];
    const boundary = this.hasBoundary ? wordOf(this.classColors[2]) : 0;
    const known = new Map();
    let [latest, word] = [-1, 0];
    for (let index = 0; index < this.label.length; index += 1) {
      const value = this.label[index];
      if (value !== latest) {
        if (!known.has(value)) known.set(value, wordOf(value ? this.color(value) : [26, 32, 40]));
        [latest, word] = [value, known.get(value)];
      }
      words[index] = this.isBoundary(index) ? boundary : word;
    }
    this.store.getContext("2d").putImageData(this.pixels, 0, 0);
  }

  paintNow() {
    this.paintLabel();
    const context = this.canvas.getContext("2d");
    const ratio = this.canvas.width / (this.canvas.clientWidth || 1);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.store, this.left, this.top, this.scale * this.width, this.scale * this.height);
    const view = [this.left, this.top, this.scale].join();
    if (view !== this.shownView) {
      this.shownView = view;
      this.calls.onView();
    }
    if (this.pointer && this.tool !== "move") {
      const radius = this.tool === "brush" || this.tool === "eraser" ? this.scale * this.brush / 2 : 0;
      const [x, y] = [this.left + this.scale * this.pointer[0], this.top + this.scale * this.pointer[1]];
      context.beginPath();
      context.arc(x, y, Math.max(2, radius), 0, 2 * Math.PI);
      context.strokeStyle = "#fff";
      context.lineWidth = 1;
      context.stroke();
    }
  }
}

/**
 * Draw the borders of label maps of one size, each over a dark line, so that they show on bright images, too.
 * @param {HTMLCanvasElement} canvas
 * @param {{width: number, height: number, label: Uint16Array, color: string}[]} maps
 * @param {{left: number, top: number, scale: number}} view place and scale of the maps, in pixels of the page
 */
function showBorders(canvas, maps, view) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  const context = canvas.getContext("2d");
  const [left, top, scale] = [ratio * view.left, ratio * view.top, ratio * view.scale];
  const lines = maps.map(({ width, label, color }) => {
    const path = new Path2D();
    for (let index = 0; index < label.length; index += 1) {
      const [column, row] = [index % width, Math.floor(index / width)];
      const [x, y] = [left + scale * column, top + scale * row];
      if (column && label[index] !== label[index - 1]) { path.moveTo(x, y); path.lineTo(x, y + scale); }
      if (row && label[index] !== label[index - width]) { path.moveTo(x, y); path.lineTo(x + scale, y); }
    }
    return { path, color };
  });
  context.lineCap = "square";
  for (const { path } of lines) {
    [context.strokeStyle, context.lineWidth] = ["#0008", 3.5 * ratio];
    context.stroke(path);
  }
  for (const { path, color } of lines) {
    [context.strokeStyle, context.lineWidth] = [color, 1.5 * ratio];
    context.stroke(path);
  }
}
