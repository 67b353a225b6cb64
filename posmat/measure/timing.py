"""Timing: callables -> rows, one for each timed block.

`torch.utils.benchmark.Timer` reads the clock, synchronises the device and sets the threads; this
module decides what is called when. Short blocks of all methods are interleaved, so that whatever
disturbs the machine falls on all of them and the ratio between two methods stays.
"""

import math
import random
import statistics
import time
import timeit
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from torch.utils import benchmark
from tqdm import tqdm

from posmat.layer.problem import NotAvailable
from posmat.machine import gpu_uuid, read_gpu, require_device
from posmat.measure.summary import AGAIN, FLOOR

BLOCK_S = 5e-3  # long enough to hide the clock, short enough to fall between the scheduler's slices
REPLAY_S = 1e-3  # of a graph, which is replayed ten times for a block
WARM_UP_S = 0.2
LONG_S = 0.05  # a call of this length or more is a block by itself, without further untimed calls
LEAST_ROUNDS = 3  # whatever a method costs: fewer have no median that one bad block cannot move
# Of the seconds given, shared out evenly: what each method may warm up for, and once more what it
# may spend on rounds even if slow methods want everything. The rest goes where it is needed.
EVEN_PART = 1 / 4
# Multiples of it, modulo 1, lie evenly spread however many there are, and each one more splits one
# of the widest gaps.
_GOLDEN = (math.sqrt(5) - 1) / 2

# What each measurement of this process said of the CUDA device under its load, for the provenance.
GPU_STATES: list[dict] = []

COLUMNS = (
    *("run", "notebook", "method", "state", "exact", "max_error", "error_bound"),
    *("machine", "device", "processor", "torch", "dtype"),
    *("batch_size", "out_features", "in_features", "threads", "clock", "cache"),
    *("round", "position", "at_s", "number", "seconds", "cpu_s", "first_s", "why"),
)
DIGITS = 7  # of a time, which no clock here is sure of: whole rows are kept and published
_TIMES = ["at_s", "seconds", "cpu_s", "first_s"]
_CANNOT = ("not implemented for", "don't support automatic differentiation")
_CACHE = {"host": "hot", "event": "cold", "graph": "hot"}
_SEED_CLOCKS = ("seed (process)", "seed (wall)")


