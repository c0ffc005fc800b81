// Runs TinyGPT bundles: WebAssembly in Node (22 or later) and in browsers, WebGPU by the module webgpu.mjs beside it.
//
//   const session = await open("path/or/url/of/the/bundle", { threads: 2, seed: 42 });
//   const { loss, gradNorm } = await session.trainStep(tokens, targets); // integers [batch * context] each
//   const text = await session.generate("ROMEO:", 100, { temperature: 0.8, topK: 40, seed: 1 });
//
// A seed gives the same weights and batches on every target; checkpoints are those of the Python runtime.
// Sizes are plain numbers below 2^53; BigInt is for the WebAssembly API and 64-bit seeds.
//
// Threads share a memory, which browsers give to cross-origin isolated pages; elsewhere one thread runs.

const node = globalThis.process?.versions?.node ? (name) => process.getBuiltinModule(`node:${name}`) : null;
const WORKER = "tinygpt-worker";
const PAGE = 65536;
const MAX_PAGES = { 32: 2 ** 16, 64: 2 ** 26 };
const MAX_THREADS = 64;
const CHUNK = 1 << 24; // bytes of a checkpoint held at a time
const AGAIN = "compile the bundle again: tinygpt compile CONFIG --target T --out DIR";

// Words of the first page (an Int32Array) by which threads meet.
const POSTED = 16, ENTRY = 17, FINISHED = 64;

// Element types: arrays, and names in numpy; safetensors has them in capitals.
const ARRAYS = { f32: Float32Array, i32: Int32Array, u32: Uint32Array, bool: Uint8Array };
const NUMPY = { f32: "<f4", i32: "<i4", u32: "<u4", bool: "|b1" };

/** The bundle, a file or the device is wrong. `hint` is the next step. */
export class UserError extends Error {
  name = "UserError";

  constructor(message, hint = "") {
    super(message);
    this.hint = hint;
  }
}

/** The loss or the gradient norm is not finite: the weights in memory are of no more use. */
export class DivergedError extends UserError {}

// ---- opening

/**
 * Load a bundle and start a session with the initial weights of `seed`. source: a folder (Node), a URL, or a function from
 * a file's name to its bytes. threads: every core by default. blocking: false keeps this thread free while a function
 * runs. Throws UserError if the bundle is damaged or cannot run here.
 */
export async function open(source, { threads, seed = 42, blocking = Boolean(node || typeof window === "undefined") } = {}) {
  const files = typeof source === "function" ? source : reader(source);
  const document = parseJson(new TextDecoder().decode(await files("manifest.json")), "manifest.json");
  const Kind = document?.target?.name === "wgsl" ? (await import("./webgpu.mjs")).GpuEngine : Engine;
  const manifest = validated(document, Kind.places);
  const engine = await Kind.start(manifest, (name) => checkedFile(files, manifest, name), threads, blocking);
  const session = new Session(manifest, engine, files);
  try {
    await session.init(seed);
  } catch (error) {
    engine.close();
    throw error;
  }
  return session;
}

function reader(source) {
  const text = String(source);
  if (node && !/^(https?|blob|data):/.test(text)) {
    return async (name) => {
      try {
        return new Uint8Array(await node("fs/promises").readFile(node("path").join(text, name)));
      } catch (error) {
        throw new UserError(`${name} cannot be read: ${error.message}`, "give the folder of a bundle");
      }
    };
  }
  const base = new URL(text.endsWith("/") ? text : `${text}/`, globalThis.location?.href);
  return async (name) => {
    const response = await fetch(new URL(name, base));
    if (!response.ok) throw new UserError(`${response.url}: ${response.status} ${response.statusText}`, "check the URL");
    return new Uint8Array(await response.arrayBuffer());
  };
}

/** A file of the bundle, if the manifest has its hash. */
async function checkedFile(files, manifest, name) {
  const bytes = Object.hasOwn(manifest.files, name) ? await files(name) : null;
  if (!bytes || sha256(bytes) !== manifest.files[name]) {
    throw new UserError(`${name} is not the file this bundle was built with`, AGAIN);
  }
  return bytes;
}

// A manifest is hostile until validated: every number that becomes an address is checked, here and by the engine's `places`.

