// The page: a microphone or a recording goes through the codec, and what comes back is heard and seen.

import { CodeStrip, Spectrogram } from "./pictures.js";
import { Session } from "./session.js";

const START_S = 0.08; // what is there before playing begins
const MAX_LIVE_S = 0.5; // more than that is no conversation any more
const LEAD_S = 0.12; // by how much a recording is sent ahead of the clock

const byId = (id) => document.getElementById(id);
let model, context, run, original, decoded, strip;
let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";

async function begin() {
  try {
    const answer = await fetch("model");
    if (!answer.ok) throw new Error(answer.status);
    model = await answer.json();
  } catch {
    return say("The server cannot be reached. Reload the page once it runs.", true);
  }
  byId("model").textContent =
    `${model.model}: speech at ${model.sample_rate_hz / 1000} kHz becomes integers, and speech again, ` +
    `${frameRate().toFixed(frameRate() % 1 ? 1 : 0)} frames a second.`;
  original = new Spectrogram(byId("original"), model.sample_rate_hz);
  decoded = new Spectrogram(byId("decoded"), model.sample_rate_hz);
  strip = new CodeStrip(byId("codes"), model.codebook_sizes, frameRate());
  const rows = byId("rows");
  rows.max = model.valid_num_quantizers.length - 1;
  rows.value = rows.max; // in this order: the value is kept below the maximum
  rows.disabled = rows.max === "0";
  rows.oninput = showRows;
  showRows();
  byId("speak").disabled = false;
  byId("speak").onclick = () => (run ? stop() : start(speak));
  byId("file").onchange = ({ target }) => {
    if (target.files.length) start((context) => recording(context, target.files[0]));
  };
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  };
  document.ondragleave = ({ relatedTarget }) => relatedTarget ?? document.body.classList.remove("dropping");
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) start((context) => recording(context, file));
  };
  byId("token-form").onsubmit = (event) => {
    event.preventDefault();
    token = byId("token").value;
    byId("token-form").hidden = true;
    say("Ready.");
  };
  byId("play-original").onclick = () => replay(kept.sent);
  byId("play-decoded").onclick = () => replay(kept.received);
  say("Ready.");
}

const frameRate = () => model.sample_rate_hz / model.hop_length;
const chosenRows = () => model.valid_num_quantizers[byId("rows").value];
const bitsPerFrame = (rows) => model.codebook_sizes.slice(0, rows).reduce((sum, n) => sum + Math.ceil(Math.log2(n)), 0);
const kept = { sent: [], received: [] }; // of the last run

function showRows() {
  const rows = chosenRows();
  byId("chosen").textContent = `${rows} of ${model.codebook_sizes.length}, ` + kbps(bitsPerFrame(rows) * frameRate());
}

const kbps = (bps) => `${(bps / 1000).toFixed(bps < 10000 ? 2 : 1).replace(/\.?0+$/, "")} kbps`;

function say(text, isBad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", isBad);
}

// Opens a session and lets `source` feed it: a function of the context that resolves to one that begins to send, and
// returns how to stop.
async function start(source) {
  stopReplay();
  if (run) leave();
  const mine = (run = new Run());
  let feed;
  say("Connecting…");
  show();
  try {
    // At the model's rate, so that the browser does all resampling.
    context ??= new AudioContext({ sampleRate: model.sample_rate_hz, latencyHint: "interactive" });
    if (!context.hasModules) {
      await context.audioWorklet.addModule("page/worklets.js");
      context.hasModules = true;
    }
    await context.resume();
    feed = await source(context);
    if (run !== mine) return feed.cancel?.();
    mine.session = new Session(chosenRows(), token, {
      codes: (frames) => mine.codes(frames),
      audio: (samples) => mine.audio(samples),
      done: () => mine.player.port.postMessage("end"),
      failed: (reason, code) => fail(mine, reason, code),
    });
    if ((await mine.session.opened) && run === mine) {
      mine.play(feed.isLive);
      mine.stopFeeding = feed.begin((samples) => mine.push(samples), () => stop());
      say(feed.says);
    } else {
      feed.cancel?.();
      mine.session.leave();
    }
  } catch (error) {
    feed?.cancel?.();
    fail(mine, explained(error));
  }
  show();
}