def time_methods(
    methods: Mapping[str, Callable[[], object]],
    *,
    reference: Tensor | Mapping[str, Tensor] | None,
    baseline: str | None = None,
    error_bound: float | None = None,
    time_wrong: Collection[str] = (),
    rounds: int = 30,
    seconds: float | None = 30.0,
    threads: int = 1,
    seed: int = 0,
    clock: str | None = None,
    timer: Callable[[], float] = benchmark.timer,
    cpu_timer: Callable[[], float] = time.process_time,
    **tags: object,
) -> pd.DataFrame:
    """Prove each method, then time all of them in interleaved blocks.

    A block lasts 5 ms or one call. Before it a quarter as many untimed calls are made, for what the
    last method left in the caches; a call of 50 ms or more is long against that and goes without.

    How many rounds a method meets is settled before the first of them, by what its first calls
    cost and never by what its blocks read. Those of a slow method are spread evenly, and some of
    those that a quicker one meets; the baseline and its control meet all.

    On CUDA it is the current device that is measured. With the host clock, its own clocks are read
    at the end, for the provenance: while the baseline, or else the first method, keeps it at work,
    because an idle device lowers them.

    Args:
        reference: what every method must give, or a mapping with one for each name. An integer
            reference asks for equality, `exact`; a floating one for a `max_error` within
            `error_bound`, the same shape both. None: nothing to compare with, both stay blank.
        baseline: the method that the two controls belong to; they are added when it is named.
        time_wrong: names of methods that are timed although they are wrong.
        rounds: at the most.
        seconds: for everything, proof and warm-up included. Where the rounds do not fit in, each
            method gets the same time: quick ones keep their rounds, slow ones meet fewer, but three
            in any case, which may then take longer. None: every method meets all rounds.
        threads, seed: of PyTorch on the host; of the order in which a round times the methods.
        clock: "host" (synchronised), or on CUDA "event" (device time, second-level cache flushed)
            or "graph" (replay of a captured graph, hot cache), each the median over `number` calls
            or replays. None: all that the device has, one after the other, sharing the seconds.
        timer, cpu_timer: clocks, in seconds; they are replaced in tests.
        tags: a column each, with one value for all rows, machine, device, batch_size ..., or with a
            mapping that has one for each method: dtype, of the operands, may differ so.

    Returns:
        One row per timed block, and one for each method that was not timed, with its `state`:
        'timed', 'wrong', 'not supported' or 'not available', and `why`.

    Raises:
        ValueError: an argument is not as described above, or the device is not there.
    """
    seconds = math.inf if seconds is None else seconds
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: give a number above 0, or None for all rounds.")
    device = require_device(str(tags.get("device", "cpu")))
    if clock not in (None, *_CACHE):
        raise ValueError(f"clock={clock!r} is not known: give one of {', '.join(_CACHE)}.")
    if rounds < 1 or threads < 1:
        raise ValueError(f"rounds={rounds} and threads={threads}: both must be 1 or more.")
    if baseline not in (None, *methods):
        raise ValueError(f"baseline={baseline!r} is not among {', '.join(methods)}.")
    proofs = _proofs(methods, reference, error_bound, time_wrong, timer)
    named = {*time_wrong, *(reference if isinstance(reference, Mapping) else ())}
    if strange := named - methods.keys():
        raise ValueError(
            f"reference or time_wrong name {', '.join(sorted(strange))}: the methods are "
            f"{', '.join(methods)}."
        )
    if baseline is not None:
        one = torch.ones(1, device=device)
        methods = {**methods, baseline + AGAIN: methods[baseline], FLOOR: lambda: one + one}
        proofs[baseline + AGAIN] = proofs[baseline]
        proofs[FLOOR] = partial(_prove, methods[FLOOR], None, None, False, timer)
    clocks = [clock] if clock else list(_CACHE) if device.type == "cuda" else ["host"]
    share = seconds / len(clocks)
    rows, threads_before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one_clock in clocks:
            rows += _time_by(
                one_clock, device, methods, proofs, baseline, rounds, share, seed, timer, cpu_timer
            )
    finally:
        torch.set_num_threads(threads_before)
    return _frame(rows, {**tags, "threads": threads})


def time_as_seed(
    methods: Mapping[str, Callable[[], object]],
    calls: int,
    *,
    reference: Tensor | Mapping[str, Tensor] | None,
    synchronise: bool = False,
    error_bound: float | None = None,
    time_wrong: Collection[str] = (),
    seconds: float = 3.0,
    wall: Callable[[], float] = time.perf_counter,
    cpu_timer: Callable[[], float] = time.process_time,
    **tags: object,
) -> pd.DataFrame:
    """Time each method the way the 2020 notebook did, to show how far off that was.

    One loop of `calls`, one method after the other, read with both clocks that `time.clock` stood
    for: the process's time, which it was on Unix, and wall time, which it was on Windows. Each
    method is proved first, so its first call is not a cold one, and `first_s` is blank.

    Args:
        methods, reference, error_bound, time_wrong, tags: as for `time_methods`, with the same
            errors; `reference` and `time_wrong` may name more methods than these.
        calls: in the loop; the row's `number` says how many there were.
        synchronise: wait for the device after each call, as some of the seed's cells do.
        seconds: that the loop of one method should take. Where a call of 50 ms or more makes it
            longer, there are as many calls as fit in, but three or `calls` in any case.
        wall, cpu_timer: clocks, in seconds; they are replaced in tests.

    Returns:
        Two rows for each method, with the clocks 'seed (process)' and 'seed (wall)'; a method that
        was not timed says why in both. `synchronised` is 'yes', 'no', or 'not needed' on the CPU.
    """
    on_cuda = require_device(str(tags.get("device", "cpu"))).type == "cuda"
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    waited = ("yes" if synchronise else "no") if on_cuda else "not needed"
    threads = torch.get_num_threads()
    tags = {"synchronised": waited, **tags, "threads": threads, "cache": "hot"}
    proofs = _proofs(methods, reference, error_bound, time_wrong, wall)
    rows = []
    for name, method in methods.items():
        facts = proofs[name]()
        row = {"method": name, **facts, "first_s": None}
        values = None, None
        if facts["state"] == "timed":
            wait()  # what was queued before is not this method's
            number, start, cpu_start = 0, wall(), cpu_timer()
            wanted = calls
            while number < wanted:
                method()
                if synchronise:
                    wait()
                number += 1
                # The call that proved it must have been as long: this one may have been held up.
                if number == 1 and (once := min(facts["first_s"], wall() - start)) >= LONG_S:
                    wanted = min(calls, max(LEAST_ROUNDS, int(seconds / once)))
            wall_s, cpu_s = (wall() - start) / number, (cpu_timer() - cpu_start) / number
            wait()
            values = cpu_s, wall_s
            row |= {"round": 0, "position": len(rows), "number": number}
        for clock, value in zip(_SEED_CLOCKS, values, strict=True):
            rows.append(row | {"clock": clock, "seconds": value})
    return _frame(rows, tags)