function validated(m, placesOf) {
  const require = (fine, what, value) => {
    if (!fine) throw new UserError(`manifest.json: ${what} is ${JSON.stringify(value)}`, AGAIN);
    return value;
  };
  const integer = (value, what, low, high) => require(Number.isSafeInteger(value) && value >= low && value <= high, what, value);
  const object = (value, what) => require(typeof value === "object" && value && !Array.isArray(value), what, value);
  const list = (value, what) => require(Array.isArray(value), what, value);
  require(object(m, "document").format === "tinygpt-bundle" && m.version === 1, "format version", m.version);
  for (const key of ["pools", "training", "target", "functions", "files"]) object(m[key], key);
  for (const key of ["batch", "context"]) integer(m[key], key, 1, 2 ** 24);
  const places = placesOf(m, { require, integer, object, list });

  const slots = (items, what) => {
    for (const slot of list(items, what)) {
      const { name, dtype, shape, pool, offset } = object(slot, what);
      require(typeof name === "string" && Object.hasOwn(ARRAYS, dtype) && Object.hasOwn(m.pools, pool), `a slot of ${what}`, slot);
      slot.count = list(shape, `${name}.shape`).reduce((n, d) => n * integer(d, `${name}.shape`, 1, 2 ** 40), 1);
      slot.bytes = slot.count * ARRAYS[dtype].BYTES_PER_ELEMENT;
      integer(offset, `${name}.offset`, 0, m.pools[pool] - slot.bytes);
      require(offset % ARRAYS[dtype].BYTES_PER_ELEMENT === 0, `${name}.offset`, offset);
      slot.address = places[pool] + offset;
    }
    require(new Set(items.map((slot) => slot.name)).size === items.length, `a name in ${what}`, "twice there");
    return items;
  };
  const disjoint = (items, what) => {
    const sorted = [...items].sort((a, b) => a.address - b.address);
    sorted.reduce((a, b) => (require(a.address + a.bytes <= b.address, `${what}: ${a.name}`, `over ${b.name}`), b), { address: 0, bytes: 0 });
  };
  disjoint(slots(m.parameters, "parameters"), "parameters");
  for (const [name, f] of Object.entries(m.functions)) {
    disjoint([...m.parameters, ...slots(object(f, name).inputs, `${name}.inputs`)], `${name}.inputs`);
    slots(f.outputs, `${name}.outputs`);
  }
  m.vocabulary = m.functions.logits?.outputs[0]?.shape.at(-1) ?? integer(m.config?.vocab_size, "config.vocab_size", 1, 2 ** 31);
  for (const key of m.functions.train_step ? ["beta1", "beta2"] : []) {
    require(m.training[key] >= 0 && m.training[key] < 1, `training.${key}`, m.training[key]);
  }
  return m;
}

function pagesFor(target, threads) {
  return Math.ceil((target.scratch + threads * target.scratch_stride) / PAGE);
}

/** JSON whose integers beyond 2^53 become BigInts (seeds). */
function parseJson(text, what) {
  const exact = (_, value, context) => (value > 2 ** 53 && /^\d+$/.test(context?.source) ? BigInt(context.source) : value);
  try {
    return JSON.parse(text, exact);
  } catch (error) {
    throw new UserError(`${what} is not valid JSON: ${error.message}`, AGAIN);
  }
}

// ---- engine

/** A module on its memory, and the workers that share it. */
class Engine {
  queued = false; // the inputs of a run lie where those of the last one are read

  static places({ pools, functions, target }, { require, integer, object, list }) {
    require(target.address_bits in MAX_PAGES, "target.address_bits", target.address_bits);
    const limit = MAX_PAGES[target.address_bits] * PAGE;
    const places = Object.entries(object(target.pools, "target.pools"));
    for (const [name, at] of places) integer(at, `target.pools.${name}`, 0, limit);
    require(places.length === Object.keys(pools).length, "target.pools", target.pools);
    let end = 0;
    for (const [name, at] of places.sort((a, b) => a[1] - b[1])) {
      require(at >= end && at % 8 === 0 && Object.hasOwn(pools, name), `target.pools.${name}`, at);
      end = at + integer(pools[name], `pools.${name}`, 0, limit);
    }
    integer(target.scratch, "target.scratch", end, limit);
    integer(target.scratch_stride, "target.scratch_stride", 0, limit);
    integer(target.max_threads, "target.max_threads", 1, MAX_THREADS);
    require(pagesFor(target, target.max_threads) * PAGE <= limit, "target.scratch_stride", target.scratch_stride);
    require(typeof target.shared === "boolean", "target.shared", target.shared);
    for (const name in functions) require(list(target.entries, "target.entries").includes(name), `the entry of ${name}`);
    return target.pools;
  }

  static async start(manifest, file, wanted, blocking) {
    const { target } = manifest;
    let bytes = await file(target.module);
    const cores = globalThis.navigator?.hardwareConcurrency ?? 1;
    let threads = wanted ?? Math.min(cores, target.max_threads);
    if (!Number.isSafeInteger(threads) || threads < 1 || threads > target.max_threads) {
      throw new UserError(`threads is ${threads}; this bundle runs 1 to ${target.max_threads}`, "leave it out for all cores");
    }
    let shared = target.shared;
    if (shared && !node && !globalThis.crossOriginIsolated) {
      if (threads > 1) console.warn(`tinygpt: this page is not cross-origin isolated: one thread instead of ${threads}`);
      [threads, shared, bytes] = [1, false, unshared(bytes)];
    }
    const engine = new Engine(manifest, threads);
    try {
      engine.module = await WebAssembly.compile(bytes);
      engine.memory = allocate(pagesFor(target, threads), target.address_bits, shared);
      engine.words = new Int32Array(engine.memory.buffer, 0, 256);
      engine.serving = shared && !blocking; // every thread is a worker, and this one only posts
      if (!engine.serving) engine.exports = (await WebAssembly.instantiate(engine.module, { env: { memory: engine.memory } })).exports;
      const starting = [];
      for (let thread = engine.serving ? 0 : 1; thread < threads; thread++) starting.push(engine.#spawn(thread));
      await Promise.race([Promise.all(starting), engine.failed]);
    } catch (error) {
      engine.close();
      const hint = error instanceof RangeError ? "it needs more memory than there is" : "use Node 22 or a current browser";
      throw new UserError(`bundle ${manifest.name} (${target.profile}) cannot run here: ${error.message}`, hint);
    }
    return engine;
  }

  constructor(manifest, threads) {
    Object.assign(this, { manifest, threads, where: `${threads} threads`, workers: [] });
    this.failed = new Promise((_, reject) => (this.reject = reject));
    this.failed.catch(() => {});
  }

  #spawn(thread) {
    const { module, memory, threads } = this, data = { [WORKER]: true, module, memory, thread, threads };
    return new Promise((resolve) => {
      const failed = (why) => this.reject(new Error(`a worker failed: ${why}`));
      const heard = (message) => {
        if (message.error) return failed(message.error);
        if (!this.serving) worker.unref?.(); // Node need not stay for it
        resolve();
      };
      let worker;
      if (node) {
        worker = new workers.Worker(new URL(import.meta.url), { workerData: data });
        worker.on("message", heard);
        worker.on("error", (error) => failed(error.message));
      } else {
        worker = new Worker(import.meta.url, { type: "module", name: WORKER });
        worker.onmessage = (event) => heard(event.data);
        worker.onerror = (event) => failed(event.message);
        worker.postMessage(data);
      }
      this.workers.push(worker);
    });
  }

