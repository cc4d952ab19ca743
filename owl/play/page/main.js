// The page: connects the server's state with what is seen, and what is done with the server.

import { Bindings, keyName, plainName } from "./bindings.js";
import { Connection } from "./connection.js";
import { Controls } from "./controls.js";
import { Picture, Stats } from "./picture.js";
import { Sound } from "./sound.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const SHORTCUTS = { pause: "KeyP", step: "KeyN", back: "Backspace", reset: "KeyO", record: "KeyV" };
const NAMES = { pause: "Resume", step: "Step", back: "Back", reset: "Reset", record: "Record" };
const stage = $("stage");
const picture = new Picture($("picture"));
const sound = new Sound();
let controls = null, keys = [], bars = [], noticed = null, frame = 0;

const connection = new Connection({
  frame(found) {
    frame = found.number;
    picture.show(found);
    controls?.frame();
  },
  sound(number, samples) {
    sound.add(number, samples);
  },
  state(state) {
    if (controls === null) build(state);
    show(state);
  },
  notice,
  meters(worlds) {
    stats.measured(worlds);
  },
  lost(reason) {
    $("lost-reason").textContent = `Disconnected: ${reason}`;
    if (!$("lost").open) $("lost").showModal();
  },
});
const timeline = new Timeline($("timeline"), (number) => connection.command("rewind", { moment: number }));
const stats = new Stats(picture, connection);

// What the world has: once, with the first state.
function build(state) {
  document.title = `${state.name} · OWL`;
  $("name").textContent = state.name;
  $("kind").textContent = state.kind === "game" ? "the real game" : `${state.kind} on ${state.device}`;
  const axes = Object.keys(state.axes);
  const bindings = new Bindings(state.buttons, axes);
  controls = new Controls(stage, $("stick"), connection, bindings, state.axes);
  controls.sensitivity = Number($("sensitivity").value);
  keys = state.buttons.map((name, index) => {
    const button = document.createElement("button");
    button.textContent = plainName(name);
    if (bindings.labels[index]) button.append(element("kbd", bindings.labels[index]));
    button.tabIndex = -1; // the keys themselves are at hand
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      controls.press(`screen:${index}`, index, event.timeStamp);
    });
    for (const name of ["pointerup", "pointerleave", "pointercancel"]) {
      button.addEventListener(name, () => controls.lift(`screen:${index}`));
    }
    return button;
  });
  bars = axes.map((name) => {
    const axis = element("div", plainName(name)), track = element("span", ""), bar = element("i", "");
    axis.className = "axis";
    track.append(bar);
    axis.append(track);
    $("keys").append(axis);
    return bar;
  });
  $("keys").prepend(...keys);
  $("upload-field").hidden = state.start_size === null;
  $("names").hidden = !state.names.length;
  $("names").replaceChildren(...state.names.map((name) => element("span", name)));
  $("settings-section").hidden = state.kind === "game";
  for (const name of ["agreement", "drift"]) $(`${name}-field`).hidden = !state.meters.includes(name);
  for (const id of ["volume-field", "sound-row"]) $(id).hidden = state.sound === null;
  $("decoder").replaceChildren(...state.decoders.map((name) => new Option(name, name)));
  for (const [id, code] of Object.entries(SHORTCUTS)) {
    if (bindings.uses(code)) delete SHORTCUTS[id]; // the key belongs to the world
  }
  for (const [id, name] of Object.entries(NAMES)) label(id, name);
  const looks = bindings.horizontal >= 0 ? ["the mouse", ...[...bindings.axisKeys.keys()].slice(0, 2).map(keyName)] : [];
  const hint = [...bindings.labels.filter(Boolean), ...looks].slice(0, 9).map((text) => (text.includes("mouse") ? text : element("kbd", text)));
  $("hint").append("Play with ", ...hint.flatMap((part) => [part, " "]), "· touch · gamepad. ", element("kbd", "esc"), " pauses.");
}

function addScene(number) {
  const button = document.createElement("button"), image = document.createElement("img");
  image.src = `starts/${number}.jpg`;
  image.alt = "";
  button.setAttribute("aria-label", `Start scene ${number + 1}`);
  button.append(image);
  button.addEventListener("click", () => begin({ start: number }));
  $("scenes").append(button);
}