def _frame(rows: list[dict], tags: dict) -> pd.DataFrame:
    """Rows with their tags, the columns that all rows have first."""
    each = {name: values for name, values in tags.items() if isinstance(values, Mapping)}
    extra = [name for name in tags if name not in COLUMNS]
    for row in rows:  # a control is of the method that it repeats
        own = row["method"].removesuffix(AGAIN)
        row.update({name: values.get(own) for name, values in each.items()})
        row.update({"dtype": "float32"} if own == FLOOR and "dtype" in tags else {})
    frame = pd.DataFrame([tags | row for row in rows])
    for name in frame.columns.intersection(_TIMES):
        frame[name] = pd.to_numeric(frame[name]).map(lambda s: float(f"{s:.{DIGITS}g}"))
    return frame.reindex(columns=[*COLUMNS, *extra]).convert_dtypes()


def _proofs(methods, reference, error_bound, time_wrong, timer) -> dict[str, Callable[[], dict]]:
    """What proves each method; refused is what would leave a method unproved unsaid."""
    if not isinstance(reference, Mapping):
        reference = dict.fromkeys(methods, reference)
    if missing := [name for name in methods if name not in reference]:
        raise ValueError(
            f"reference has nothing for {', '.join(missing)}, but for {', '.join(reference)}: give "
            "each method one, or None where there is nothing to compare with."
        )
    floating = [n for n in methods if (y := reference[n]) is not None and y.is_floating_point()]
    if floating and error_bound is None:
        raise ValueError(
            f"the reference of {', '.join(floating)} is floating and error_bound is None: give the "
            "largest error that rounding may cause."
        )
    return {
        name: partial(_prove, method, reference[name], error_bound, name in time_wrong, timer)
        for name, method in methods.items()
    }


def _prove(method, reference, error_bound, time_wrong, timer) -> dict:
    """Call a method once, cold and alone, and compare what it gives with the reference."""
    try:
        start = timer()
        result = method()
        first_s = timer() - start
    except NotAvailable as error:
        return {"state": "not available", "why": str(error)}
    except RuntimeError as error:  # of which NotImplementedError is one
        if isinstance(error, NotImplementedError) or any(say in str(error) for say in _CANNOT):
            return {"state": "not supported", "why": str(error).splitlines()[0]}
        raise
    facts = {"state": "timed", "first_s": first_s}
    if reference is None:
        return facts
    floating = reference.is_floating_point()
    facts |= {"error_bound": error_bound} if floating else {"exact": False}
    if result.shape != reference.shape:
        why = f"it gives the shape {tuple(result.shape)}, the reference {tuple(reference.shape)}"
        return facts | {"state": "wrong", "why": why}
    if floating:
        errors = (result.double() - reference).abs()
        facts["max_error"] = errors.max().item() if errors.numel() else 0.0
        right = facts["max_error"] <= error_bound  # False for NaN
    else:
        # Compared as float64 where the result is floating: it holds every float32 and every
        # integer of a reference below 2**53.
        as_is = result.double() if result.is_floating_point() else result
        right = facts["exact"] = bool(torch.all(as_is == reference))
    if not right and not time_wrong:
        facts |= {"state": "wrong", "why": "it does not give what the reference gives"}
    return facts


