// The jitter buffer in the thread of the sound.

import { JitterBuffer } from "./jitter.js";

const INTERVAL = 0.25; // seconds between two reports

class Speaker extends AudioWorkletProcessor {
  constructor({ outputChannelCount: [channels] }) {
    super();
    this.buffer = new JitterBuffer(channels, sampleRate);
    this.reported = 0;
    this.port.onmessage = ({ data }) => {
      if (data.samples) this.buffer.push(data.number, data.samples, currentTime);
      else this.buffer.rest();
    };
  }

  process(_, [output]) {
    this.buffer.pull(output);
    if (currentTime > this.reported + INTERVAL) {
      const { lag, underruns, speed } = this.buffer;
      this.port.postMessage({ lag, underruns, speed });
      this.reported = currentTime;
    }
    return true;
  }
}

registerProcessor("owl-speaker", Speaker);
