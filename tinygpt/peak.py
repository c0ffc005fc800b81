"""The peak that a speed is measured beside: how many multiply-adds a second the same threads can do on registers alone,
compiled with the bundle's own flags at its own vector width."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tinygpt.ir.errors import CompilerBug
from tinygpt.toolchain import compiled

# Two units of four cycles' latency need 8 chains; 12 fit the 16 registers of the smallest profile.
CHAINS = 12
_STEPS = 256  # of every chain between two looks at the clock

_SOURCE = """\
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

typedef float Lanes __attribute__((vector_size({bytes})));

// Multiply-adds until the time is up: {chains} chains that do not wait for one another. The factors come from outside,
// so that nothing can be worked out in advance. Returns the operations a second.
static double run(const std::atomic<bool>& stop, float factor, float term, float* result) {{
  Lanes {declarations};
  const Lanes a = Lanes{{}} + factor, b = Lanes{{}} + term;
  const auto start = std::chrono::steady_clock::now();
  long rounds = 0;
  for (; !stop.load(std::memory_order_relaxed); ++rounds)
    for (int i = 0; i < {steps}; ++i) {{
{updates}
    }}
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  const Lanes sum = {sum};
  for (int i = 0; i < {lanes}; ++i) *result += sum[i];
  return 2.0 * {lanes} * {chains} * {steps} * rounds / elapsed.count();
}}

int main(int, char** argv) {{
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[2]);
  const float factor = std::atof(argv[3]), term = std::atof(argv[4]);
  std::atomic<bool> stop{{false}};
  std::vector<double> rates(threads);
  std::vector<float> results(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) workers.emplace_back([&, t] {{ rates[t] = run(stop, factor, term, &results[t]); }});
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (std::thread& worker : workers) worker.join();
  double rate = 0, keep = 0;
  for (int t = 0; t < threads; ++t) rate += rates[t], keep += results[t];
  std::printf("%.6f %g\\n", rate / 1e9, keep);
}}
"""


def source(lanes: int) -> str:
    """The C++ program: `program THREADS SECONDS FACTOR TERM` prints GFLOP/s."""
    chains = [f"c{i}" for i in range(CHAINS)]
    return _SOURCE.format(
        bytes=4 * lanes, lanes=lanes, chains=CHAINS, steps=_STEPS,
        declarations=", ".join(f"{c} = Lanes{{}} + {i + 1}.0f" for i, c in enumerate(chains)),
        updates="\n".join(f"      {c} = {c} * a + b;" for c in chains),
        sum=" + ".join(chains),
    )  # fmt: skip


def program(lanes: int, flags: Sequence[str]) -> Path:
    """The compiled program for vectors of so many f32, with the flags of a bundle's kernels. Raises UserError."""
    kept = [flag for flag in flags if flag not in ("-fPIC", "-fvisibility=hidden")]
    return compiled(source(lanes), [*kept, "-funroll-loops"])


def measure(program: Path, threads: int, seconds: float = 0.2) -> float:
    """GFLOP/s of so many threads, a multiply-add counting two."""
    done = subprocess.run(
        [str(program), str(threads), str(seconds), "0.999999", "0.000001"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CompilerBug(f"the peak program failed: {done.stderr.strip() or done.returncode}")
    return float(done.stdout.split()[0])
