// Runs bundles compiled to WGSL on this browser's GPU, for tinygpt.mjs: one buffer a pool, and for each run of a function
// one command encoder, one compute pass, one submit.
//
// Pipelines and bind groups are made when a function runs for the first time; each launch is then validated alone, so that
// what the browser refuses has its kernel's name. Launches of a pass see each other's writes in order. Results are copied
// behind the pass in the same submit and mapped when the device is done, while this thread is free.
//
// What is called reaches the device in the order of the calls: inputs, commands and copies of a run go to the queue in one
// turn of this thread. So the next run may be begun while the device is busy with the last; it only has to wait for its turn
// while a function that was called before it is made ready.

import { UserError } from "./tinygpt.mjs";

const AGAIN = "compile the bundle again: tinygpt compile CONFIG --target wgsl --out DIR";
const RESTART = "start again from the last checkpoint; if that fails too, with a smaller --batch";
const ANOTHER = "take a browser with WebGPU and a graphics driver, or compile for wasm32";
const EVERYWHERE = "compile for the profile webgpu-default, and with dtype f32"; // what every device has
const LARGEST = 2 ** 40; // bytes of a pool
const WORD = 4; // bytes; what is copied is a multiple of it
const VECTOR = 16; // bytes; a binding holds whole vectors
const KEPT = 2 ** 20; // bytes; a larger staging buffer is given back at once
const SMALLEST_SUBGROUP = 4; // lanes, by the specification
const ACCESS = ["in", "out", "inout"];

// Directives that browsers want for a feature and wgpu refuses, so that shaders are written without.
const DIRECTIVES = { subgroups: "enable subgroups; " };

/** A device with a bundle's pools in its memory. */
export class GpuEngine {
  /** Validates manifest.target and says at what address each pool begins: here they lie one after the other. */
  static places({ pools, functions, files, target }, { require, integer, object, list }) {
    const places = {};
    let end = 0;
    for (const [name, size] of Object.entries(pools)) {
      places[name] = end;
      end += integer(size, `pools.${name}`, 0, LARGEST);
      require(size % WORD === 0, `pools.${name}`, size);
    }
    integer(target.subgroup, "target.subgroup", 0, LARGEST);
    for (const feature of list(target.features, "target.features")) require(typeof feature === "string", "a feature", feature);
    for (const [name, n] of Object.entries(object(target.limits, "target.limits"))) integer(n, `target.limits.${name}`, 1, Number.MAX_SAFE_INTEGER);
    const { kernels } = target;
    for (const [name, kernel] of Object.entries(object(kernels, "target.kernels"))) {
      const { file, access } = object(kernel, `target.kernels.${name}`);
      require(typeof file === "string" && Object.hasOwn(files, file), `target.kernels.${name}.file`, file);
      require(list(access, `target.kernels.${name}.access`).every((a) => ACCESS.includes(a)), `target.kernels.${name}.access`, access);
    }
    for (const name of Object.keys(functions)) {
      const what = `target.functions.${name}`;
      for (const launch of list(object(target.functions, "target.functions")[name], what)) {
        const { kernel, workgroups, bindings } = object(launch, what);
        require(Object.hasOwn(kernels, kernel), `a kernel of ${what}`, kernel);
        require(list(workgroups, what).length === 3, `${what}: workgroups of ${kernel}`, workgroups);
        for (const n of workgroups) integer(n, `${what}: workgroups of ${kernel}`, 1, target.limits["max-compute-workgroups-per-dimension"] ?? 65535);
        require(list(bindings, what).length === kernels[kernel].access.length, `${what}: bindings of ${kernel}`, bindings);
        for (const binding of bindings) {
          const [pool, offset, size] = list(binding, `${what}: a binding of ${kernel}`);
          require(Object.hasOwn(pools, pool), `${what}: a pool of ${kernel}`, pool);
          integer(offset, `${what}: an offset of ${kernel}`, 0, pools[pool]);
          integer(size, `${what}: a size of ${kernel}`, VECTOR, pools[pool] - offset);
          require(size % VECTOR === 0, `${what}: a size of ${kernel}`, size);
        }
      }
    }
    return places;
  }

