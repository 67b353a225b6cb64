"""TIMING's claims, proved on a clock that the test drives; on the real one only floors."""

import itertools
import random
import sys
import time
import types

import pandas as pd
import pytest
import torch

from posmat.measure import timing
from posmat.measure.summary import AGAIN, FLOOR, summarize
from posmat.measure.timing import COLUMNS, _orders, time_as_seed, time_methods

ONE = {"a": lambda: torch.ones(1)}


class Machine:
    """A host and a device on a virtual clock: operations advance one or queue on the other."""

    def __init__(self, speed=lambda now: 1.0, noise=lambda: 1.0):
        self.now = 0.0
        self.device_free_at = 0.0
        self.speed, self.noise = speed, noise

    def host(self, seconds):
        def operation():
            self.now += seconds * self.noise() / self.speed(self.now)
            return torch.ones(1)

        return operation

    def device(self, seconds, launch=1e-5):
        def operation():
            self.now += launch
            self.device_free_at = max(self.now, self.device_free_at) + seconds
            return torch.ones(1)

        return operation

    def synchronised_clock(self):
        self.now = max(self.now, self.device_free_at) + 1e-9
        return self.now

    def clock_that_does_not_wait(self):
        self.now += 1e-9
        return self.now


def measure(clocks, methods, timer=None, **options):
    timer = timer or clocks.synchronised_clock
    options = {"reference": None, "timer": timer, "cpu_timer": timer, "run": 0} | options
    return time_methods(methods, **options)


def as_seed(machine, operation, calls, **options):
    clock = machine.clock_that_does_not_wait
    options |= {"reference": None, "wall": clock, "cpu_timer": clock}
    return time_as_seed({"kernel": operation}, calls, **options)


def test_an_asynchronous_millisecond_reads_a_millisecond():
    machine = Machine()
    kernel = {"kernel": machine.device(1e-3)}
    assert measure(machine, kernel)["seconds"].median() == pytest.approx(1e-3, rel=0.02)
    # That can fail: it does with a clock like the seed's, which reads the launch.
    launch = measure(machine, kernel, machine.clock_that_does_not_wait)["seconds"].median()
    of_seed = as_seed(machine, kernel["kernel"], 100)["seconds"].max()
    assert (launch, of_seed) == pytest.approx((1e-5, 1e-5), rel=0.02)


def test_a_machine_that_halves_its_speed_leaves_an_interleaved_ratio_at_1():
    machine = Machine(speed=lambda now: 1.0 if now < 1 else 0.5)
    rows = measure(machine, {"a": machine.host(1e-3), "b": machine.host(1e-3)})
    assert rows["at_s"].max() > 0.1 and rows["seconds"].max() > 1.9 * rows["seconds"].min()
    assert summarize(rows, "a").loc["b", "ratio"] == pytest.approx(1, abs=0.01)


def slow_at(machine, seconds, slow):
    """An operation of `seconds` whose first calls last as `slow` says; and a count of its calls."""
    calls = []

    def operation():
        calls.append(1)
        machine.now += slow[len(calls) - 1] if len(calls) <= len(slow) else seconds
        return torch.ones(1)

    return operation, calls


@pytest.mark.parametrize(
    "slow", [(0.3,), (0, 0.06), (0, 0.6), (0.3, 0.06), (0.3, 0.6), (0.3, 0.06, 0.06)]
)
def test_a_slow_call_among_the_first_does_not_fix_the_block(slow):
    machine = Machine()
    operation, _ = slow_at(machine, 1e-5, slow)
    rows = measure(machine, {"short": operation})
    assert len(rows) == 30 and rows["number"].min() >= 490  # a block of 5 ms
    assert rows["seconds"].max() == pytest.approx(1e-5, rel=0.01)
    assert rows["first_s"].iloc[0] == pytest.approx(slow[0], rel=0.01, abs=1e-8)


@pytest.mark.parametrize(("seconds", "before", "blocks"), [(None, 2, 30), (6, 2, 3), (4, 1, 3)])
def test_a_method_of_seconds_costs_two_calls_beside_its_blocks_or_one(seconds, before, blocks):
    machine = Machine()
    operation, calls = slow_at(machine, 2.5, ())
    rows = measure(machine, {"whole form": operation}, seconds=seconds)
    assert rows["number"].tolist() == [1] * blocks and len(calls) == before + blocks


