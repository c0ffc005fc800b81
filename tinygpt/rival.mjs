// What a benchmark times in Node: a training step of a bundle, or one of its functions alone. Speaks like rivals.py, one
// JSON object a line: a spec with the bundle first, then { seconds } again and again, answered by { ms: [each step] }.
import path from "node:path";
import readline from "node:readline";
import { pathToFileURL } from "node:url";

const WARM_UP = 3;
const FEWEST_STEPS = 3;

async function built({ name, bundle, threads, config, batch, context, function: wanted }) {
  const { open } = await import(pathToFileURL(path.join(bundle, "host", "tinygpt.mjs")));
  const session = await open(bundle, { threads });
  if (name !== "function") {
    const random = () => Int32Array.from({ length: batch * context }, () => Math.floor(Math.random() * config.vocab_size));
    const [tokens, targets] = [random(), random()];
    return () => session.trainStep(tokens, targets);
  }
  for (const slot of session.manifest.functions[wanted].inputs) {
    await session.engine.write(slot, new Uint8Array(new Float32Array(slot.count).fill(0.5).buffer));
  }
  return () => session.engine.run(wanted, []); // its results stay where they are
}

async function timed(step, seconds) {
  const ms = [];
  for (const end = performance.now() + seconds * 1000; ms.length < FEWEST_STEPS || performance.now() < end; ) {
    const start = performance.now();
    await step();
    ms.push(performance.now() - start);
  }
  return ms;
}

let step = null;
for await (const line of readline.createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  if (step) {
    console.log(JSON.stringify({ ms: await timed(step, request.seconds) }));
    continue;
  }
  step = await built(request);
  for (let i = 0; i < WARM_UP; i++) await step();
  console.log(JSON.stringify({ ready: true }));
}
process.exit();
