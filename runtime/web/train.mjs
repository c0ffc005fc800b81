// Trains the bundle this file lies in (BUNDLE/host/train.mjs) on a text, in Node 22 or later, and prints a sample:
//   node host/train.mjs corpus.txt --steps 200 --out run.safetensors
import fs from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { open, sha256, train, UserError } from "./tinygpt.mjs";

const USAGE = `usage: node host/train.mjs CORPUS [--steps N] [--lr X] [--seed S] [--threads K] [--eval-every N] [--save-every N]
       [--out CHECKPOINT] [--resume CHECKPOINT] [--metrics FILE.jsonl] [--prompt TEXT] [--tokens N] [--bundle FOLDER] [--selftest]`;
const TEXT = ["seed", "out", "resume", "metrics", "prompt", "bundle"];
const NUMBERS = ["steps", "lr", "threads", "eval-every", "save-every", "tokens"];

function options() {
  const types = Object.fromEntries([...TEXT, ...NUMBERS].map((name) => [name, { type: "string" }]));
  let parsed;
  try {
    parsed = parseArgs({ allowPositionals: true, options: { ...types, selftest: { type: "boolean" }, help: { type: "boolean" } } });
  } catch (error) {
    throw new UserError(error.message, USAGE);
  }
  const values = { ...parsed.values, corpus: parsed.positionals[0] };
  for (const name of NUMBERS) {
    if (values[name] === undefined) continue;
    values[name] = Number(values[name]);
    if (!(values[name] >= 0) || (name !== "lr" && !Number.isSafeInteger(values[name]))) throw new UserError(`--${name} wants a number`, USAGE);
  }
  if (values.seed !== undefined && !/^\d+$/.test(values.seed)) throw new UserError("--seed wants an integer from 0 to 2^64 - 1", USAGE);
  if (values.help || (!values.corpus && !values.selftest)) throw new UserError(USAGE);
  return values;
}

/** Write a session's checkpoint, whole or not at all, in a folder of its own until it is. */
async function save(session, destination) {
  const partial = path.join(path.dirname(destination), `.${path.basename(destination)}.partial`);
  try {
    fs.rmSync(partial, { recursive: true, force: true });
    fs.mkdirSync(partial);
    const file = fs.openSync(path.join(partial, path.basename(destination)), "w");
    for await (const chunk of session.checkpoint()) {
      for (let done = 0; done < chunk.length; ) done += fs.writeSync(file, chunk, done);
    }
    fs.fsyncSync(file);
    fs.closeSync(file);
    fs.renameSync(path.join(partial, path.basename(destination)), destination);
  } catch (error) {
    throw new UserError(`checkpoint ${destination}: cannot be written: ${error.message}; what was there before is untouched`, "name another place");
  } finally {
    fs.rmSync(partial, { recursive: true, force: true });
  }
}

function read(corpus) {
  try {
    return new Uint8Array(fs.readFileSync(corpus));
  } catch (error) {
    throw new UserError(`corpus ${corpus}: cannot be read: ${error.message}`, "give the path of a text file");
  }
}

async function main() {
  const given = options();
  const bundle = given.bundle ?? path.dirname(import.meta.dirname);
  const session = await open(bundle, { threads: given.threads, seed: BigInt(given.seed ?? 42) });
  if (given.selftest) return selftest(session);
  const corpus = read(given.corpus);
  if (given.resume) await session.load(given.resume);
  session.data = { name: path.basename(given.corpus), bytes: corpus.length, sha256: sha256(corpus) };
  const steps = given.steps ?? 200;
  if (given.metrics) fs.writeFileSync(given.metrics, "", { flag: given.resume ? "a" : "w" });
  console.log(`${session.manifest.name}, ${session.manifest.target.profile}, ${session.engine.where}, ${corpus.length} bytes of text`);
  let stopping = false;
  process.once("SIGINT", () => (stopping = true));
  let told = performance.now();
  await train(session, corpus, {
    steps,
    lr: given.lr,
    evalEvery: given["eval-every"],
    saveEvery: given["save-every"],
    save: given.out ? () => save(session, given.out) : null,
    stop: () => stopping,
    onRow: (row) => {
      if (given.metrics) fs.appendFileSync(given.metrics, `${JSON.stringify(row)}\n`);
      if ("loss" in row && row.step < steps && performance.now() - told < 1000) return;
      told = performance.now();
      const show = ([name, value]) => `${name} ${Number.isInteger(value) ? value : value.toFixed(name === "tokens_per_s" ? 0 : 4)}`;
      console.log(Object.entries(row).map(show).join("  "));
    },
  });
  if (given.out) console.log(`saved to ${given.out} after ${session.step} steps`);
  if (given.tokens !== 0) console.log(`---\n${await session.generate(given.prompt ?? "\n", given.tokens ?? 200)}`);
  session.close();
}

async function selftest(session) {
  const checks = await session.selfTest();
  for (const c of checks) console.log(`${c.passed ? "ok  " : "FAIL"} ${c.function}: ${c.name} differs by ${c.difference} (allowed ${c.tolerance})`);
  session.close();
  process.exitCode = checks.every((c) => c.passed) ? 0 : 1;
}

main().catch((error) => {
  if (!(error instanceof UserError)) throw error;
  console.error(`error: ${error.message}${error.hint ? `\n  hint: ${error.hint}` : ""}`);
  process.exitCode = 2;
});
