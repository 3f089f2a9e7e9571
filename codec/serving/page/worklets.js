// What runs in the audio thread: the microphone cut into pieces, and a queue that is played.

const STATUS_EVERY_S = 0.05;

// Mono samples -> Int16Array pieces of 10 ms.
class Capture extends AudioWorkletProcessor {
  piece = new Int16Array(Math.round(sampleRate / 100));
  filled = 0;

  process([input]) {
    for (const sample of input[0] ?? []) {
      this.piece[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece, [this.piece.buffer]);
        this.piece = new Int16Array(this.filled);
        this.filled = 0;
      }
    }
    return true;
  }
}

// Float32Array pieces -> sound. It waits until `startS` seconds are there, and again whenever it ran empty. Where more
// than `maxS` wait, the oldest go: a conversation must not fall behind.
class Player extends AudioWorkletProcessor {
  constructor({ processorOptions: { startS, maxS } }) {
    super();
    this.start = startS * sampleRate;
    this.max = maxS * sampleRate;
    this.queue = [];
    this.at = 0; // of the first piece
    this.waiting = 0;
    this.isPlaying = false;
    this.isEnded = false;
    this.played = 0;
    this.dropouts = 0;
    this.peak = 0;
    this.sinceStatus = 0;
    this.port.onmessage = ({ data }) => {
      if (data === "end") this.isEnded = true;
      else {
        this.queue.push(data);
        this.waiting += data.length;
        while (this.waiting - this.queue[0].length + this.at > this.max) this.drop();
      }
    };
  }

  drop() {
    this.waiting -= this.queue.shift().length - this.at;
    this.at = 0;
  }

  process(_, [output]) {
    const [channel] = output;
    if (!this.isPlaying) this.isPlaying = this.waiting > 0 && (this.isEnded || this.waiting >= this.start);
    for (let i = 0; i < channel.length && this.isPlaying; ) {
      if (!this.queue.length) {
        this.isPlaying = false;
        if (!this.isEnded) this.dropouts++;
        break;
      }
      const [piece] = this.queue;
      const n = Math.min(channel.length - i, piece.length - this.at);
      for (let k = 0; k < n; k++) {
        const sample = piece[this.at + k];
        channel[i + k] = sample;
        this.peak = Math.max(this.peak, Math.abs(sample));
      }
      i += n;
      this.at += n;
      this.waiting -= n;
      this.played += n;
      if (this.at === piece.length) {
        this.queue.shift();
        this.at = 0;
      }
    }
    this.sinceStatus += channel.length;
    const isOver = this.isEnded && !this.waiting;
    if (this.sinceStatus >= STATUS_EVERY_S * sampleRate || isOver) {
      const { played, waiting, dropouts, peak } = this;
      this.port.postMessage({ played, waiting, dropouts, peak, isOver });
      this.sinceStatus = this.peak = 0;
    }
    return !isOver;
  }
}

registerProcessor("capture", Capture);
registerProcessor("player", Player);