function explained(error) {
  if (error.name === "SecurityError") return "Browsers give the microphone to pages of https or localhost only.";
  if (error.name === "NotAllowedError") return "The browser was told not to let this page hear the microphone.";
  if (error.name === "NotFoundError") return "No microphone was found.";
  if (error.name === "NotSupportedError") return "This browser cannot hear the microphone at this rate. A file works.";
  if (error.name === "EncodingError") return "This file is no audio that the browser knows.";
  return `That did not work: ${error.message}`;
}

// The last samples go out; what is still due comes and is played.
function stop() {
  if (!run) return;
  if (!run.stopFeeding) {
    leave();
    return say("Ready.");
  }
  run.stopFeeding();
  run.session.end();
  run.isStopping = true;
  say("Finishing…");
  show();
}

function leave() {
  run.stopFeeding?.();
  run.session?.leave();
  run.player?.port.postMessage("end");
  finish();
}

function fail(failed, reason, code) {
  if (run !== failed) return;
  failed.stopFeeding?.();
  failed.session?.leave();
  failed.player?.port.postMessage("end");
  finish();
  say(reason, true);
  byId("token-form").hidden = code !== 4401;
  if (code === 4401) byId("token").focus();
}

function finish() {
  if (!run) return;
  Object.assign(kept, { sent: run.sent, received: run.received });
  run = undefined;
  const save = byId("save");
  if (save.href) URL.revokeObjectURL(save.href);
  save.hidden = !kept.received.length;
  if (kept.received.length) save.href = URL.createObjectURL(wav(kept.received));
  byId("file").value = "";
  show();
}

function show() {
  byId("speak").textContent = run ? "Stop" : "Speak";
  byId("speak").classList.toggle("live", Boolean(run));
  byId("speak").disabled = Boolean(run?.isStopping);
  byId("play-original").disabled = Boolean(run) || !kept.sent.length;
  byId("play-decoded").disabled = Boolean(run) || !kept.received.length;
}

// What one session sent and received, and when.
class Run {
  sent = [];
  received = [];
  capturedAt = []; // milliseconds, of the first sample of each piece that was sent
  latencies = [];
  numSent = 0;
  numReceived = 0;
  numFrames = 0;

  constructor() {
    for (const picture of [original, decoded, strip]) picture.reset();
    for (const id of ["bitrate", "latency", "buffered", "dropouts"]) byId(id).textContent = "–";
    byId("heard").textContent = "0.0 s";
    this.rows = chosenRows();
  }

  play(isLive) {
    this.player = new AudioWorkletNode(context, "player", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { startS: START_S, maxS: isLive ? MAX_LIVE_S : Infinity },
    });
    const volume = new GainNode(context);
    const follow = () => (volume.gain.value = byId("aloud").checked ? 1 : 0);
    follow();
    byId("aloud").onchange = follow;
    this.player.connect(volume).connect(context.destination);
    this.player.port.onmessage = ({ data }) => {
      byId("level").value = data.isOver ? 0 : data.peak;
      byId("heard").textContent = `${(data.played / context.sampleRate).toFixed(1)} s`;
      byId("dropouts").textContent = data.dropouts;
      byId("buffered").textContent = `${Math.round((1000 * data.waiting) / context.sampleRate)} ms`;
      if (!data.isOver) return;
      volume.disconnect();
      if (run === this) {
        finish();
        say("Done. Listen once more, or go on.");
      }
    };
  }

  push(samples) {
    this.session.push(samples);
    this.capturedAt.push([this.numSent, performance.now() - (1000 * samples.length) / model.sample_rate_hz]);
    this.numSent += samples.length;
    const audio = Float32Array.from(samples, (sample) => sample / 32768);
    this.sent.push(audio);
    original.push(audio);
  }

  codes(frames) {
    for (const frame of frames) strip.push(frame);
    this.numFrames += frames.length;
    byId("bitrate").textContent = kbps(bitsPerFrame(this.rows) * frameRate());
  }

  audio(samples) {
    this.player.port.postMessage(samples.slice());
    this.received.push(samples);
    decoded.push(samples);
    // Of the first sample of this piece: it waited longest.
    while (this.capturedAt.length > 1 && this.capturedAt[1][0] <= this.numReceived) this.capturedAt.shift();
    const [first, time] = this.capturedAt[0];
    const offset = (1000 * (this.numReceived - first)) / model.sample_rate_hz;
    this.latencies.push(performance.now() - time - offset);
    if (this.latencies.length > 25) this.latencies.shift();
    const sorted = [...this.latencies].sort((a, b) => a - b);
    byId("latency").textContent = `${Math.round(sorted[sorted.length >> 1])} ms`;
    this.numReceived += samples.length;
  }
}