// Start with the middle of a picture, in the size of the world.
async function upload(file) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (bitmap === null) {
    notice(`${file.name} is not a picture that this browser reads.`);
    return;
  }
  const [height, width] = connection.state.start_size;
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { alpha: false });
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - scale * bitmap.width) / 2, (height - scale * bitmap.height) / 2, scale * bitmap.width, scale * bitmap.height);
  const jpeg = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  connection.start(new Uint8Array(await jpeg.arrayBuffer()));
}

function show(state) {
  const watching = !connection.plays && !state.free;
  const playing = connection.plays && !state.paused;
  stage.classList.toggle("playing", playing || watching);
  if (playing !== controls.active) {
    controls.active = playing;
    if (!playing) {
      controls.releaseAll();
      if (document.pointerLockElement) document.exitPointerLock();
    }
    picture.forget();
  }
  $("role").textContent = watching ? "watching, someone else plays" : playing ? "playing" : "paused";
  $("role").classList.toggle("playing", playing);
  $("begin-text").textContent = state.frame ? "Resume" : "Play";
  label("pause", state.paused ? "Resume" : "Pause");
  for (const id of ["pause", "step", "back", "reset", "record", "dice", "seed", "upload", "steps", "context_noise", "guidance", "sampler", "shift", "decoder"]) $(id).disabled = watching;
  $("record").setAttribute("aria-pressed", state.recording);
  $("recording-mark").hidden = !state.recording;
  for (let number = $("scenes").childElementCount; number < state.starts; number += 1) addScene(number);
  if (document.activeElement !== $("seed")) $("seed").value = state.seed;
  [...$("scenes").children].forEach((button, number) => button.setAttribute("aria-pressed", number === state.start));
  for (const [name, value] of Object.entries(state.settings)) {
    if (!$(name)) continue; // not for the page to change
    if (document.activeElement !== $(name) || $(name).matches("select")) $(name).value = value;
    const output = document.querySelector(`output[for="${name}"]`);
    if (output) output.textContent = value;
  }
  $("recordings-section").hidden = !state.recordings.length;
  if ($("recordings").childElementCount !== state.recordings.length) {
    $("recordings").replaceChildren(...state.recordings.map((name) => {
      const item = element("li", ""), link = element("a", name);
      link.href = `recordings/${name}`;
      link.download = name;
      item.append(link);
      return item;
    }));
    $("replay").textContent = `python -m owl replay ${state.folder}/${state.recordings.at(-1)}`;
  }
  if (state.paused) sound.rest();
  timeline.update(state);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(noticed);
  noticed = setTimeout(() => { $("notice").hidden = true; }, 5000);
}

// Resume or restart, with the keyboard on the stage and the mouse locked to it.
function play() {
  connection.command("resume");
  stage.focus();
  if (matchMedia("(pointer: fine)").matches) Promise.resolve(stage.requestPointerLock?.()).catch(() => {});
}

function begin(fields) {
  connection.command("reset", fields);
  play();
}

const actions = {
  pause: () => (connection.state.paused ? play() : connection.command("pause")),
  step: () => connection.command("step"),
  back: () => {
    const moment = timeline.before(connection.state, frame);
    if (moment !== undefined) connection.command("rewind", { moment });
  },
  reset: () => connection.command("reset"),
  record: () => connection.command("record", { on: !connection.state.recording }),
};
for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", () => connection.state && action());

$("begin").addEventListener("click", (event) => { event.stopPropagation(); play(); });
stage.addEventListener("click", () => {
  if (!connection.state) return;
  if (!controls.active) play();
  else if (!document.pointerLockElement && matchMedia("(pointer: fine)").matches) Promise.resolve(stage.requestPointerLock?.()).catch(() => {});
});
document.addEventListener("pointerlockchange", () => {
  if (!document.pointerLockElement && controls?.active) connection.command("pause"); // Escape was pressed
});
addEventListener("keydown", (event) => {
  if (!connection.state || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input[type=number], select, dialog *")) return;
  if (event.code === "Escape" && controls.active) connection.command("pause");
  else if (event.code === "Enter" && event.target === stage && !controls.active) play();
  const id = Object.keys(SHORTCUTS).find((name) => SHORTCUTS[name] === event.code);
  if (!id || $(id).disabled) return;
  event.preventDefault();
  actions[id]();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden && controls?.active) connection.command("pause");
});

