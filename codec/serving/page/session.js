// A loopback session: samples go to the server, codes and decoded samples come back. codec/serving/protocol.py has the
// protocol.

const REASONS = new Map([
  [1006, "The connection was lost. Is the server still running?"],
  [1012, "The server was shut down."],
]);

export class Session {
  // `on`: functions for what comes: codes(frames), audio(Float32Array), done(), and failed(reason, closeCode).
  constructor(numQuantizers, token, on) {
    const address = new URL("stream", location.href);
    address.protocol = location.protocol.replace("http", "ws");
    address.hash = "";
    address.search = token ? `?token=${encodeURIComponent(token)}` : "";
    this.on = on;
    this.welcome = null;
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.opened = new Promise((resolve) => (this.resolve = resolve));
    this.socket.onopen = () =>
      this.socket.send(JSON.stringify({ kind: "loopback", num_quantizers: numQuantizers, sample_format: "pcm16" }));
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.audio(data));
    this.socket.onclose = ({ code, reason }) => {
      this.resolve(null);
      if (code === 1000 && this.isDone) on.done();
      else if (!this.isLeft) on.failed(this.reason ?? (reason || REASONS.get(code) || `The session ended (${code}).`), code);
    };
  }

  hear(said) {
    if (said.error) this.reason = said.error[0].toUpperCase() + said.error.slice(1) + ".";
    else if (said.codes) this.on.codes(said.codes);
    else if (said.done) this.isDone = true;
    else if (!this.welcome) {
      this.welcome = said;
      this.resolve(said);
    }
  }

  audio(data) {
    this.on.audio(Float32Array.from(new Int16Array(data), (sample) => sample / 32768));
  }

  // Int16Array, mono.
  push(samples) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(samples);
  }

  end() {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send('{"end": true}');
  }

  leave() {
    this.isLeft = true;
    this.socket.close();
  }
}