def _prepare(method, first_s, warm_up_s, end, clock, timer) -> tuple[int, float, float]:
    """Warm a method up: how many calls make a block of 5 ms, the time of a call, that of a round.

    Whether a call is long is decided by the best of three, since one may be cold and another held
    up; of two where both take a second, which nothing adds to a call that is short.
    """
    if clock != "host":
        start = timer()
        seconds, number = _device_block(method, clock)
        return number, seconds, timer() - start
    if first_s >= 1 and timer() + first_s > end:
        # No time for one call more. Cold caches cost little against a second; only a method that
        # compiled itself seems too slow, and meets fewer rounds than it could.
        return 1, first_s, first_s
    start, once, calls = timer(), first_s, 0
    while calls < 1 or (calls < 2 and once < 1) or timer() - start < warm_up_s:
        before = timer()
        method()
        once, calls = min(once, timer() - before), calls + 1
    if once >= LONG_S:
        return 1, once, once
    number = 1
    while True:
        start = timer()
        best = min(_host_block(method, number, 0.0, timer) for _ in range(3))
        if best * number >= BLOCK_S:
            # A block with the calls that `Timer` adds, and the untimed quarter before it.
            return number, best, (timer() - start) / 3 + number // 4 * best
        number = max(number + 1, math.ceil(1.1 * BLOCK_S / max(best, BLOCK_S / 1e7)))


def _time_by(
    clock, device, methods, proofs, baseline, rounds, seconds, seed, timer, cpu_timer
) -> list[dict]:
    """Prove, prepare and time all methods by one clock: the rows, method by method."""
    end = timer() + seconds
    even_share = EVEN_PART * seconds / max(len(methods), 1)
    facts = {name: proof() for name, proof in proofs.items()}
    ready = {}
    for name, method in methods.items():
        if facts[name]["state"] != "timed":
            continue
        try:
            first_s, warm_up_s = facts[name]["first_s"], min(WARM_UP_S, even_share)
            ready[name] = _prepare(method, first_s, warm_up_s, end, clock, timer)
        except NotAvailable as error:
            facts[name] |= {"state": "not available", "why": str(error)}
        except RuntimeError as error:
            if clock != "graph":
                raise
            reason = str(error).splitlines()[0]  # it waits for the device, say
            facts[name] |= {"state": "not supported", "why": f"no graph of it: {reason}"}
    costs = {name: cost for name, (*_, cost) in ready.items()}
    baselines = {baseline, f"{baseline}{AGAIN}"} & ready.keys()
    met = _plan_rounds(costs, rounds, end - timer(), even_share, baselines)
    blocks = _interleave(methods, ready, met, seed, clock, timer, cpu_timer)
    if device.type == "cuda" and clock == "host" and ready:
        load = methods[baseline if baseline in ready else next(iter(ready))]
        GPU_STATES.append(_call_during(load, partial(read_gpu, gpu_uuid(device))))
    return [
        {"method": name, "clock": clock, "cache": _CACHE[clock], **facts[name], **block}
        for name in methods
        for block in blocks[name] or [{}]
    ]


