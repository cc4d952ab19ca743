// Sound that arrives in parts, played without gaps: a reserve covers parts that are late, and the speed follows that of
// the frames, so that a world that is slower than real time is heard slower, not in pieces.

const RESERVE = 0.09; // seconds of sound that are left when the next part arrives
const BEGIN = 3; // reserves to begin with, until the speed is known and the page has settled; then one is enough
const MOST = 0.18; // of the reserve, which grows when it did not suffice; sound 185 ms late is acceptable (ITU-R BT.1359)
const BEHIND = 0.3; // seconds of sound beyond which the oldest is skipped
const WINDOW = 2; // seconds over which the speed is measured
const TOLERANCE = 0.04; // deviation of the speed that is not heard
const LITTLE = 0.75; // of the reserve: if less is left, it is drawn out, which is noticed less than a gap
const DRAWN_OUT = 0.4; // of the speed, at the least
const SLOWEST = 0.25; // speed; a part that comes later still is one that was held up
const FADE = 0.003; // seconds, so that a gap does not click

export class JitterBuffer {
  // rate: samples per second
  constructor(channels, rate) {
    Object.assign(this, { rate, reserve: RESERVE, underruns: 0, speed: 1, lag: 0, gain: 0, next: null });
    this.ring = Array.from({ length: channels }, () => new Float32Array(2 * rate));
    this.last = new Float32Array(channels);
    this.clear();
  }

  clear() {
    Object.assign(this, { read: 0, write: 0, hold: 0, starved: true, live: false, arrivals: [] });
  }

  // Nothing more will come for now: the end of what is there is no underrun.
  rest() {
    this.live = false;
    this.arrivals = [];
  }

  // number: of the frame; samples: Int16Array of all channels in turn; time: in seconds
  push(number, samples, time) {
    if (number !== this.next) this.clear();
    this.next = number + 1;
    this.live = true;
    if (this.starved) {
      this.starved = false;
      this.lag = BEGIN * this.reserve;
      this.hold = Math.round(this.lag * this.rate);
    }
    if (this.hold <= FADE * this.rate && this.waiting > BEHIND) { // but not what it begins with
      this.read = Math.max(this.read, this.write - this.reserve * this.rate);
      this.hold = FADE * this.rate;
    }
    this.lag += 0.1 * (this.waiting - this.lag);
    const channels = this.ring.length, length = this.ring[0].length, count = samples.length / channels;
    for (let i = 0; i < count; i += 1) {
      for (let c = 0; c < channels; c += 1) this.ring[c][(this.write + i) % length] = samples[i * channels + c] / 32767;
    }
    this.write += count;
    this.follow(count / this.rate, time);
  }

  // Seconds until what arrives now is heard.
  get waiting() {
    return (this.hold + (this.write - this.read) / this.pace) / this.rate;
  }

  get pace() {
    const left = (this.write - this.read) / (LITTLE * this.reserve * this.rate);
    return this.speed * (1 + clamp((this.lag - this.reserve) / 2, TOLERANCE)) * Math.min(1, Math.max(left, DRAWN_OUT));
  }

  follow(seconds, time) {
    const { arrivals } = this;
    arrivals.push({ time, seconds, took: Math.min(time - (arrivals.at(-1)?.time ?? time), seconds / SLOWEST) });
    while (arrivals.length > 4 && arrivals[0].time < time - WINDOW) arrivals.shift();
    if (arrivals.length < 4) return;
    const sum = (name) => arrivals.slice(1).reduce((total, arrival) => total + arrival[name], 0);
    const measured = sum("seconds") / sum("took");
    this.speed = measured < 1 - TOLERANCE ? measured : 1;
  }

  // Fill the arrays of the channels.
  pull(outputs) {
    const { ring, last } = this, length = ring[0].length, step = 1 / (FADE * this.rate), pace = this.pace;
    for (let i = 0; i < outputs[0].length; i += 1) {
      const plays = this.hold <= 0 && this.read + 1 < this.write;
      if (this.hold > 0) this.hold -= 1;
      else if (!plays && !this.starved) this.starve();
      if (plays) {
        const at = Math.floor(this.read), part = this.read - at;
        for (let c = 0; c < ring.length; c += 1) {
          last[c] = (1 - part) * ring[c][at % length] + part * ring[c][(at + 1) % length];
        }
        this.read += pace;
      }
      this.gain += clamp((plays ? 1 : 0) - this.gain, step);
      for (let c = 0; c < ring.length; c += 1) outputs[c][i] = this.gain * last[c];
    }
  }

  starve() {
    this.starved = true;
    if (!this.live) return;
    this.underruns += 1;
    this.reserve = Math.min(MOST, this.reserve + 0.02);
  }
}

function clamp(value, bound) {
  return Math.max(-bound, Math.min(bound, value));
}