  /** Copy bytes into a slot, from its byte `at` on. */
  write(slot, bytes, at = 0) {
    new Uint8Array(this.memory.buffer, slot.address + at, bytes.length).set(bytes);
  }

  /** A copy of bytes of a slot. */
  read(slot, at = 0, length = slot.bytes) {
    return new Uint8Array(this.memory.buffer, slot.address + at, length).slice();
  }

  /** Run a function to its end on inputs [slot, bytes]; copies of the slots of `results`, in bytes. */
  async run(name, results, inputs = []) {
    if (!this.memory) throw new Error("the session is closed");
    for (const [slot, bytes] of inputs) this.write(slot, bytes);
    const entry = this.manifest.target.entries.indexOf(name);
    try {
      if (this.serving) await this.#post(entry);
      else if (this.threads === 1) this.exports.run(entry, 0, 1);
      else this.exports.step(entry, this.threads);
    } catch (error) {
      if (this.threads > 1) this.exports?.fail();
      this.close();
      throw new Error(`${name} failed: ${error.message}`, { cause: error });
    }
    return results.map((slot) => this.read(slot));
  }

  /** Let workers run an entry, and wait without blocking. */
  async #post(entry) {
    const { words } = this;
    const finished = Atomics.load(words, FINISHED);
    Atomics.store(words, ENTRY, entry);
    Atomics.add(words, POSTED, 1);
    Atomics.notify(words, POSTED);
    while (Atomics.load(words, FINISHED) === finished) {
      const waiting = Atomics.waitAsync(words, FINISHED, finished, 1000);
      if (waiting.async) await Promise.race([waiting.value, this.failed]);
    }
  }

  close() {
    for (const worker of this.workers) worker.terminate();
    this.workers = [];
    this.memory = this.words = this.exports = null;
  }
}

function allocate(pages, bits, shared) {
  if (bits === 32) return new WebAssembly.Memory({ initial: pages, maximum: pages, shared });
  try {
    return new WebAssembly.Memory({ address: "i64", initial: BigInt(pages), maximum: BigInt(pages), shared });
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return new WebAssembly.Memory({ index: "i64", initial: pages, maximum: pages, shared }); // Node 22
  }
}

/** The module with its imported memory not shared. Atomic instructions work on any memory. */
function unshared(bytes) {
  const copy = Uint8Array.from(bytes);
  let at = 8;
  const number = () => {
    let value = 0, shift = 0;
    do value += (copy[at] & 127) * 2 ** (7 * shift++);
    while (copy[at++] & 128);
    return value;
  };
  const skip = () => {
    const size = number();
    at += size;
  };
  while (copy[at++] !== 2) skip(); // to the section of imports
  number(); // its size
  number(); // one import
  skip(); // its module
  skip(); // its name
  copy[at + 1] &= ~2; // a memory, its limits
  return copy;
}

/** A worker's life: serve what is posted. */
function serve({ module, memory, thread, threads }, tell) {
  const { exports } = new WebAssembly.Instance(module, { env: { memory } });
  tell({ ready: true });
  try {
    exports.serve(thread, threads);
  } catch (error) {
    exports.fail();
    tell({ error: error.message });
  }
}

const workers = node?.("worker_threads");
if (workers?.workerData?.[WORKER]) {
  serve(workers.workerData, (message) => workers.parentPort.postMessage(message));
} else if (!node && globalThis.name === WORKER && typeof window === "undefined") {
  globalThis.onmessage = (event) => serve(event.data, (message) => globalThis.postMessage(message));
}

// ---- session

/** Weights, optimizer and step count of one model. `step` counts optimizer steps, each once begun. */
export class Session {
  seed = 42;
  step = 0;
  data = null;
  #powers; // of the betas at the next step, behind AdamW's bias correction
  #files;

