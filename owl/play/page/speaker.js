// The jitter buffer in the thread of the sound.

import { JitterBuffer } from "./jitter.js";

const TELL = 0.25; // seconds between two reports

class Speaker extends AudioWorkletProcessor {
  constructor({ outputChannelCount: [channels] }) {
    super();
    this.buffer = new JitterBuffer(channels, sampleRate);
    this.told = 0;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.buffer.push(data.number, data.samples, currentTime);
      else this.buffer.rest();
    };
  }

  process(_, [output]) {
    this.buffer.pull(output);
    if (currentTime > this.told + TELL) {
      const { lag, underruns, speed } = this.buffer;
      this.port.postMessage({ lag, underruns, speed });
      this.told = currentTime;
    }
    return true;
  }
}

registerProcessor("owl-speaker", Speaker);
