"""How the threads of a module meet: a barrier between dependent launches, and the loop of a worker. All in the first
page of the shared memory, each word on a cache line of its own.

Waiting spins a bounded number of times, since the next launch is microseconds away as a rule, and then sleeps: on a
busy machine a pure spin takes the processor from the thread it waits for."""

from __future__ import annotations

from tinygpt.targets.wasm.assembler import Function, Instruction, Variable

# Byte addresses of words. Hosts know POSTED, ENTRY and FINISHED too (see runtime/web/tinygpt.mjs).
POSTED = 64  # how many entries were posted
ENTRY = 68  # the one posted last, -1 to stop
ARRIVED = 128  # threads at the barrier
MEETINGS = 192  # barriers passed
FINISHED = 256  # how many posted entries thread 0 has served
FAILED = 320  # not zero once a thread has trapped

_SPINS = 1 << 14  # about 20 µs
_SLEEP = 1_000_000_000  # ns, after which a sleeper looks whether a thread has failed
_EVERYONE = -1


def barrier(address: str) -> Function:
    """barrier(threads): returns when so many threads have called it. What they wrote before is visible after."""
    threads, meeting, base = 0, 1, (f"{address}.const", 0)
    body: list[Instruction] = [
        ("local.get", threads), ("i32.const", 1), ("i32.le_s",), ("if",), ("return",), ("end",),
        *_word(address, MEETINGS), ("local.set", meeting),
        base, ("i32.const", 1), ("i32.atomic.rmw.add", ARRIVED),
        ("i32.const", 1), ("i32.add",), ("local.get", threads), ("i32.eq",), ("if",),
        base, ("i32.const", 0), ("i32.atomic.store", ARRIVED),
        *_increment(address, MEETINGS), *_wake(address, MEETINGS), ("return",), ("end",),
        *_wait_while(address, MEETINGS, meeting, 2),
    ]  # fmt: skip
    locals = (Variable("meeting", "i32"), Variable("spins", "i32"))
    return Function("barrier", (Variable("threads", "i32"),), (), locals, tuple(body))


def post(address: str) -> Function:
    """post(entry): lets the workers that serve run it, or stop if it is -1."""
    body: list[Instruction] = [
        (f"{address}.const", 0), ("local.get", 0), ("i32.atomic.store", ENTRY),
        *_increment(address, POSTED), *_wake(address, POSTED),
    ]  # fmt: skip
    return Function("post", (Variable("entry", "i32"),), (), (), tuple(body))


def step(post: int, run: int) -> Function:
    """step(entry, threads): post the entry and run it as thread 0."""
    body: list[Instruction] = [
        ("local.get", 0), ("call", post), ("local.get", 0), ("i32.const", 0), ("local.get", 1), ("call", run),
    ]  # fmt: skip
    return Function("step", (Variable("entry", "i32"), Variable("threads", "i32")), (), (), tuple(body))


def serve(address: str, run: int) -> Function:
    """serve(thread, threads): run every entry posted since the memory was new, and to come, until told to stop."""
    thread, threads, served, entry, spins = range(5)
    body: list[Instruction] = [
        ("loop",),
        *_wait_while(address, POSTED, served, spins),
        ("local.get", served), ("i32.const", 1), ("i32.add",), ("local.set", served),
        *_word(address, ENTRY), ("local.tee", entry), ("i32.const", 0), ("i32.lt_s",), ("if",), ("return",), ("end",),
        ("local.get", entry), ("local.get", thread), ("local.get", threads), ("call", run),
        ("local.get", thread), ("i32.eqz",), ("if",),
        *_increment(address, FINISHED), *_wake(address, FINISHED), ("end",),
        ("br", 0), ("end",),
    ]  # fmt: skip
    parameters = (Variable("thread", "i32"), Variable("threads", "i32"))
    locals = (Variable("served", "i32"), Variable("entry", "i32"), Variable("spins", "i32"))
    return Function("serve", parameters, (), locals, tuple(body))


def fail(address: str) -> Function:
    """fail(): every thread that waits, or comes to wait, traps."""
    woken = (instruction for word in (MEETINGS, POSTED, FINISHED) for instruction in _wake(address, word))
    body = (*_increment(address, FAILED), *woken)
    return Function("fail", (), (), (), body)


def _word(address: str, at: int) -> list[Instruction]:
    return [(f"{address}.const", 0), ("i32.atomic.load", at)]


def _increment(address: str, at: int) -> list[Instruction]:
    return [(f"{address}.const", 0), ("i32.const", 1), ("i32.atomic.rmw.add", at), ("drop",)]


def _wake(address: str, at: int) -> list[Instruction]:
    return [(f"{address}.const", 0), ("i32.const", _EVERYONE), ("memory.atomic.notify", at), ("drop",)]


def _wait_while(address: str, at: int, value: int, spins: int) -> list[Instruction]:
    """Wait while the word at `at` is the local `value`: spinning first, then asleep. Traps if a thread has failed."""
    spin: list[Instruction] = [
        ("i32.const", _SPINS), ("local.set", spins),
        ("loop",),
        *_word(address, at), ("local.get", value), ("i32.ne",), ("br_if", 1),
        ("local.get", spins), ("i32.const", 1), ("i32.sub",), ("local.tee", spins), ("br_if", 0),
        ("end",),
    ]  # fmt: skip
    sleep: list[Instruction] = [
        ("loop",),
        *_word(address, FAILED), ("if",), ("unreachable",), ("end",),
        (f"{address}.const", 0), ("local.get", value), ("i64.const", _SLEEP), ("memory.atomic.wait32", at), ("drop",),
        *_word(address, at), ("local.get", value), ("i32.eq",), ("br_if", 0),
        ("end",),
    ]  # fmt: skip
    return [("block",), *spin, *sleep, ("end",)]