  constructor(manifest, engine, files) {
    Object.assign(this, { manifest, engine, training: { ...manifest.training } });
    this.#files = files;
  }

  /** Write the initial weights of `seed`, zero the moments, and start at step 0. */
  async init(seed = this.seed) {
    if (this.manifest.functions.init) await this.#run("init", { seed: seedWords(seed) });
    this.seed = seed;
    this.#setStep(0);
  }

  close() {
    this.engine.close();
  }

  /** Copies of the weights by name. */
  async parameters() {
    const found = {};
    for (const slot of this.manifest.parameters) if (slot.role === "param") found[slot.name] = await this.#read(slot);
    return found;
  }

  /**
   * One step of AdamW on a batch: the loss before the update, in nats per token, and the gradient's norm before clipping.
   * Throws DivergedError if either is not finite.
   */
  async trainStep(tokens, targets, lr = this.training.lr) {
    if (!(lr >= 0 && lr <= 1e30)) throw new UserError(`lr is ${lr}, not a finite number from 0`, "3e-4 is usual");
    const { beta1, beta2 } = this.training, [power1, power2] = this.#powers;
    const inputs = { ...this.#batch(tokens, targets), lr: [lr], bias1: [1 - power1], bias2: [1 - power2] };
    const running = this.#run("train_step", inputs, "loss", "grad_norm");
    const done = this.step++;
    this.#powers = [power1 * beta1, power2 * beta2];
    running.catch(() => done < this.step && this.#setStep(done));
    const [[loss], [gradNorm]] = await running;
    return { loss: this.#finite(loss, "the loss", done), gradNorm: this.#finite(gradNorm, "the gradient norm", done) };
  }

  /** Mean cross-entropy of a batch, nats per token. */
  async loss(tokens, targets) {
    const [[loss]] = await this.#run("loss", this.#batch(tokens, targets), "loss");
    return this.#finite(loss, "the loss");
  }

  /** Starts of the windows of the batch for `step`, each in [0, count): a function of (seed, step, count) alone. */
  async windows(step, count) {
    const inputs = { seed: seedWords(this.seed), step: [step], count: [count] };
    return (await this.#run("windows", inputs, "offsets"))[0];
  }

  /** Mean cross-entropy over every byte of `text` but the first, nats per byte, in windows that do not overlap. */
  async evaluate(text) {
    const { batch, context, vocabulary } = this.manifest;
    requireVocabulary(text, vocabulary, "the text to evaluate");
    const predictions = text.length - 1, size = batch * context;
    if (predictions < 1) throw new UserError("the text to evaluate has less than 2 bytes", "give a longer text");
    let total = 0;
    for (let first = 0; first < predictions; first += size) {
      const count = Math.min(size, predictions - first);
      const [rows] = await this.#run("loss", this.#batch(...gather(text, [first], count, size)), "row_losses");
      for (let i = 0; i < count; i++) total += rows[i];
    }
    return this.#finite(total, "the evaluation loss") / predictions;
  }

  /** Float32Array [n * vocabulary]: the scores of the token after each of `tokens`, 1 to context of them. */
  async logits(tokens) {
    const { context, vocabulary } = this.manifest;
    const padded = new Int32Array(context);
    padded.set(this.#tokens(tokens, Math.max(1, Math.min(tokens.length, context)), "tokens"));
    const [scores] = await this.#run("logits", { tokens: padded }, "logits");
    return scores.subarray(0, tokens.length * vocabulary);
  }

  /** `count` new bytes after `prompt` (text or bytes), as text. temperature <= 0 is greedy; topK = 0 and topP = 1 keep all. */
  async generate(prompt, count, options = {}) {
    return new TextDecoder().decode(Uint8Array.from(await Array.fromAsync(this.stream(prompt, count, options))));
  }

  /** The bytes of `generate`, one by one. The model sees the last `context` of what there is so far. */
  async *stream(prompt, count, { temperature = 0.8, topK = 40, topP = 1, seed = 42 } = {}) {
    const { context, vocabulary } = this.manifest;
    if (!Number.isFinite(temperature) || !(topK >= 0) || !(topP > 0 && topP <= 1) || !(count >= 0)) {
      throw new UserError("generate wants a finite temperature, topK >= 0, 0 < topP <= 1 and a number of bytes");
    }
    const given = typeof prompt === "string" ? utf8(prompt) : Uint8Array.from(prompt);
    requireVocabulary(given, vocabulary, "the prompt");
    const key = purposeKey(seed, SAMPLING);
    const sequence = given.length ? [...given] : [10];
    for (let position = given.length; position < given.length + count; position++) {
      const window = sequence.slice(-context);
      const scores = (await this.logits(window)).subarray((window.length - 1) * vocabulary);
      const next = sample(scores.subarray(0, Math.min(256, vocabulary)), { temperature, topK, topP }, uniform(key, position));
      sequence.push(next);
      yield next;
    }
  }

  /** Run every function that has golden vectors and compare: [{ function, name, difference, tolerance, passed }]. */
  async selfTest() {
    const file = await checkedFile(this.#files, this.manifest, "golden.safetensors");
    const golden = new Map((await tensorsOf(await blobOf(file), "golden.safetensors")).tensors.map((t) => [t.name, t]));
    const arrayOf = (key, slot) => {
      const t = golden.get(key);
      if (!fits(t, slot)) throw new UserError(`golden.safetensors does not fit the manifest: ${key}`, AGAIN);
      return new ARRAYS[slot.dtype](file.slice(t.begin, t.end).buffer);
    };
    const checks = [];
    for (const [name, f] of Object.entries(this.manifest.functions)) {
      const prefix = `${name}/out/`;
      const outputs = [...golden.keys()].filter((key) => key.startsWith(prefix));
      if (!outputs.length) continue;
      for (const slot of this.manifest.parameters) {
        const key = `param/${slot.name}`;
        await this.engine.write(slot, this.#bytes(slot, golden.has(key) ? arrayOf(key, slot) : slot.count));
      }
      const inputs = f.inputs.map((slot) => [slot.name, arrayOf(`${name}/in/${slot.name}`, slot)]);
      await this.#run(name, Object.fromEntries(inputs));
      for (const key of outputs) {
        const output = key.slice(prefix.length);
        const slot = [...f.outputs, ...this.manifest.parameters].find(({ name }) => name === output);
        const difference = furthest(await this.#read(slot), arrayOf(key, slot));
        const tolerance = this.manifest.golden?.[name]?.[output] ?? 0;
        checks.push({ function: name, name: output, difference, tolerance, passed: difference <= tolerance });
      }
    }
    await this.init();
    return checks;
  }

  // Checkpoints: safetensors, the arrays under their parameters' names, a SHA-256 over all of it in the metadata.

  /** The bytes of a checkpoint, in chunks of at most 16 MiB: write them to a file one after the other. */
  async *checkpoint() {
    const { data, step, training, manifest } = this, { batch, context, config = null } = manifest;
    const settings = JSON.stringify({ batch, config, context, data, seed: JSON.rawJSON(this.seed), step, training });
    const slots = byName(manifest.parameters);
    const hash = newHash().update(utf8(settings));
    for (const slot of slots) {
      hash.update(hashedName(slot));
      for await (const chunk of this.chunks(slot)) hash.update(chunk);
    }
    const header = { __metadata__: { format: "tinygpt-checkpoint", version: "1", settings, sha256: hash.digest("hex") } };
    let end = 0;
    for (const slot of slots) {
      header[slot.name] = { dtype: slot.dtype.toUpperCase(), shape: slot.shape, data_offsets: [end, (end += slot.bytes)] };
    }
    const text = utf8(JSON.stringify(header));
    const first = new Uint8Array(8 + Math.ceil(text.length / 8) * 8).fill(32);
    new DataView(first.buffer).setBigUint64(0, BigInt(first.length - 8), true);
    first.set(text, 8);
    yield first;
    for (const slot of slots) yield* this.chunks(slot);
  }

  /** The bytes of a slot. */
  async *chunks(slot) {
    for (let at = 0; at < slot.bytes; at += CHUNK) yield await this.engine.read(slot, at, Math.min(CHUNK, slot.bytes - at));
  }

  /**
   * Continue from a checkpoint of this model, of whatever target: weights, moments, step, seed and learning rate.
   * source: a path (Node), a Blob or bytes. Throws UserError, and changes nothing, if it is damaged or of another model.
   */
  async load(source) {
    const blob = await blobOf(source);
    const { tensors, metadata } = await tensorsOf(blob, "the checkpoint");
    const settings = await this.#require(blob, tensors, metadata);
    for (const t of tensors) await readChunks(blob, t, (chunk, at) => this.engine.write(t.slot, chunk, at));
    this.seed = settings.seed;
    this.training = { ...this.manifest.training, lr: settings.training.lr ?? this.manifest.training.lr };
    this.data = settings.data ?? null;
    this.#setStep(settings.step);
  }

  /** The settings of a checkpoint that fits the model. */
  async #require(blob, tensors, metadata) {
    const require = (fine, problem) => {
      if (!fine) throw new UserError(`the checkpoint ${problem}`, "use another checkpoint, or the model it was trained with");
    };
    require(metadata.format === "tinygpt-checkpoint" && metadata.version === "1", "is none of this runtime's format");
    const slots = new Map(this.manifest.parameters.map((slot) => [slot.name, slot]));
    for (const t of tensors) {
      t.slot = slots.get(t.name);
      require(fits(t, t.slot), `belongs to another model: ${t.name} is ${t.dtype} [${t.shape}] there`);
    }
    require(tensors.length === slots.size, "belongs to another model: it lacks arrays");
    const hash = newHash().update(utf8(metadata.settings ?? ""));
    for (const t of byName(tensors)) {
      hash.update(hashedName(t));
      await readChunks(blob, t, (chunk) => hash.update(chunk));
    }
    require(hash.digest("hex") === metadata.sha256, "was damaged or edited: its content does not match its sha256");
    const settings = parseJson(metadata.settings, "the checkpoint's settings");
    require(Number.isSafeInteger(settings.step) && settings.step >= 0 && typeof settings.training === "object", "has malformed settings");
    seedWords(settings.seed);
    return settings;
  }

  // Between numbers and slots

  #bytes(slot, numbers) {
    return new Uint8Array(new ARRAYS[slot.dtype](numbers).buffer);
  }

  async #read(slot) {
    return new ARRAYS[slot.dtype]((await this.engine.read(slot)).buffer);
  }

  /** Begin a function, unless this throws; then the arrays of the named outputs. */
  #run(name, inputs, ...outputs) {
    const f = this.manifest.functions[name];
    const slots = outputs.map((output) => f?.outputs.find((slot) => slot.name === output));
    if (!f || slots.includes(undefined)) throw new UserError(`the bundle has no function ${name} with ${outputs}`, AGAIN);
    const given = f.inputs.map((slot) => {
      if (inputs[slot.name]?.length === slot.count) return [slot, this.#bytes(slot, inputs[slot.name])];
      throw new UserError(`${name}: input ${slot.name} wants ${slot.count} numbers`, AGAIN);
    });
    const arrays = (found) => found.map((bytes, i) => new ARRAYS[slots[i].dtype](bytes.buffer));
    return this.engine.run(name, slots, given).then(arrays);
  }

  /** Inputs for a batch, with the key of the step's masks. */
  #batch(tokens, targets) {
    const { batch, context } = this.manifest, size = batch * context;
    const key = threefry(purposeKey(this.seed, DROPOUT), this.step, 0);
    return { tokens: this.#tokens(tokens, size, "tokens"), targets: this.#tokens(targets, size, "targets"), key };
  }

  #tokens(tokens, size, what) {
    if (tokens.length !== size) {
      throw new UserError(`${what} are ${tokens.length} ids, not ${size}`, "compile with --batch and --context as wanted");
    }
    const strange = tokens.find((id) => !Number.isInteger(id) || id < 0 || id >= this.manifest.vocabulary);
    if (strange === undefined) return tokens;
    throw new UserError(`${what} have id ${strange}, the vocabulary has ${this.manifest.vocabulary}`, "encode the text as in training");
  }

  #finite(value, what, step = this.step) {
    if (Number.isFinite(value)) return value;
    throw new DivergedError(`${what} became ${value} after ${step} steps`, "load an earlier checkpoint and lower lr");
  }

  /** Powers by repeated multiplication, as a run from the start has them. */
  #setStep(step) {
    this.step = step;
    this.#powers = [power(this.training.beta1, step + 1), power(this.training.beta2, step + 1)];
  }
}

/** A power of a beta; what no longer shrinks stays as it is. */
function power(base, exponent) {
  let value = 1;
  for (let i = 0; i < exponent && value * base < value; i++) value *= base;
  return value;
}

/** The largest difference of two arrays, infinite where one alone is a number. */
function furthest(found, wanted) {
  const apart = (x, i) => (Object.is(x, wanted[i]) ? 0 : Math.abs(x - wanted[i]));
  return found.reduce((most, x, i) => Math.max(most, Number.isNaN(apart(x, i)) ? Infinity : apart(x, i)), 0);
}

// ---- training

/** The first 90 % of a corpus to train on, the rest to validate. */
export function split(corpus) {
  const cut = Math.floor((corpus.length * 9) / 10);
  return { train: corpus.subarray(0, cut), validation: corpus.subarray(cut) };
}

/**
 * Train on a corpus of bytes until `steps` optimizer steps are done in all. onRow gets { step, loss, grad_norm, tokens_per_s }
 * for each step and { step, train_loss, val_loss } for each evaluation; save (an async function) is called every saveEvery
 * steps and at the end, with weights that are finite; `stop()` returning true ends the run between two steps.
 * Where the engine queues runs, a step is reported when the next is begun: the device need not wait.
 */
export async function train(session, corpus, options) {
  const { steps, lr, evalEvery = 0, saveEvery = 100, onRow = () => {}, save = null, stop = () => false } = options;
  const { context, batch, vocabulary } = session.manifest, { queued } = session.engine;
  const needed = Math.max(Math.ceil((10 * (context + 1)) / 9), 11);
  if (corpus.length < needed) throw new UserError(`the corpus has ${corpus.length} bytes, at least ${needed} are needed`);
  if (session.step > steps) throw new UserError(`${session.step} steps are done already, steps counts all: ${steps}`);
  requireVocabulary(corpus, vocabulary, "the corpus");
  if (lr !== undefined) session.training.lr = lr;
  const { train, validation } = split(corpus);
  const count = train.length - context;
  const drawn = async (step) => gather(train, await session.windows(step, count), context);
  const evaluate = async () => {
    const train_loss = await session.evaluate(train.subarray(0, validation.length));
    onRow({ step: session.step, train_loss, val_loss: await session.evaluate(validation) });
  };
  const saved = async () => {
    await session.loss(...(await drawn(session.step))); // throws if the last update ruined the weights
    for (const slot of session.manifest.parameters) {
      for await (const { buffer } of session.chunks(slot)) {
        if (new ARRAYS[slot.dtype](buffer).every(Number.isFinite)) continue;
        throw new DivergedError(`${slot.name} holds numbers that are not finite after ${session.step} steps`, "lower lr");
      }
    }
    await save();
  };
  let next, rows, told = 0; // promises of the next batch and of all rows so far; when the last was told
  const begun = (promise) => (promise.catch(() => {}), promise); // nobody waits for it once another has failed
  const report = async (before, step, done, began) => {
    await before;
    const { loss, gradNorm } = await done;
    const now = performance.now();
    const speed = (batch * context * 1000) / Math.max(now - Math.max(began, told), 1e-3);
    told = now;
    onRow({ step, loss, grad_norm: gradNorm, tokens_per_s: Math.round(speed * 10) / 10 });
  };
  if (evalEvery && !session.step) await evaluate();
  while (session.step < steps && !stop()) {
    const began = performance.now(), before = rows;
    const windows = await (next ?? drawn(session.step));
    const step = session.step + 1;
    next = queued && step < steps ? begun(drawn(step)) : null;
    rows = begun(report(before, step, begun(session.trainStep(...windows)), began));
    const evaluating = evalEvery && (step % evalEvery === 0 || step === steps);
    const saving = save && step % saveEvery === 0 && step < steps;
    await (queued && !evaluating && !saving ? before : rows);
    if (evaluating) await evaluate();
    if (saving) await saved();
  }
  await rows;
  if (save) await saved();
}

/** Tokens and targets of the windows that start at `offsets`, behind them zeros up to `size`. Targets are shifted by one. */
export function gather(data, offsets, context, size = offsets.length * context) {
  const tokens = new Int32Array(size), targets = new Int32Array(size);
  offsets.forEach((offset, row) => {
    tokens.set(data.subarray(offset, offset + context), row * context);
    targets.set(data.subarray(offset + 1, offset + context + 1), row * context);
  });
  return [tokens, targets];
}

function requireVocabulary(bytes, vocabulary, what) {
  const at = vocabulary < 256 ? bytes.findIndex((byte) => byte >= vocabulary) : -1;
  if (at >= 0) throw new UserError(`${what} has byte ${bytes[at]} at ${at}, the vocabulary has ${vocabulary} ids`, "use another text");
}

// ---- random numbers

// Threefry-2x32, 20 rounds (Salmon et al., SC 2011): draws follow from (key, counter).
const ROTATIONS = [13, 15, 26, 6, 17, 29, 16, 24];
const DROPOUT = 1, SAMPLING = 2; // what a seed serves for, each under a key of its own

function threefry([k0, k1], x0, x1) {
  const keys = [k0, k1, (k0 ^ k1 ^ 0x1bd11bda) >>> 0];
  x0 = (x0 + k0) >>> 0;
  x1 = (x1 + k1) >>> 0;
  for (let round = 0; round < 20; round++) {
    const r = ROTATIONS[round % 8];
    x0 = (x0 + x1) >>> 0;
    x1 = (((x1 << r) | (x1 >>> (32 - r))) ^ x0) >>> 0;
    if (round % 4 === 3) {
      const n = (round + 1) / 4;
      x0 = (x0 + keys[n % 3]) >>> 0;
      x1 = (x1 + keys[(n + 1) % 3] + n) >>> 0;
    }
  }
  return [x0, x1];
}

/** A seed of 64 bits (a number or a BigInt) as the words [low, high]. */
function seedWords(seed) {
  const valid = typeof seed === "bigint" || Number.isSafeInteger(seed);
  const value = valid ? BigInt(seed) : -1n;
  if (value < 0n || value >= 1n << 64n) throw new UserError(`seed ${seed} is no integer from 0 to 2^64 - 1`, "42 is one");
  return [Number(value & 0xffffffffn), Number(value >> 32n)];
}

function purposeKey(seed, purpose) {
  return threefry(seedWords(seed), purpose, 0xffffffff);
}

function uniform(key, counter) {
  const [high, low] = threefry(key, counter >>> 0, Math.floor(counter / 2 ** 32));
  return (high * 2 ** 21 + (low >>> 11)) * 2 ** -53;
}

/** The token that a draw in [0, 1) picks: temperature, then topK, then topP; of equal scores the lower id first. */
function sample(scores, { temperature, topK, topP }, draw) {
  const peak = scores.reduce((a, b) => (a > b || Number.isNaN(a) ? a : b));
  if (!Number.isFinite(peak)) throw new DivergedError("the logits are not finite numbers", "use an earlier checkpoint");
  if (temperature <= 0) return scores.indexOf(peak);
  const weights = Float64Array.from(scores, (score) => Math.exp((score - peak) / temperature));
  const order = [...weights.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
  const total = () => weights.reduce((a, b) => a + b);
  if (topK) for (const id of order.splice(topK)) weights[id] = 0;
  if (topP < 1) {
    let kept = 0;
    for (let sum = 0, enough = topP * total(); kept < order.length && sum < enough; kept++) sum += weights[order[kept]];
    for (const id of order.slice(kept)) weights[id] = 0;
  }
  const threshold = draw * total();
  let sum = 0, last = 0;
  for (let id = 0; id < weights.length && sum <= threshold; id++) {
    if (weights[id]) last = id;
    sum += weights[id];
  }
  return last;
}

// ---- files and hashes

function utf8(text) {
  return new TextEncoder().encode(text);
}

function fits(tensor, slot) {
  return tensor?.dtype === slot?.dtype && String(tensor.shape) === String(slot.shape);
}

function byName(items) {
  return [...items].sort((a, b) => (a.name < b.name ? -1 : 1));
}

/** What a checkpoint's hash has before an array, as Python writes it. */
function hashedName({ name, dtype, shape }) {
  return utf8(`\0${name}|${NUMPY[dtype]}|(${shape.join(", ")}${shape.length === 1 ? "," : ""})\0`);
}

async function blobOf(source) {
  if (source instanceof Uint8Array) return new Blob([source]);
  if (source instanceof Blob) return source;
  if (!node) throw new UserError("a checkpoint is a Blob, a File or bytes here", "read it from an <input type=file>");
  try {
    const { size } = node("fs").statSync(source);
    partOf(source, 0, 1);
    return { size, slice: (begin, end) => ({ arrayBuffer: () => partOf(source, begin, Math.min(end, size)) }) };
  } catch {
    throw new UserError(`checkpoint ${source} cannot be read`, "give the file that a run saved");
  }
}

/** A part of a file. Node's openAsBlob counts bytes in 32 bits. */
function partOf(path, begin, end) {
  const fs = node("fs"), file = fs.openSync(path), bytes = new Uint8Array(end - begin);
  let at = 0;
  try {
    for (let n = 1; n; at += n) n = fs.readSync(file, bytes, at, bytes.length - at, begin + at);
  } finally {
    fs.closeSync(file);
  }
  if (at < bytes.length) throw new UserError(`${path} is now shorter`, "use another checkpoint");
  return bytes.buffer;
}

async function bytesOf(blob, begin, length) {
  return new Uint8Array(await blob.slice(begin, begin + length).arrayBuffer());
}

async function readChunks(blob, { begin, end }, use) {
  for (let at = begin; at < end; at += CHUNK) await use(await bytesOf(blob, at, Math.min(CHUNK, end - at)), at - begin);
}

/** A safetensors file's tensors, with where they lie, and its metadata. */
async function tensorsOf(blob, what) {
  const refuse = (problem) => new UserError(`${what}: ${problem}`, "use another file");
  const start = await bytesOf(blob, 0, 8);
  const length = start.length < 8 ? Infinity : Number(new DataView(start.buffer).getBigUint64(0, true));
  if (length > Math.min(blob.size - 8, 100e6)) throw refuse("is truncated or no safetensors file");
  const header = parseJson(new TextDecoder().decode(await bytesOf(blob, 8, length)), what);
  const tensors = [];
  for (const [name, entry] of Object.entries(header ?? {})) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: offsets } = entry ?? {};
    const kind = Object.keys(ARRAYS).find((key) => key.toUpperCase() === dtype);
    const [begin, end] = Array.isArray(offsets) ? offsets : [];
    if (!kind || !Array.isArray(shape) || !(begin >= 0) || !Number.isSafeInteger(end)) throw refuse(`${name} is malformed`);
    const bytes = shape.reduce((a, b) => a * b, 1) * ARRAYS[kind].BYTES_PER_ELEMENT;
    if (end - begin !== bytes || 8 + length + end > blob.size) throw refuse(`${name} is truncated`);
    tensors.push({ name, dtype: kind, shape, begin: 8 + length + begin, end: 8 + length + end });
  }
  return { tensors, metadata: header?.__metadata__ ?? {} };
}

/** The SHA-256 of bytes, in hex. */
export function sha256(bytes) {
  return newHash().update(bytes).digest("hex");
}

function newHash() {
  return node ? node("crypto").createHash("sha256") : new Sha256();
}

/** SHA-256 over pieces (FIPS 180-4), as Node has it. Browsers hash whole buffers only. */
class Sha256 {
  static #rounds = Sha256.#fractions(Math.cbrt);
  #state = Sha256.#fractions(Math.sqrt).subarray(0, 8);
  #block = new Uint8Array(64);
  #words = new Int32Array(64);
  #length = 0;