  /** `file` gives a file of the bundle by its name, checked against the manifest. Throws UserError if no device has what the
   * bundle needs. */
  static async start(manifest, file) {
    const { target } = manifest;
    const refuse = (problem, hint = ANOTHER) => new UserError(`bundle ${manifest.name} (${target.profile}) cannot run here: ${problem}`, hint);
    const slots = [manifest.parameters, ...Object.values(manifest.functions).flatMap((f) => [f.inputs, f.outputs])].flat();
    const odd = slots.find((slot) => slot.bytes % WORD);
    if (odd) throw refuse(`${odd.name} is ${odd.dtype}, which a GPU does not copy`, AGAIN);
    const adapter = await globalThis.navigator?.gpu?.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) throw refuse("there is no WebGPU");
    const limits = Object.fromEntries(Object.entries(target.limits).map(([name, n]) => [camel(name), n]));
    const missing = target.features.filter((name) => !adapter.features.has(name)).map((name) => `feature ${name}`);
    for (const [name, n] of Object.entries(limits)) {
      if (!(adapter.limits[name] >= n)) missing.push(`${name} ${n} (it has ${adapter.limits[name]})`);
    }
    const lanes = adapter.info?.subgroupMinSize ?? SMALLEST_SUBGROUP;
    if (!(lanes >= target.subgroup)) missing.push(`subgroups of ${target.subgroup} lanes (it has some of ${lanes})`);
    if (missing.length) throw refuse(`${describe(adapter)} lacks ${missing.join(", ")}`, EVERYWHERE);
    let device;
    try {
      device = await adapter.requestDevice({ requiredFeatures: target.features, requiredLimits: limits });
    } catch (error) {
      throw refuse(`${describe(adapter)}: ${said(error)}`);
    }
    const engine = new GpuEngine(manifest, file, device, describe(adapter));
    try {
      await engine.#allocate();
    } catch (error) {
      engine.close();
      throw error;
    }
    return engine;
  }

  queued = true; // runs keep their order and their inputs, however many are begun

  #file;
  #pools = {};
  #pipelines = new Map(); // by kernel: promises
  #ready = new Map(); // by function: its launches
  #held = null; // while a function is made ready: a promise that all who wait for their turn have had it
  #staging = []; // buffers that are free to map
  #failure = null; // what went wrong since the last run

  constructor(manifest, file, device, where) {
    this.manifest = manifest;
    this.device = device;
    this.threads = 1;
    this.where = where;
    this.#file = file;
    device.lost.then(({ message }) => this.#fail(`the GPU was lost: ${message}`, RESTART));
    device.onuncapturederror = ({ error }) => this.#fail(said(error), RESTART);
  }

  /** Copy bytes into a slot, from its byte `at` on; a promise if that has to wait, until when they must stay as they are. */
  write(slot, bytes, at = 0) {
    return this.#inTurn(() => this.#write(slot, bytes, at));
  }

  /** A copy of bytes of a slot. */
  async read(slot, at = 0, length = slot.bytes) {
    const part = { ...slot, offset: slot.offset + at, bytes: length };
    const sent = await this.#inTurn(() => this.#submit(this.device.createCommandEncoder({ label: slot.name }), [part]));
    return (await this.#arrived(sent, slot.name))[0];
  }

  /** Run one function on inputs [slot, bytes]; copies of the slots of `results`, in bytes, when it is done. Without results it
   * is only begun. */
  async run(name, results, inputs = []) {
    const sent = await this.#inTurn(() => {
      for (const [slot, bytes] of inputs) this.#write(slot, bytes);
      const encoder = this.device.createCommandEncoder({ label: name });
      const pass = encoder.beginComputePass({ label: name });
      for (const launch of this.#ready.get(name)) dispatch(pass, launch);
      pass.end();
      return this.#submit(encoder, results);
    }, name);
    return this.#arrived(sent, name);
  }

  close() {
    this.#fail("the session is closed", "open the bundle again");
    for (const buffer of Object.values(this.#pools)) buffer.destroy();
    this.device.destroy();
  }

  #fail(problem, hint) {
    this.#failure ??= new UserError(`bundle ${this.manifest.name} on ${this.where}: ${problem}`, hint);
  }

  #alive() {
    if (this.#failure) throw this.#failure;
  }

  /** What `act` returns, which hands work to the device: it acts at once, or after what was called before it where that, or
   * the function `name` that it needs, is not ready. */
  #inTurn(act, name) {
    this.#alive();
    if (!this.#held && (!name || this.#ready.has(name))) return act();
    const turn = Promise.resolve(this.#held).then(async () => {
      if (name && !this.#ready.has(name)) this.#ready.set(name, await this.#prepare(name));
      this.#alive();
      return act();
    });
    const held = turn.catch(() => {}).then(() => {
      if (this.#held === held) this.#held = null;
    });
    this.#held = held;
    return turn;
  }

  async #allocate() {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    for (const [label, size] of Object.entries(this.manifest.pools)) {
      const make = () => (this.#pools[label] = this.device.createBuffer({ label, size: Math.max(size, VECTOR), usage }));
      await this.#checked(`pool ${label} of ${size} bytes cannot be had`, "compile with a smaller --batch or --context", make);
    }
  }

  /** What `act` returns; UserError with the device's words if it fails there. */
  async #checked(problem, hint, act) {
    const kinds = ["validation", "out-of-memory", "internal"];
    for (const kind of kinds) this.device.pushErrorScope(kind);
    let error, result;
    try {
      result = act();
    } catch (thrown) {
      error = thrown;
    }
    const found = await Promise.all(kinds.map(() => this.device.popErrorScope())).catch((thrown) => [thrown]);
    error ??= found.find(Boolean);
    if (error) throw new UserError(`bundle ${this.manifest.name}: ${problem}: ${said(error)}`, hint);
    this.#alive();
    return result;
  }

  /** The pipelines and bind groups of a function's launches. */
  #prepare(name) {
    return Promise.all(
      this.manifest.target.functions[name].map(async ({ kernel, workgroups, bindings }) => {
        const pipeline = await this.#pipeline(kernel);
        return this.#checked(`the device refuses kernel ${kernel} in ${name}`, AGAIN, () => {
          const resource = ([pool, offset, size]) => ({ buffer: this.#pools[pool], offset, size });
          const entries = bindings.map((binding, n) => ({ binding: n, resource: resource(binding) }));
          const group = this.device.createBindGroup({ label: kernel, layout: pipeline.getBindGroupLayout(0), entries });
          const encoder = this.device.createCommandEncoder({ label: kernel });
          const pass = encoder.beginComputePass({ label: kernel });
          dispatch(pass, { pipeline, group, workgroups });
          pass.end();
          encoder.finish();
          return { pipeline, group, workgroups };
        });
      }),
    );
  }

  #pipeline(kernel) {
    if (!this.#pipelines.has(kernel)) this.#pipelines.set(kernel, this.#compiled(kernel));
    return this.#pipelines.get(kernel);
  }

  /** Compile a kernel. Its bindings are what the manifest says, not what the shader says of itself. */
  async #compiled(kernel) {
    const { file, access } = this.manifest.target.kernels[kernel];
    const directives = this.manifest.target.features.map((name) => DIRECTIVES[name] ?? "").join("");
    const code = directives + new TextDecoder().decode(await this.#file(file));
    const refused = `the device refuses kernel ${kernel}`;
    const [module, layout] = await this.#checked(refused, AGAIN, () => {
      const kind = (a) => ({ type: a === "in" ? "read-only-storage" : "storage" });
      const entries = access.map((a, n) => ({ binding: n, visibility: GPUShaderStage.COMPUTE, buffer: kind(a) }));
      const groups = [this.device.createBindGroupLayout({ label: kernel, entries })];
      const layout = this.device.createPipelineLayout({ label: kernel, bindGroupLayouts: groups });
      return [this.device.createShaderModule({ label: kernel, code }), layout];
    });
    try {
      const compute = { module, entryPoint: "main" };
      return await this.device.createComputePipelineAsync({ label: kernel, layout, compute });
    } catch (error) {
      throw new UserError(`bundle ${this.manifest.name}: ${refused}: ${said(error)}`, AGAIN);
    }
  }

  #write(slot, bytes, at = 0) {
    this.device.queue.writeBuffer(this.#pools[slot.pool], slot.offset + at, bytes);
  }

  /** Submit an encoder with copies of slots behind what it holds. They are mapped from here: a device may take a mapping to
   * wait for all that was submitted before it is asked for. */
  #submit(encoder, slots) {
    const size = slots.reduce((sum, slot) => sum + slot.bytes, 0);
    const staging = size ? this.#stage(size) : null;
    let at = 0;
    for (const slot of slots) {
      encoder.copyBufferToBuffer(this.#pools[slot.pool], slot.offset, staging, at, slot.bytes);
      at += slot.bytes;
    }
    this.device.queue.submit([encoder.finish()]);
    return { slots, size, staging, mapping: staging?.mapAsync(GPUMapMode.READ, 0, size) };
  }

  /** The bytes of the slots of a submit, when the device is done with it. */
  async #arrived({ slots, size, staging, mapping }, what) {
    if (!staging) return [];
    try {
      await mapping;
    } catch (error) {
      this.#fail(`${what} failed: ${said(error)}`, RESTART);
    }
    this.#alive();
    const mapped = staging.getMappedRange(0, size);
    let at = 0;
    const found = slots.map(({ bytes }) => new Uint8Array(mapped.slice(at, (at += bytes))));
    staging.unmap();
    if (size > KEPT) staging.destroy();
    else this.#staging.push(staging);
    return found;
  }

  /** A buffer of at least `size` bytes to read through: a free one that is at most as large again, or a new one. */
  #stage(size) {
    const fits = this.#staging.findIndex((buffer) => buffer.size >= size && buffer.size <= 2 * size + 256);
    if (fits >= 0) return this.#staging.splice(fits, 1)[0];
    return this.device.createBuffer({ label: "staging", size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  }
}

function dispatch(pass, { pipeline, group, workgroups }) {
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, group);
  pass.dispatchWorkgroups(...workgroups);
}

/** A limit's name in this API: max-buffer-size is maxBufferSize. */
function camel(name) {
  return name.replace(/-([a-z])/g, (_, letter) => letter.toUpperCase());
}

/** An error's message in one paragraph. */
function said({ message }) {
  return message.trim().replace(/\s+/g, " ");
}

function describe({ info }) {
  return [info.vendor, info.architecture, info.device, info.description].filter(Boolean).join(" ") || "the GPU";
}
