// The sound of the world, from the connection to the speaker.

export class Sound {
  constructor() {
    Object.assign(this, { context: null, speaker: null, volume: 1, report: null, refused: false });
  }

  // Begin, after a gesture of the person, which browsers demand. Throws once where browsers play no sound.
  async start(format) {
    if (this.refused) return;
    if (this.context !== null) {
      if (this.context.state === "suspended") await this.context.resume(); // the first gesture was not enough
      return;
    }
    try {
      await this.open(format);
    } catch (error) {
      this.refused = true;
      throw error;
    }
  }

  async open({ sample_rate: sampleRate, channels }) {
    if (!isSecureContext) throw new Error("Browsers play sound of this machine or of https only: use an SSH tunnel.");
    this.context = new AudioContext({ sampleRate, latencyHint: "interactive" });
    await this.context.audioWorklet.addModule("page/speaker.js");
    this.loudness = new GainNode(this.context, { gain: this.volume });
    this.speaker = new AudioWorkletNode(this.context, "owl-speaker", { numberOfInputs: 0, outputChannelCount: [channels] });
    this.speaker.port.onmessage = ({ data }) => { this.report = data; };
    this.speaker.connect(this.loudness).connect(this.context.destination);
  }

  add(number, samples) {
    this.speaker?.port.postMessage({ number, samples }, [samples.buffer]);
  }

  rest() {
    this.speaker?.port.postMessage({});
  }

  set level(volume) {
    this.volume = volume;
    this.loudness?.gain.setTargetAtTime(volume, this.context.currentTime, 0.02);
  }

  // Its state, in words.
  get summary() {
    if (this.report === null) return this.refused ? "none in this browser" : "starts with the next click";
    const { lag, underruns, speed } = this.report, late = 1000 * (lag + (this.context.outputLatency || 0));
    const slow = speed < 1 ? ` · ${Math.round(100 * speed)}% speed` : "";
    return `${late.toFixed(0)} ms late${slow} · ${underruns} underrun${underruns === 1 ? "" : "s"}`;
  }
}