def _plan_rounds(costs, rounds, left, even_share, baselines) -> dict[str, int]:
    """How many rounds each method meets, if all may spend the same and everything fits in."""

    def share_out(allowance: float) -> dict[str, int]:
        met = {
            name: round(max(min(rounds, LEAST_ROUNDS), min(rounds, allowance // cost)))
            for name, cost in costs.items()
        }
        # A block without the baseline's beside it has no ratio.
        most = min((met[name] for name in baselines), default=rounds)
        return {name: most if name in baselines else min(own, most) for name, own in met.items()}

    def fits(allowance: float) -> bool:
        return sum(own * costs[name] for name, own in share_out(allowance).items()) <= left

    enough = (rounds + 1) * max(costs.values(), default=0.0)
    if even_share >= enough or fits(enough):
        return share_out(enough)
    fitting, too_much = even_share, enough
    for _ in range(50):  # halves the distance each time
        middle = (fitting + too_much) / 2
        fitting, too_much = (middle, too_much) if fits(middle) else (fitting, middle)
    return share_out(fitting)


def _interleave(methods, ready, met, seed, clock, timer, cpu_timer) -> dict[str, list[dict]]:
    """Time one block of every method in every round that it meets: the blocks of each method."""
    rounds = max(met.values(), default=0)
    # A method meets the rounds of the lowest ranks: two share as many as the slower one meets.
    ranks = sorted(range(rounds), key=lambda rank: rank * _GOLDEN % 1)
    blocks, start = {name: [] for name in methods}, timer()
    orders = _orders(list(ready), rounds, random.Random(seed))
    readings = []

    def both() -> float:
        readings.append((timer(), cpu_timer()))
        return readings[-1][0]

    progress = tqdm(orders, "rounds", delay=2, leave=False, disable=None)  # None: on a terminal
    for index, order in enumerate(progress):
        for position, name in enumerate(order):
            if ranks[index] >= met[name]:
                continue
            method, (number, once, _) = methods[name], ready[name]
            at_s, cpu_s = timer() - start, None
            if clock == "host":
                for _ in range(number // 4):  # untimed: what the last method left in the caches
                    method()
                seconds = _host_block(method, number, once, both)
                cpu_s = (readings[-1][1] - readings[-2][1]) / number
            else:
                seconds, number = _device_block(method, clock)
            blocks[name].append(
                {"round": index, "position": position, "at_s": at_s}
                | {"number": number, "seconds": seconds, "cpu_s": cpu_s}
            )
    return blocks


def _orders(names: list[str], rounds: int, generator: random.Random) -> list[list[str]]:
    """An order of the methods for each round: the rows of Latin squares that are shuffled."""
    orders, n = [], len(names)
    while len(orders) < rounds:
        symbols, columns, rows = (generator.sample(one, n) for one in (names, range(n), range(n)))
        orders += [[symbols[(column + row) % n] for column in columns] for row in rows]
    return orders[:rounds]


def _host_block(method, number, once, timer) -> float:
    """Seconds per call over one block, synchronised at both ends."""
    if once >= LONG_S:
        # `Timer.timeit` makes two untimed calls before each block, which would treble the cost of
        # a method that is warm and long enough; Python's own `timeit`, inside it, makes none.
        return timeit.timeit(method, timer=timer, number=1)
    names, threads = {"method": method}, torch.get_num_threads()
    block = benchmark.Timer("method()", globals=names, num_threads=threads, timer=timer)
    return block.timeit(number).raw_times[0] / number


def _device_block(method, clock) -> tuple[float, int]:
    """Median seconds per call on the device, and over how many calls or replays of a graph."""
    if not torch.cuda.is_available():
        raise NotAvailable(
            f"clock={clock!r} is read from a CUDA device, and this PyTorch ({torch.__version__}) "
            "sees none: take clock='host'."
        )
    try:
        from triton.testing import do_bench, do_bench_cudagraph
    except ImportError as error:
        raise NotAvailable(f"clock={clock!r} needs triton, which is not installed.") from error
    if clock == "event":
        times = do_bench(method, warmup=1, rep=BLOCK_S * 1e3, return_mode="all")
    else:
        with warnings.catch_warnings():  # that the graph is empty where it could not be captured
            warnings.simplefilter("ignore")
            times = do_bench_cudagraph(method, rep=REPLAY_S * 1e3, return_mode="all")
    return statistics.median(times) / 1e3, len(times)


def _call_during(method, look) -> object:
    """What `look` finds while the method is called again and again; at least once."""
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(look)
        while True:
            method()
            torch.cuda.synchronize()  # or calls would queue up beyond the look
            if found.done():
                return found.result()