def a_table(machine, times_longer=1.0):
    """A dozen quick and slow methods."""
    times = {"base": 2e-3, **{f"quick {i}": 1e-4 * 2**i for i in range(5)}}
    times |= {"long": 0.05, "slow": 0.4, "slower": 0.6}
    return {name: machine.host(times_longer * s) for name, s in times.items()}


def with_controls(machine, methods, **options):
    """Rows with the controls, whose one-element call takes a time on the virtual clock too."""

    class One:
        def __add__(self, other):
            machine.host(1e-5)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "ones", lambda *_, **__: One())
        return measure(machine, methods, **options)


def rounds_of(rows):
    return {name: set(own["round"]) for name, own in rows.groupby("method", sort=False)}


@pytest.mark.parametrize("times_longer", [0.1, 1, 2, 3, 10])
def test_a_slow_machine_takes_about_the_same_time(times_longer):
    machine = Machine()
    rows = with_controls(machine, a_table(machine, times_longer), baseline="base", seconds=25)
    met = {name: len(own) for name, own in rounds_of(rows).items()}
    assert min(met.values()) == met["slower"] >= 3
    assert met["quick 0"] == met["base"] == met["base" + AGAIN]
    assert (min(met.values()) == 30) == (times_longer == 0.1)  # what fits in meets all rounds
    if times_longer < 10:
        assert (5 if times_longer == 0.1 else 23) < machine.now < 25.5 and met["base"] == 30
    else:  # three rounds of the slow ones alone take longer, and do not leave all with three
        assert met["slow"] == met["slower"] == 3 and met["base"] > 8
        calls = 1 + 1 + 3  # the first one, one that warms up, and the rounds
        assert machine.now < calls * (4 + 6) + 25 / 2


def test_a_small_budget_is_not_spent_on_warming_up():
    machine = Machine()
    methods = {f"quick {i}": machine.host(1e-3) for i in range(5)}
    rows = measure(machine, methods, rounds=7, seconds=0.8)
    assert machine.now < 0.8 and set(map(len, rounds_of(rows).values())) == {7}


@pytest.mark.parametrize("seconds", [0.01, 2, 5, 10, 20, 40])
@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 30])
def test_every_method_meets_three_rounds_nested_and_beside_the_baseline(seconds, rounds):
    machine = Machine()
    rows = with_controls(machine, a_table(machine), baseline="base", seconds=seconds, rounds=rounds)
    met = rounds_of(rows)
    assert met["base"] == met["base" + AGAIN] == set(rows["round"]) == set(range(len(met["base"])))
    assert all(min(rounds, 3) <= len(own) <= rounds for own in met.values())
    ordered = sorted(met.values(), key=len)
    assert all(few <= many for few, many in itertools.pairwise(ordered))


def test_a_slow_baseline_leaves_no_round_without_its_pair():
    machine = Machine()
    methods = {"slow": machine.host(1.0), "quick": machine.host(1e-3)}
    met = rounds_of(with_controls(machine, methods, baseline="slow", seconds=20))
    assert met["slow"] == met["slow" + AGAIN] == met["quick"] == met[FLOOR]
    assert 3 <= len(met["slow"]) < 10
    alone = rounds_of(measure(machine, methods, seconds=20))  # any may be the baseline afterwards
    assert len(alone["quick"]) == 30 > len(alone["slow"])


@pytest.mark.parametrize("rounds", range(4, 31))
def test_the_rounds_of_a_slow_method_are_evenly_spread(rounds):
    for wanted in range(3, rounds):
        machine = Machine()
        methods = {"quick": machine.host(6e-3), "slow": machine.host(1.0)}
        seconds = 2.3 + rounds * 0.018 + wanted + 0.4
        met = sorted(rounds_of(measure(machine, methods, rounds=rounds, seconds=seconds))["slow"])
        gaps = [b - a for a, b in itertools.pairwise([*met, rounds])]
        assert len(met) == wanted and met[0] == 0
        assert max(gaps) <= 2 * rounds / wanted


def test_the_rounds_are_settled_before_the_first_of_them():
    """A machine that becomes ten times slower once the blocks begin meets as many rounds."""

    def run(slower):
        machine, begun = Machine(), []
        machine.speed = lambda _: 0.1 if begun and slower else 1.0

        def cpu_timer():  # is read for blocks only
            begun.append(1)
            return machine.now

        options = {"baseline": "base", "seconds": 20, "cpu_timer": cpu_timer}
        return rounds_of(with_controls(machine, a_table(machine), **options)), machine.now

    (same, quick_s), (met, slow_s) = run(slower=False), run(slower=True)
    assert met == same and slow_s > 3 * quick_s