// Sources: what they resolve to begins to send, and returns how to stop.

async function speak(context) {
  const constraints = { channelCount: 1, echoCancellation: true, noiseSuppression: false, autoGainControl: false };
  if (!navigator.mediaDevices) throw new DOMException("", "SecurityError");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: constraints });
  const release = () => stream.getTracks().forEach((track) => track.stop());
  return {
    isLive: true,
    says: "Speak: you hear the decoded voice.",
    cancel: release,
    begin: (push, ended) => {
      const source = context.createMediaStreamSource(stream);
      const capture = new AudioWorkletNode(context, "capture", {
        channelCount: 1,
        channelCountMode: "explicit",
        numberOfOutputs: 0,
      });
      capture.port.onmessage = ({ data }) => push(data);
      source.connect(capture);
      stream.getAudioTracks()[0].onended = ended; // unplugged
      return () => {
        source.disconnect();
        capture.port.onmessage = null;
        release();
      };
    },
  };
}

async function recording(context, file) {
  const buffer = await context.decodeAudioData(await file.arrayBuffer());
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const samples = Int16Array.from(channels[0], (_, i) => {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    return Math.max(-32768, Math.min(32767, Math.round(mean * 32768)));
  });
  return {
    isLive: false,
    says: `Playing ${file.name}, decoded.`,
    begin: (push, ended) => {
      const piece = Math.round(model.sample_rate_hz / 100);
      const began = performance.now();
      let at = 0;
      const timer = setInterval(() => {
        const due = ((performance.now() - began) / 1000 + LEAD_S) * model.sample_rate_hz;
        for (; at < samples.length && at + piece <= due; at += piece) push(samples.slice(at, at + piece));
        if (at >= samples.length) ended();
      }, 10);
      return () => clearInterval(timer);
    },
  };
}

// Once more.

let replaying;

function stopReplay() {
  replaying?.stop();
  replaying = undefined;
}

function replay(pieces) {
  stopReplay();
  const samples = joined(pieces);
  const buffer = context.createBuffer(1, samples.length, model.sample_rate_hz);
  buffer.copyToChannel(samples, 0);
  replaying = new AudioBufferSourceNode(context, { buffer });
  replaying.connect(context.destination);
  replaying.start();
}

function joined(pieces) {
  const samples = new Float32Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    samples.set(piece, at);
    at += piece.length;
  }
  return samples;
}

// A WAV file of 16 bits.
function wav(pieces) {
  const samples = Int16Array.from(joined(pieces), (sample) => Math.max(-32768, Math.min(32767, sample * 32768)));
  const header = new DataView(new ArrayBuffer(44));
  const rate = model.sample_rate_hz;
  const fields = ["RIFF", 36 + 2 * samples.length, "WAVE", "fmt ", 16, [1, 1], rate, 2 * rate, [2, 16], "data"];
  let at = 0;
  for (const field of [...fields, 2 * samples.length]) {
    if (typeof field === "string") [...field].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
    else if (typeof field === "number") header.setUint32(at, field, true);
    else field.forEach((value, i) => header.setUint16(at + 2 * i, value, true));
    at += 4;
  }
  return new Blob([header, samples], { type: "audio/wav" });
}

begin();
