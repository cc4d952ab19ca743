// The connection to the server: messages of protocol version 1, see owl/play/protocol.py.

const PROTOCOL = "owl-play.1";
const INPUT = 1, COMMAND = 2, START = 3, FRAME = 16, STATE = 17, NOTICE = 18, SOUND = 19, METERS = 20;
const PARTS = ["wait", "game", "commit", "denoise", "decode", "encode"];
const HEADER = 1 + 4 + 8 + 4 * PARTS.length;
const text = new TextDecoder();

export class Connection {
  // handlers: frame({number, time, parts, jpeg}), sound(number, Int16Array), state(object), notice(string),
  // meters(array of objects), lost(reason)
  constructor(handlers) {
    this.handlers = handlers;
    this.state = null;
    this.received = 0;
    this.measures = false;
    this.open();
  }

  open() {
    const url = new URL("play", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.search = "";
    this.socket = new WebSocket(url, PROTOCOL);
    this.socket.binaryType = "arraybuffer";
    this.greeted = false;
    this.socket.onmessage = (event) => this.receive(event.data);
    this.socket.onclose = (event) => this.handlers.lost(event.reason || "The server does not answer.");
  }

  receive(data) {
    const view = new DataView(data);
    this.received += data.byteLength;
    const kind = view.getUint8(0);
    if (kind === FRAME) {
      const parts = {};
      PARTS.forEach((name, index) => { parts[name] = view.getFloat32(13 + 4 * index, true); });
      this.handlers.frame({
        number: view.getUint32(1, true), time: view.getFloat64(5, true), parts, jpeg: new Uint8Array(data, HEADER),
      });
    } else if (kind === SOUND) {
      this.handlers.sound(view.getUint32(1, true), new Int16Array(data.slice(5)));
    } else if (kind === STATE) {
      this.state = JSON.parse(text.decode(new Uint8Array(data, 1)));
      this.handlers.state(this.state);
      if (!this.greeted && this.measures) this.measure(true);
      this.greeted = true;
    } else if (kind === NOTICE) {
      this.handlers.notice(text.decode(new Uint8Array(data, 1)));
    } else if (kind === METERS) {
      this.handlers.meters(JSON.parse(text.decode(new Uint8Array(data, 1))));
    } // other types belong to later additions
  }

  get plays() {
    return this.state !== null && this.state.role === "player";
  }

  // Take the controls if they are free, then send a command.
  command(name, fields = {}) {
    if (this.state === null || this.socket.readyState !== WebSocket.OPEN) return;
    if (!this.plays && this.state.free && name !== "play") this.command("play");
    this.request({ name, ...fields });
  }

  // Request the meters or stop them, playing or watching; also of a server that is connected later.
  measure(on) {
    this.measures = on;
    if (this.state?.meters.length && this.socket.readyState === WebSocket.OPEN) this.request({ name: "meters", on });
  }

  request(command) {
    this.send(COMMAND, new TextEncoder().encode(JSON.stringify(command)));
  }

  // Start with a picture: a Uint8Array of JPEG, of the size that the state names.
  start(jpeg) {
    if (!this.plays) this.command("play");
    this.send(START, jpeg);
  }

  send(kind, content) {
    const message = new Uint8Array(1 + content.length);
    message[0] = kind;
    message.set(content, 1);
    this.socket.send(message);
  }

  // time: of the oldest event, in milliseconds; held: a boolean for each button; moved, sticks: a number for each axis
  input(time, held, moved, sticks) {
    if (!this.plays || this.socket.readyState !== WebSocket.OPEN) return;
    const axes = [...moved, ...sticks];
    const view = new DataView(new ArrayBuffer(9 + 4 * axes.length + Math.ceil(held.length / 8)));
    view.setUint8(0, INPUT);
    view.setFloat64(1, time, true);
    axes.forEach((value, index) => view.setFloat32(9 + 4 * index, value, true));
    held.forEach((down, index) => {
      const byte = 9 + 4 * axes.length + (index >> 3);
      if (down) view.setUint8(byte, view.getUint8(byte) | (1 << (index & 7)));
    });
    this.socket.send(view.buffer);
  }
}