def test_intervals_cover_the_truth():
    """95 % intervals of a true ratio of 1.5 hold it in 90 to 99 % of 200 simulated runs."""
    generator = random.Random(1)
    covered = 0
    for seed in range(200):
        machine = Machine(noise=lambda: generator.lognormvariate(0, 0.15))
        methods = {"a": machine.host(4e-3), "b": machine.host(6e-3)}
        line = summarize(measure(machine, methods, seed=seed), "a").loc["b"]
        covered += line["ratio_low"] <= 1.5 <= line["ratio_high"]
    assert 180 <= covered <= 198


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_every_method_meets_every_position_equally_often(n):
    names = [f"m{i}" for i in range(n)]
    orders = list(_orders(names, 3 * n, random.Random(0)))
    assert len(orders) == 3 * n
    for position in range(n):
        stood = [order[position] for order in orders]
        assert all(stood.count(name) == 3 for name in names)
    if n > 2:
        assert len({tuple(order) for order in orders}) > n  # drawn anew, not one cycle


def test_rows_are_tidy_carry_the_tags_and_come_in_the_order_of_their_seed():
    clocks = Machine()
    methods = {name: clocks.host(1e-3) for name in "abc"}
    tags = {"machine": "here", "dtype": "int8", "note": "extra"}
    rows, again, other = (measure(clocks, methods, seed=seed, **tags) for seed in (3, 3, 4))
    assert list(rows.columns) == [*COLUMNS, "note"]
    assert (rows["machine"] == "here").all() and (rows["note"] == "extra").all()
    assert rows["method"].tolist() == sorted(30 * "abc")
    assert rows["round"].tolist() == 3 * [*range(30)]
    order = ["method", "round", "position"]
    assert rows[order].equals(again[order]) and not rows[order].equals(other[order])


def test_methods_are_proved_before_they_are_timed():
    right, wrong = torch.tensor([1, 2]), torch.tensor([1, 3])
    calls = []

    def fails(message):
        raise RuntimeError(message)

    methods = {"right": lambda: right, "wrong": lambda: calls.append(1) or wrong}
    methods |= {"unsupported": lambda: fails("\"addmv\" not implemented for 'Char'")}
    rows = time_methods(methods, reference=right, baseline="wrong", rounds=1).set_index("method")
    states = ["timed", "wrong", "not supported", "wrong", "timed"]
    assert rows.index.tolist() == [*methods, "wrong" + AGAIN, FLOOR]
    assert rows["state"].tolist() == states and len(calls) == 2
    assert rows["exact"].tolist() == [True, False, pd.NA, False, pd.NA]
    assert rows["seconds"].isna().tolist() == [state != "timed" for state in states]
    assert "not implemented" in rows.loc["unsupported", "why"]
    # It is timed where the question is about it.
    wanted = {"reference": right, "baseline": "wrong", "time_wrong": {"wrong"}, "rounds": 1}
    rows = time_methods({"wrong": lambda: wrong}, **wanted)
    assert rows["state"].tolist() == ["timed"] * 3
    assert rows["exact"].tolist() == [False, False, pd.NA]
    with pytest.raises(RuntimeError, match="out of memory"):  # no other error is swallowed
        time_methods({"broken": lambda: fails("out of memory")}, reference=None)


@pytest.mark.parametrize("value", [1.1, float("nan"), float("inf")])
def test_a_floating_result_beyond_its_bound_is_wrong(value):
    near, far = torch.tensor([1.0, 1.001]), torch.tensor([1.0, value])
    methods = {"near": lambda: near, "far": lambda: far}
    reference = torch.ones(2, dtype=torch.float64)
    rows = time_methods(methods, reference=reference, error_bound=0.01, rounds=1)
    assert rows["state"].tolist() == ["timed", "wrong"] and rows["exact"].isna().all()
    assert rows["max_error"][0] == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(ValueError, match="of near, far is floating and error_bound is None"):
        time_methods(methods, reference=reference)


