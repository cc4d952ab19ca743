// The picture, its rate, and how long it takes from an input to the picture that shows it.

import { plainName } from "./bindings.js";

const KEPT = 240; // samples of percentiles
const COLOURS = {
  wait: "#5b5670", game: "#b6e05f", commit: "#8b6dff", denoise: "#4ea1ff", decode: "#3ecf9b", encode: "#ffc24b", network: "#ff7a59",
};
const LABELS = {
  wait: "wait for the frame", game: "game", commit: "commit", denoise: "denoise", decode: "decode", encode: "encode", network: "network, display",
};

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.samples = [];
    this.times = []; // arrivals of the last two seconds
    this.shown = 0;
    this.newest = 0;
  }

  async show(frame) {
    const order = ++this.newest;
    this.times.push(performance.now());
    const bitmap = await createImageBitmap(new Blob([frame.jpeg], { type: "image/jpeg" }));
    if (order < this.shown) return; // a later one was decoded faster
    this.shown = order;
    if (this.canvas.width !== bitmap.width || this.canvas.height !== bitmap.height) {
      this.canvas.width = bitmap.width;
      this.canvas.height = bitmap.height;
    }
    this.context.drawImage(bitmap, 0, 0);
    bitmap.close();
    this.canvas.dataset.frame = frame.number;
    if (!Number.isNaN(frame.time) && !document.hidden) {
      // what is drawn now is on the screen at the latest when the frame after the next one starts
      requestAnimationFrame(() => requestAnimationFrame(() => this.measure(frame)));
    }
  }

  measure(frame) {
    const total = performance.now() - frame.time;
    const known = Object.values(frame.parts).reduce((sum, value) => sum + value, 0);
    this.samples.push({ total, ...frame.parts, network: Math.max(0, total - known) });
    if (this.samples.length > KEPT) this.samples.shift();
  }

  forget() {
    this.samples = [];
    this.times = [];
  }

  get rate() {
    const now = performance.now();
    while (this.times.length && this.times[0] < now - 2000) this.times.shift();
    if (this.times.length < 2) return 0;
    return (1000 * (this.times.length - 1)) / (this.times.at(-1) - this.times[0]);
  }

  percentile(name, share) {
    const values = this.samples.map((sample) => sample[name]).sort((a, b) => a - b);
    return values.length ? values[Math.min(values.length - 1, Math.floor(share * values.length))] : 0;
  }
}

export class Stats {
  constructor(picture, connection) {
    Object.assign(this, { picture, connection, bytes: 0, at: performance.now() });
    this.bar = document.getElementById("bar");
    this.parts = document.getElementById("parts");
    for (const [name, colour] of Object.entries(COLOURS)) {
      const stripe = document.createElement("i"), dot = document.createElement("i");
      stripe.style.background = dot.style.background = colour;
      stripe.dataset.part = name;
      this.bar.append(stripe);
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = LABELS[name];
      value.dataset.part = name;
      this.parts.append(dot, term, value);
    }
  }

  // worlds: for each, from left to right, "agreement", "controls" by name, and "drift"
  measured(worlds) {
    const joined = (value, show) => worlds.map((world) => (value(world) == null ? "–" : show(value(world)))).join(" · ");
    const percent = (value) => `${Math.round(100 * value)}%`;
    document.getElementById("agreement").textContent = joined((world) => world.agreement, percent);
    document.getElementById("drift").textContent = joined((world) => world.drift, (value) => value.toFixed(2));
    const names = [...new Set(worlds.flatMap((world) => Object.keys(world.controls)))];
    document.getElementById("read").replaceChildren(...names.flatMap((name) => {
      const term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = plainName(name);
      value.textContent = joined((world) => world.controls[name], percent);
      return [term, value];
    }));
  }

  update() {
    const { picture, connection } = this;
    const now = performance.now();
    const kilobytes = (connection.received - this.bytes) / (now - this.at);
    Object.assign(this, { bytes: connection.received, at: now });
    document.getElementById("traffic").textContent = `${kilobytes.toFixed(0)} kB/s`;
    if (!picture.samples.length) return;
    const middle = picture.percentile("total", 0.5), high = picture.percentile("total", 0.95);
    document.getElementById("latency").textContent = `p50 ${middle.toFixed(0)} ms · p95 ${high.toFixed(0)} ms`;
    const values = Object.fromEntries(Object.keys(COLOURS).map((name) => [name, picture.percentile(name, 0.5)]));
    const slow = Object.fromEntries(Object.keys(COLOURS).map((name) => [name, picture.percentile(name, 0.95)]));
    const sum = Object.values(values).reduce((a, b) => a + b, 0) || 1;
    for (const stripe of this.bar.children) stripe.style.width = `${(100 * values[stripe.dataset.part]) / sum}%`;
    for (const value of this.parts.querySelectorAll("dd")) {
      const name = value.dataset.part, term = value.previousElementSibling;
      value.textContent = `${values[name].toFixed(1)} · ${slow[name].toFixed(1)} ms`;
      for (const cell of [value, term, term.previousElementSibling]) cell.hidden = slow[name] === 0; // of other worlds
    }
  }
}
