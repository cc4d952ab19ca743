// Which keys, mouse buttons and gamepad inputs belong to the buttons and axes of a world, by their names.

const NAMED = { // [keys, mouse button, gamepad button]
  MOVE_FORWARD: [["KeyW"]], MOVE_BACKWARD: [["KeyS"]], MOVE_LEFT: [["KeyA"]], MOVE_RIGHT: [["KeyD"]],
  ATTACK: [["Space"], 0, 7], ALTATTACK: [["KeyF"], 2, 6], USE: [["KeyE"], null, 2], JUMP: [["KeyJ"], null, 0],
  SPEED: [["ShiftLeft"], null, 10], CROUCH: [["KeyC"], null, 1], RELOAD: [["KeyR"], null, 3],
  TURN_LEFT: [["ArrowLeft"]], TURN_RIGHT: [["ArrowRight"]],
  W: [["KeyW"]], A: [["KeyA"]], S: [["KeyS"]], D: [["KeyD"]],
  SPACE: [["Space"], null, 0], ENTER: [["Enter"]], TAB: [["Tab"]], BACKSPACE: [["Backspace"]],
  SHIFT: [["ShiftLeft", "ShiftRight"], null, 10], CTRL: [["ControlLeft", "ControlRight"], null, 1], ALT: [["AltLeft"]],
  LEFT_SHIFT: [["ShiftLeft"], null, 10], RIGHT_SHIFT: [["ShiftRight"]],
  LEFT_CTRL: [["ControlLeft"], null, 1], RIGHT_CTRL: [["ControlRight"]], LEFT_ALT: [["AltLeft"]], RIGHT_ALT: [["AltRight"]],
  LEFT: [["ArrowLeft"], null, 14], RIGHT: [["ArrowRight"], null, 15], UP: [["ArrowUp"], null, 12], DOWN: [["ArrowDown"], null, 13],
  MOUSE_LEFT: [[], 0, 7], MOUSE_MIDDLE: [[], 1], MOUSE_RIGHT: [[], 2, 6], MOUSE_X1: [[], 3], MOUSE_X2: [[], 4],
};
const DIRECTIONS = { // of the left stick and of the touch stick
  up: ["MOVE_FORWARD", "W", "UP"], down: ["MOVE_BACKWARD", "S", "DOWN"],
  left: ["MOVE_LEFT", "A", "LEFT"], right: ["MOVE_RIGHT", "D", "RIGHT"],
};
const AXIS_KEYS = { mouse_x: ["ArrowLeft", "ArrowRight"], mouse_y: ["ArrowUp", "ArrowDown"] };
const SPARE = ["Digit1", "Digit2", "Digit3", "Digit4", "Digit5", "Digit6", "Digit7", "Digit8", "Digit9", "Digit0"];
const SHORT = {
  Space: "space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", ShiftLeft: "shift", ControlLeft: "ctrl",
  Backspace: "⌫", Enter: "enter",
};

export class Bindings {
  constructor(buttons, axes) {
    this.keys = new Map(); // code -> buttons
    this.mouse = new Map();
    this.pad = new Map();
    this.axisKeys = new Map(); // code -> [axis, sign]
    this.labels = buttons.map(() => "");
    const spare = SPARE.filter((code) => !buttons.includes(code.slice(-1)));
    buttons.forEach((name, index) => {
      const single = /^[A-Z]$/.test(name) ? [[`Key${name}`]] : /^[0-9]$/.test(name) ? [[`Digit${name}`]] : null;
      const [keys, mouse = null, pad = null] = NAMED[name] || single || [spare.splice(0, 1)];
      keys.forEach((code) => this.keys.set(code, index));
      if (mouse !== null) this.mouse.set(mouse, index);
      if (pad !== null) this.pad.set(pad, index);
      this.labels[index] = keys.length ? keyName(keys[0]) : mouse !== null ? `mouse ${mouse + 1}` : "";
    });
    axes.forEach((name, axis) => {
      (AXIS_KEYS[name] || []).forEach((code, side) => {
        if (!this.keys.has(code)) this.axisKeys.set(code, [axis, side ? 1 : -1]);
      });
    });
    const find = (names) => buttons.findIndex((name) => names.includes(name));
    this.directions = Object.fromEntries(Object.entries(DIRECTIONS).map(([side, names]) => [side, find(names)]));
    this.horizontal = axes.indexOf("mouse_x");
    this.vertical = axes.indexOf("mouse_y");
    this.wheel = axes.indexOf("scroll");
  }

  uses(code) {
    return this.keys.has(code) || this.axisKeys.has(code);
  }
}

export function keyName(code) {
  return SHORT[code] || code.replace(/^(Key|Digit)/, "").replace(/(Left|Right)$/, "");
}

export function plainName(name) {
  const words = name.replace(/^MOVE_/, "").replaceAll("_", " ").toLowerCase();
  return words.length > 1 ? words[0].toUpperCase() + words.slice(1) : words.toUpperCase();
}