def test_a_method_that_nothing_is_said_of_is_refused():
    methods = {"a": lambda: torch.ones(1), "b": lambda: torch.ones(1)}
    one = torch.ones(1).long()
    with pytest.raises(ValueError, match=r"reference has nothing for a, .*b, A"):
        time_methods(methods, reference={"b": one, "A": one})
    with pytest.raises(ValueError, match="reference has nothing for b"):
        time_as_seed(methods, 1, reference={"a": one})
    with pytest.raises(ValueError, match="name A, c: the methods are a, b"):
        time_methods(methods, reference={"a": one, "b": one, "A": one}, time_wrong={"a", "c"})
    rows = time_methods(methods, reference={"a": one, "b": None}, rounds=1).set_index("method")
    assert rows.loc["a", "exact"] and pd.isna(rows.loc["b", "exact"])
    some = {"a": methods["a"]}  # of those that a notebook times
    rows = time_as_seed(some, 1, reference={"a": one, "b": one}, time_wrong={"b"})
    assert rows["exact"].all()


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
def test_another_shape_is_never_timed_and_an_empty_result_is_right(kind):
    options = {"error_bound": float("inf"), "time_wrong": {"row"}, "rounds": 1}
    row = {"row": lambda: torch.ones(1)}  # which broadcasts
    rows = time_methods(row, reference=torch.ones(3, dtype=kind), **options)
    assert rows["state"].tolist() == ["wrong"] and rows["max_error"].isna().all()
    assert rows["why"].tolist() == ["it gives the shape (1,), the reference (3,)"]
    empty = {"row": lambda: torch.ones(0, 3)}
    rows = time_methods(empty, reference=torch.ones(0, 3, dtype=kind), **options)
    assert rows["state"].tolist() == ["timed"]


def test_threads_are_set_while_timing_and_put_back():
    before, seen = torch.get_num_threads(), set()
    look = {"look": lambda: seen.add(torch.get_num_threads()) or torch.ones(1)}
    time_methods(look, reference=None, threads=before + 1, rounds=1)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_the_real_clock_never_reads_less_than_was_spent():
    def busy():
        end = time.perf_counter() + 2e-3
        while time.perf_counter() < end:
            pass
        return torch.ones(1)

    rows = time_methods({"busy": busy}, reference=None, rounds=3)
    assert rows["seconds"].min() >= 2e-3
    assert rows["cpu_s"].min() > 0


@pytest.mark.parametrize(
    ("seconds", "asked", "made"),
    [(1e-3, 7, 7), (0.04, 100, 100), (0.07, 100, 42), (0.07, 10, 10), (1.8, 100, 3), (1.8, 2, 2)],
)
def test_the_seeds_way_calls_as_often_as_asked_or_as_fits_in(seconds, asked, made):
    machine = Machine()
    calls = []
    operation = machine.host(seconds)
    rows = as_seed(machine, lambda: calls.append(1) or operation(), asked)
    assert set(rows["number"]) == {made} and len(calls) == made + 1  # and one to prove it
    assert rows["seconds"].astype(float).iloc[1] == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("slow", [(0.2,), (0, 0.2)])
def test_one_slow_call_does_not_shorten_the_seeds_loop(slow):
    machine = Machine()
    operation, _ = slow_at(machine, 1e-3, slow)
    assert set(as_seed(machine, operation, 100, seconds=1)["number"]) == {100}


