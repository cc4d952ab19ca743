// Keyboard, mouse, touch and gamepad as held buttons and movements of axes, sent as soon as they change.

const SHORTEST = 5; // milliseconds between two messages
const PIXELS = 40; // pixels of mouse movement that equal a fully deflected stick for one frame
const DEAD = 0.2; // part of a stick's way that counts as rest
const AT_REST = { axes: [], buttons: [] };
const REACH = 45; // pixels from the centre to the edge of the touch stick

export class Controls {
  constructor(stage, stick, connection, bindings, axes) {
    Object.assign(this, { stage, stick, connection, bindings });
    this.full = Object.values(axes);
    this.sources = new Map(); // "key:KeyW" -> index of a button
    this.deflected = new Map(); // "pad:0" -> [axis, from -1 to 1]: sticks and keys that stand for them
    this.moved = this.full.map(() => 0);
    this.shown = this.full.map(() => 0); // for the display: movement since the last frame
    this.sensitivity = 1;
    this.active = false;
    this.oldest = null;
    this.sentAt = 0;
    this.timer = null;
    this.touches = new Map();
    this.listen();
    requestAnimationFrame(() => this.poll());
  }

  get held() {
    const held = this.bindings.labels.map(() => false);
    for (const index of this.sources.values()) held[index] = true;
    return held;
  }

  get sticks() {
    const sticks = this.full.map(() => 0);
    for (const [axis, value] of this.deflected.values()) sticks[axis] = clamp(sticks[axis] + value);
    return sticks;
  }

  // How far the axes have moved since the last frame, as parts of a full deflection.
  get shares() {
    return this.sticks.map((value, axis) => clamp(value + this.shown[axis] / this.full[axis]));
  }

  listen() {
    const { stage, bindings } = this;
    stage.addEventListener("keydown", (event) => {
      if (!this.active || event.target !== stage || event.ctrlKey && !bindings.uses("ControlLeft") || event.metaKey) return;
      if (!bindings.uses(event.code)) return;
      event.preventDefault();
      if (!event.repeat) this.key(event, true);
    });
    addEventListener("keyup", (event) => this.key(event, false));
    stage.addEventListener("mousedown", (event) => {
      if (!this.active || !document.pointerLockElement || !bindings.mouse.has(event.button)) return;
      event.preventDefault();
      this.press(`mouse:${event.button}`, bindings.mouse.get(event.button), event.timeStamp);
    });
    addEventListener("mouseup", (event) => this.lift(`mouse:${event.button}`, event.timeStamp));
    stage.addEventListener("mousemove", (event) => {
      if (!this.active || !document.pointerLockElement) return;
      this.look(event.movementX, event.movementY, event.timeStamp);
    });
    stage.addEventListener("wheel", (event) => {
      if (!this.active || bindings.wheel < 0) return;
      event.preventDefault();
      this.move(bindings.wheel, -Math.sign(event.deltaY), event.timeStamp);
    }, { passive: false });
    stage.addEventListener("contextmenu", (event) => event.preventDefault());
    stage.addEventListener("pointerdown", (event) => this.touch(event));
    stage.addEventListener("pointermove", (event) => this.drag(event));
    for (const name of ["pointerup", "pointercancel"]) addEventListener(name, (event) => this.untouch(event));
    addEventListener("blur", () => this.releaseAll());
  }

  key(event, down) {
    const { keys, axisKeys } = this.bindings;
    const source = `key:${event.code}`;
    if (keys.has(event.code)) {
      if (down) this.press(source, keys.get(event.code), event.timeStamp);
      else this.lift(source, event.timeStamp);
    } else if (axisKeys.has(event.code)) {
      this.deflect(source, ...axisKeys.get(event.code), down, event.timeStamp);
    }
  }

  press(source, index, time = performance.now()) {
    if (index < 0 || this.sources.get(source) === index) return;
    this.sources.set(source, index);
    this.changed(time);
  }

  lift(source, time = performance.now()) {
    if (this.sources.delete(source)) this.changed(time);
  }

  deflect(source, axis, value, on, time = performance.now()) {
    if (this.deflected.get(source)?.[1] === (on ? value : undefined)) return;
    if (on) this.deflected.set(source, [axis, value]);
    else this.deflected.delete(source);
    this.changed(time);
  }