  /** The first 32 fractional bits of the roots of the first 64 primes. */
  static #fractions(root) {
    const primes = [];
    for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
    return Int32Array.from(primes, (p) => ((root(p) % 1) * 2 ** 32) | 0);
  }

  update(bytes) {
    for (let at = 0, taken; at < bytes.length; at += taken) {
      const filled = this.#length % 64;
      taken = Math.min(64 - filled, bytes.length - at);
      this.#block.set(bytes.subarray(at, at + taken), filled);
      this.#length += taken;
      if (filled + taken === 64) this.#compress();
    }
    return this;
  }

  /** In hex. */
  digest() {
    const bits = BigInt(this.#length) * 8n;
    const padding = new Uint8Array(((119 - (this.#length % 64)) % 64) + 9);
    padding[0] = 128;
    new DataView(padding.buffer).setBigUint64(padding.length - 8, bits);
    this.update(padding);
    return [...this.#state].map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }

  #compress() {
    const w = this.#words, k = Sha256.#rounds, view = new DataView(this.#block.buffer);
    const rotate = (x, n) => (x >>> n) | (x << (32 - n));
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(i * 4);
    for (let i = 16; i < 64; i++) {
      const a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ (a >>> 3)) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ (b >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = this.#state;
    for (let i = 0; i < 64; i++) {
      const t1 = (h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i]) | 0;
      const t2 = ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, i) => (this.#state[i] += word));
  }
}