def test_the_seeds_rows_say_what_was_waited_for_and_claim_no_cold_call(monkeypatch):
    rows = time_as_seed(ONE, 2, reference=torch.zeros(1).long(), synchronise=True, device="cpu")
    assert rows["state"].tolist() == ["wrong"] * 2 and rows["seconds"].isna().all()
    assert rows["clock"].tolist() == ["seed (process)", "seed (wall)"]
    assert rows["synchronised"].tolist() == ["not needed"] * 2 and rows["first_s"].isna().all()
    waits = []
    monkeypatch.setattr(timing, "require_device", torch.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    for synchronise, said, waited in ((True, "yes", 4), (False, "no", 2)):
        waits.clear()
        rows = time_as_seed(ONE, 2, reference=None, synchronise=synchronise, device="cuda:1")
        assert rows["synchronised"].tolist() == [said] * 2 and len(waits) == waited
        assert rows["first_s"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clock": "sundial"}, "host, event, graph"),
        ({"baseline": "b"}, "not among a"),
        ({"rounds": 0}, "1 or more"),
        ({"threads": 0}, "1 or more"),
        ({"seconds": 0}, "seconds=0: give a number above 0, or None for all rounds"),
        ({"seconds": float("nan")}, "seconds=nan: give a number above 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        time_methods(ONE, reference=None, **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("clock", "cache"), [("host", "hot"), ("event", "cold"), ("graph", "hot")])
def test_cuda_clocks(clock, cache):
    a = torch.randn(4096, 4096, device="cuda")
    options = {"reference": a.double() @ a.double(), "error_bound": 1.0, "baseline": "gemm"}
    rows = time_methods({"gemm": lambda: a @ a}, clock=clock, rounds=3, device="cuda", **options)
    gemm = rows[rows["method"] == "gemm"]
    assert (gemm["state"] == "timed").all() and (gemm["cache"] == cache).all()
    # 137 GFLOP take longer than 0.2 ms on any GPU there is: a launch alone would read less.
    assert gemm["seconds"].astype(float).min() > 2e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_is_timed_with_all_its_clocks_and_a_graph_that_cannot_be_captured_says_so():
    one = torch.ones(1000, device="cuda")
    methods = {"add": lambda: one + one, "waits": lambda: torch.tensor((one + one).sum().item())}
    rows = time_methods(methods, reference=None, rounds=2, device="cuda")
    states = rows.groupby(["method", "clock"])["state"].first()
    assert set(rows["clock"]) == {"host", "event", "graph"}
    assert states["add"].eq("timed").all() and states["waits", "graph"] == "not supported"


def bring_triton(monkeypatch, bench):
    """Put a stub in the place of triton, which may not be installed."""
    stub = types.ModuleType("triton.testing")
    stub.do_bench = stub.do_bench_cudagraph = bench
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", stub)


@pytest.mark.parametrize("clock", ["event", "graph"])
def test_device_clocks_say_that_there_is_no_device_or_give_the_median(clock, monkeypatch):
    bring_triton(monkeypatch, lambda *_, **__: [1.0, 2.0, 6.0])
    options = {"reference": None, "clock": clock, "rounds": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = time_methods(ONE, **options).to_dict("records")
    assert line["state"] == "not available"
    assert "CUDA" in line["why"] and "clock='host'" in line["why"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = time_methods(ONE, **options)
    assert rows["state"].tolist() == ["timed"] * 2 and rows["number"].tolist() == [3, 3]
    assert rows["seconds"].tolist() == pytest.approx([2e-3] * 2)


def test_three_clocks_share_the_seconds_and_the_gpu_is_looked_at_while_it_works(monkeypatch):
    """With the clocks of the host, whose synchronisation stands in for the device's."""
    machine, calls = Machine(), []
    slow = machine.host(0.1)

    def operation():
        calls.append(1)
        return slow()

    def bench(method, rep, return_mode, **_):
        method()
        return [100.0]

    def look(uuid):
        before = len(calls)
        while len(calls) < before + 2:
            time.sleep(1e-3)  # until the method was called meanwhile
        return {"sm_clock_mhz": 1980.0, "of": uuid}

    bring_triton(monkeypatch, bench)
    monkeypatch.setattr(timing, "GPU_STATES", [])
    monkeypatch.setattr(timing, "require_device", lambda _: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(timing, "gpu_uuid", lambda _: "0a1b")
    monkeypatch.setattr(timing, "read_gpu", look)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(1e-3))
    rows = measure(machine, {"a": operation}, seconds=6, device="cuda")
    met = rows.groupby("clock", sort=False)["round"].count()
    assert met.index.tolist() == ["host", "event", "graph"] and met.between(15, 19).all()
    assert timing.GPU_STATES == [{"sm_clock_mhz": 1980.0, "of": "0a1b"}]


def test_every_row_says_the_dtype_of_its_own_operands():
    x = torch.ones(4, dtype=torch.int8)
    methods = {"float": lambda: x.float() + 1, "int": lambda: x + 1}
    dtypes = {"float": "float32", "int": "int8"}
    rows = time_methods(methods, reference=x + 1, baseline="float", rounds=2, dtype=dtypes)
    said = rows.groupby("method")["dtype"].first().to_dict()
    assert said == dtypes | {"float (again)": "float32", FLOOR: "float32"}
    assert summarize(rows).loc["int", "ratio"] > 0  # methods may differ in dtype, rows of one not
    rows.loc[rows["method"] == "int", "dtype"] = ["int8", "float32"]
    with pytest.raises(ValueError, match="several values of dtype"):
        summarize(rows)