  look(x, y, time) {
    const { horizontal, vertical } = this.bindings;
    const scale = this.sensitivity / PIXELS;
    if (horizontal >= 0 && x) this.move(horizontal, x * scale * this.full[horizontal], time);
    if (vertical >= 0 && y) this.move(vertical, y * scale * this.full[vertical], time);
  }

  move(axis, amount, time) {
    this.moved[axis] += amount;
    this.shown[axis] += amount;
    this.changed(time);
  }

  // The left half of the screen is a stick, the right half looks around; a tap there is the first mouse button.
  touch(event) {
    if (event.pointerType !== "touch" || !this.active || event.target.closest("button")) return;
    event.preventDefault();
    const box = this.stage.getBoundingClientRect();
    const isStick = event.clientX < box.left + box.width / 2;
    this.touches.set(event.pointerId, { isStick, x: event.clientX, y: event.clientY, far: 0 });
    if (isStick) {
      this.stick.hidden = false;
      this.stick.style.left = `${event.clientX - box.left}px`;
      this.stick.style.top = `${event.clientY - box.top}px`;
    }
  }

  drag(event) {
    const touch = this.touches.get(event.pointerId);
    if (!touch) return;
    const x = event.clientX - touch.x, y = event.clientY - touch.y;
    if (touch.isStick) {
      this.direct("touch", x / REACH, y / REACH, event.timeStamp);
      this.stick.firstElementChild.style.transform = `translate(${clamp(x / REACH) * 30}px, ${clamp(y / REACH) * 30}px)`;
    } else {
      Object.assign(touch, { x: event.clientX, y: event.clientY, far: touch.far + Math.hypot(x, y) });
      this.look(x, y, event.timeStamp);
    }
  }

  untouch(event) {
    const touch = this.touches.get(event.pointerId);
    if (!touch) return;
    this.touches.delete(event.pointerId);
    if (touch.isStick) {
      this.stick.hidden = true;
      this.stick.firstElementChild.style.transform = "";
      this.direct("touch", 0, 0, event.timeStamp);
    } else if (touch.far < 8 && this.bindings.mouse.has(0)) {
      this.press("tap", this.bindings.mouse.get(0));
      setTimeout(() => this.lift("tap"), 80);
    }
  }

  direct(source, x, y, time) {
    const { directions } = this.bindings;
    const sides = { left: x < -DEAD * 2, right: x > DEAD * 2, up: y < -DEAD * 2, down: y > DEAD * 2 };
    for (const [side, on] of Object.entries(sides)) {
      if (on) this.press(`${source}:${side}`, directions[side], time);
      else this.lift(`${source}:${side}`, time);
    }
  }

  pad() {
    const found = this.active && [...(navigator.getGamepads?.() || [])].find((other) => other?.connected);
    const pad = found || AT_REST; // also when it was unplugged
    this.direct("pad", pad.axes[0] || 0, pad.axes[1] || 0);
    [this.bindings.horizontal, this.bindings.vertical].forEach((axis, index) => {
      const value = pad.axes[2 + index] || 0;
      if (axis >= 0) this.deflect(`pad:${index}`, axis, clamp(value), Math.abs(value) > DEAD);
    });
    for (const [number, index] of this.bindings.pad) {
      if (pad.buttons[number]?.pressed) this.press(`pad:button${number}`, index);
      else this.lift(`pad:button${number}`);
    }
  }

  poll() {
    this.pad();
    requestAnimationFrame(() => this.poll());
  }

  frame() {
    this.shown.fill(0);
  }

  changed(time) {
    this.oldest ??= time;
    const wait = this.sentAt + SHORTEST - performance.now();
    if (wait <= 0) this.flush();
    else this.timer ??= setTimeout(() => this.flush(), wait);
  }

  flush() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.oldest === null) return;
    this.connection.input(this.oldest, this.held, this.moved, this.sticks);
    this.oldest = null;
    this.moved.fill(0);
    this.sentAt = performance.now();
  }

  releaseAll() {
    this.sources.clear();
    this.deflected.clear();
    this.touches.clear();
    this.stick.hidden = true;
    this.changed(performance.now());
  }
}

function clamp(value) {
  return Math.max(-1, Math.min(1, value));
}
