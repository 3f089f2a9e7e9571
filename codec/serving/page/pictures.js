// Spectrograms and codes, drawn as they come, from left to right and over again: equal places are equal times.

const WINDOW_S = 6; // of a whole picture
const COLUMNS_PER_S = 100;
const GAP = 8; // columns that are blank ahead of the newest one
const LOW_DB = -85, HIGH_DB = -10;

class Sweep {
  constructor(canvas, height, columnsPerSecond) {
    this.width = canvas.width = Math.round(WINDOW_S * columnsPerSecond);
    this.height = canvas.height = height;
    this.context = canvas.getContext("2d");
    this.reset();
  }

  reset() {
    this.column = 0;
    this.context.clearRect(0, 0, this.width, this.height);
  }

  // `colours`: [r, g, b] from top to bottom.
  draw(colours) {
    const image = this.context.createImageData(1, this.height);
    colours.forEach(([r, g, b], i) => image.data.set([r, g, b, 255], 4 * i));
    const x = this.column++ % this.width;
    this.context.putImageData(image, x, 0);
    for (let ahead = 1; ahead <= GAP; ahead++) this.context.clearRect((x + ahead) % this.width, 0, 1, this.height);
  }
}

export class Spectrogram extends Sweep {
  constructor(canvas, rateHz) {
    const size = 2 ** Math.round(Math.log2(rateHz * 0.032)); // a window of 32 ms
    super(canvas, size / 4, COLUMNS_PER_S);
    this.size = size;
    this.hop = Math.round(rateHz / COLUMNS_PER_S);
    this.window = Float32Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size));
    this.map = Array.from({ length: 256 }, (_, i) => colour(i / 255));
  }

  reset() {
    super.reset();
    this.samples = [];
  }

  // Float32Array of any length.
  push(samples) {
    for (const sample of samples) this.samples.push(sample);
    while (this.samples.length >= this.size) {
      this.draw(this.spectrum());
      this.samples.splice(0, this.hop);
    }
  }

  spectrum() {
    const re = Float32Array.from(this.window, (w, i) => w * this.samples[i]);
    const im = new Float32Array(this.size);
    transform(re, im);
    return Array.from({ length: this.height }, (_, i) => {
      const bin = this.size / 2 - 1 - 2 * i; // two bins a pixel
      const power = Math.max(re[bin] ** 2 + im[bin] ** 2, re[bin - 1] ** 2 + im[bin - 1] ** 2);
      const db = 10 * Math.log10((16 * power) / this.size ** 2 + 1e-12);
      const shade = Math.max(0, Math.min(1, (db - LOW_DB) / (HIGH_DB - LOW_DB)));
      return this.map[Math.round(255 * shade)];
    });
  }
}

export class CodeStrip extends Sweep {
  constructor(canvas, codebookSizes, framesPerSecond) {
    super(canvas, codebookSizes.length, framesPerSecond);
    this.sizes = codebookSizes;
  }

  // Codes of one frame. Neighbouring codes get different colours, and equal ones the same.
  push(frame) {
    this.draw(
      this.sizes.map((size, row) => {
        if (row >= frame.length) return [8, 6, 24];
        const hue = (frame[row] * 0.61803398875) % 1;
        return colour(0.2 + (0.75 * ((frame[row] / size + hue) % 1)));
      }),
    );
  }
}

// Dark to bright by way of purple and orange: 0..1 -> [r, g, b].
function colour(t) {
  const stops = [[8, 6, 24], [58, 15, 92], [140, 32, 105], [214, 69, 65], [249, 142, 25], [252, 240, 164]];
  const at = Math.min(t * (stops.length - 1), stops.length - 1.0001);
  const [low, high] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
  return low.map((value, i) => Math.round(value + (high[i] - value) * (at % 1)));
}

// A discrete Fourier transform in place; the length is a power of two.
function transform(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let length = 2; length <= n; length <<= 1) {
    for (let k = 0; k < length / 2; k++) {
      const [c, s] = [Math.cos((2 * Math.PI * k) / length), -Math.sin((2 * Math.PI * k) / length)];
      for (let i = k; i < n; i += length) {
        const j = i + length / 2;
        const [r, q] = [re[j] * c - im[j] * s, re[j] * s + im[j] * c];
        [re[j], im[j], re[i], im[i]] = [re[i] - r, im[i] - q, re[i] + r, im[i] + q];
      }
    }
  }
}
