// A WebGPU for Node, by which tests of the host see what it hands to a device and when. What is submitted is carried out
// later and in order, one submit whenever Node has nothing else to do; each kernel is a function below, named as the only
// launch of the function it stands for.

globalThis.GPUBufferUsage = { STORAGE: 1, COPY_SRC: 2, COPY_DST: 4, MAP_READ: 8 };
globalThis.GPUShaderStage = { COMPUTE: 1 };
globalThis.GPUMapMode = { READ: 1 };

// Every result depends on every input, and the weights on all steps before, so that no run may see what another one wrote.
const KERNELS = {
  init: ({ seed, weights }) => weights.forEach((_, i) => (weights[i] = Math.sin(seed[0] + i))),
  windows: ({ seed, step, count, offsets }) => {
    offsets.forEach((_, i) => (offsets[i] = (seed[0] * 7919 + step[0] * 104729 + i * 15485863) % count[0]));
  },
  train_step: ({ tokens, targets, lr, bias1, bias2, key, loss, grad_norm, weights }, gpu) => {
    const batch = tokens.reduce((sum, token, i) => sum + (i + 1) * token + (i + 2) ** 2 * targets[i], 0);
    grad_norm[0] = batch / 1e6 + bias1[0] + 3 * bias2[0] + (key[0] % 1000) / 1e3;
    loss[0] = weights[0] + grad_norm[0];
    weights[0] -= lr[0] * loss[0];
    if (gpu.steps++ === gpu.divergesAt) loss[0] = NaN; // and the next one finite: its row must not appear
  },
  loss: ({ tokens, targets, loss, row_losses, weights }) => {
    row_losses.forEach((_, i) => (row_losses[i] = weights[0] + tokens[i] + 2 * targets[i]));
    loss[0] = row_losses.reduce((a, b) => a + b);
  },
};
const ARRAYS = { f32: Float32Array, i32: Int32Array, u32: Uint32Array };

class Buffer {
  constructor(gpu, { label, size }) {
    Object.assign(this, { gpu, label, size, bytes: new Uint8Array(size) });
  }

  mapAsync() {
    return new Promise((resolve) => this.gpu.enqueue(resolve));
  }

  getMappedRange(begin, size) {
    return this.bytes.buffer.slice(begin, begin + size);
  }

  unmap() {}

  destroy() {}
}

/** What `navigator.gpu` is to be. `log` has "submit LABEL" when the host submits, "done LABEL" when the device has it behind it. */
export class FakeGpu {
  log = [];
  steps = 0;
  divergesAt = -1; // the run of train_step, from 0, whose loss is not finite
  refuses = null; // a kernel that does not compile
  features = new Set();
  limits = {};
  info = { description: "a fake" };
  lost = new Promise(() => {});
  pools = {};
  #queue = [];

  constructor({ parameters, functions }) {
    const weights = { ...parameters[0], name: "weights" };
    this.slots = (name) => [weights, ...functions[name].inputs, ...functions[name].outputs];
  }

  enqueue(work) {
    this.#queue.push(work);
    if (this.#queue.length === 1) setTimeout(() => this.#next());
  }

  #next() {
    this.#queue[0]();
    this.#queue.shift();
    if (this.#queue.length) setTimeout(() => this.#next());
  }

  #execute(name) {
    const view = ({ name, dtype, shape, pool, offset }) => {
      const count = shape.reduce((a, b) => a * b, 1);
      return [name, new ARRAYS[dtype](this.pools[pool].bytes.buffer, offset, count)];
    };
    KERNELS[name](Object.fromEntries(this.slots(name).map(view)), this);
  }

  requestAdapter = async () => this;
  requestDevice = async () => this;

  queue = {
    writeBuffer: (buffer, offset, bytes) => {
      const copy = bytes.slice();
      this.enqueue(() => buffer.bytes.set(copy, offset));
    },
    submit: ([{ label, work }]) => {
      this.log.push(`submit ${label}`);
      this.enqueue(() => {
        work.forEach((act) => act());
        this.log.push(`done ${label}`);
      });
    },
  };

  createBuffer(options) {
    const buffer = new Buffer(this, options);
    if (options.label !== "staging") this.pools[options.label] = buffer;
    return buffer;
  }

  createCommandEncoder({ label }) {
    const work = [];
    const pass = {
      setPipeline: ({ kernel }) => work.push(() => this.#execute(kernel)),
      setBindGroup: () => {},
      dispatchWorkgroups: () => {},
      end: () => {},
    };
    const copy = (from, begin, to, at, size) => work.push(() => to.bytes.set(from.bytes.subarray(begin, begin + size), at));
    return { beginComputePass: () => pass, copyBufferToBuffer: copy, finish: () => ({ label, work }) };
  }

  /** Takes as long as a few runs. */
  createComputePipelineAsync({ label }) {
    return new Promise((resolve, reject) => {
      const made = () => (label === this.refuses ? reject(new Error("no such instruction")) : resolve(new Pipeline(label)));
      setTimeout(made, 20);
    });
  }

  pushErrorScope() {}
  popErrorScope = async () => null;
  createBindGroup() {}
  createBindGroupLayout() {}
  createPipelineLayout() {}
  createShaderModule() {}
  destroy() {}
}

class Pipeline {
  constructor(kernel) {
    this.kernel = kernel;
  }

  getBindGroupLayout() {}
}