for (const gesture of ["click", "keydown"]) {
  addEventListener(gesture, () => {
    if (connection.state?.sound) sound.start(connection.state.sound).catch((error) => notice(error.message));
  }, true);
}
for (const name of ["steps", "context_noise", "guidance"]) {
  $(name).addEventListener("input", () => { document.querySelector(`output[for="${name}"]`).textContent = $(name).value; });
  $(name).addEventListener("change", () => connection.command("settings", { [name]: Number($(name).value) }));
}
for (const name of ["decoder", "sampler"]) {
  $(name).addEventListener("change", () => connection.command("settings", { [name]: $(name).value }));
}
$("shift").addEventListener("change", () => {
  if ($("shift").checkValidity() && $("shift").value) connection.command("settings", { shift: Number($("shift").value) });
});
$("seed").addEventListener("change", () => {
  if ($("seed").checkValidity() && $("seed").value) connection.command("reset", { seed: Number($("seed").value) });
});
$("upload").addEventListener("change", () => {
  if (connection.state && $("upload").files.length) upload($("upload").files[0]);
  $("upload").value = ""; // the same file again is a change, too
});
$("dice").addEventListener("click", () => connection.command("reset", { seed: Math.floor(Math.random() * 2 ** 31) }));
$("volume").addEventListener("input", () => {
  sound.level = Number($("volume").value);
  document.querySelector('output[for="volume"]').textContent = $("volume").value;
});
document.querySelector('output[for="volume"]').textContent = $("volume").value;
$("sensitivity").addEventListener("input", () => {
  const value = Number($("sensitivity").value);
  document.querySelector('output[for="sensitivity"]').textContent = value;
  if (controls) controls.sensitivity = value;
});
document.querySelector('output[for="sensitivity"]').textContent = $("sensitivity").value;
$("sharp").addEventListener("change", () => $("picture").classList.toggle("sharp", $("sharp").checked));
$("toggle-stats").addEventListener("click", () => {
  toggle("stats", "toggle-stats");
  connection.measure(!$("stats").hidden);
});
$("toggle-panel").addEventListener("click", () => toggle("panel", "toggle-panel"));
$("reconnect").addEventListener("click", () => {
  $("lost").close();
  connection.open();
});
for (const [id, name] of Object.entries(NAMES)) label(id, name);
if (matchMedia("(max-width: 820px)").matches) toggle("panel", "toggle-panel");

setInterval(() => {
  if (!connection.state) return;
  const { fps, paused } = connection.state, rate = paused ? 0 : picture.rate;
  $("rate").textContent = paused ? `${round(fps)} frames/s` : `${round(rate)} of ${round(fps)} frames/s`;
  $("rate").classList.toggle("late", !paused && rate > 0 && rate < 0.93 * fps);
  if (!$("stats").hidden) {
    stats.update();
    $("sound").textContent = sound.summary;
  }
}, 500);

(function light() { // the buttons and axes that are in use
  if (controls) {
    const { held, shares } = controls;
    keys.forEach((key, index) => key.classList.toggle("down", held[index]));
    bars.forEach((bar, axis) => {
      bar.style.left = `${50 + 50 * Math.min(0, shares[axis])}%`;
      bar.style.width = `${50 * Math.abs(shares[axis])}%`;
    });
  }
  requestAnimationFrame(light);
})();

function toggle(id, button) {
  $(id).hidden = !$(id).hidden;
  $(button).setAttribute("aria-pressed", !$(id).hidden);
}

function label(id, text) {
  const button = $(id), mark = button.querySelector("i"), code = SHORTCUTS[id];
  button.replaceChildren(...(mark ? [mark] : []), text, ...(code ? [element("kbd", keyName(code))] : []));
  if (code) button.setAttribute("aria-keyshortcuts", keyName(code));
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function round(value) {
  return value < 10 ? value.toFixed(1) : Number(value.toFixed(1)).toString();
}
