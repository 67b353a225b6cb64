"""Charts of ratios: speedup beside the noise, machines side by side, a parameter swept.

A ratio is the one of `summarize`, paired by round; its whisker is the interval of one run, or the
range over several.
"""

import numpy as np
import pandas as pd

from posmat.charts.style import (
    BLUE,
    COLOURS,
    COLUMN_WIDTH_IN,
    FAINT,
    INK,
    MARKS,
    Chart,
    apart,
    as_text,
    chart_of_nothing,
    describe_rows,
    format_ratio,
    kept,
    listed,
    name_of,
    plain_log_ticks,
    sentence,
    summary_of,
    table_of,
    words_of_kernels,
    words_of_range,
    words_of_span,
    words_of_wrong,
)
from posmat.summary import AGAIN, FLOOR, baseline_of, format_figures, is_control, stands

_SWEPT = ("batch_size", "out_features", "in_features", "threads")


def speedup(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method: how many times faster than the baseline, with its interval.

    The last line is the control, the baseline timed a second time: its interval is the noise.
    """
    rows = rows[rows["clock"] == "host"]
    baseline = baseline_of(rows)
    shown = _with_ratio(summary_of(rows), baseline)
    if shown.empty:
        return chart_of_nothing(title, f"{baseline} has no time here: there is no speedup over it.")
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 0.95 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.6, zorder=1)
    for place, (method, line) in enumerate(shown.iterrows()):
        middle, low, high = (1 / float(line[n]) for n in ("ratio", "ratio_high", "ratio_low"))
        colour, mark = (INK, "D") if is_control(method) else (BLUE, "o")
        axes.hlines(place, low, high, color=colour, linewidth=1.8)
        _mark(axes, middle, place, mark, colour, line["wrong"])
        _write_on_line(
            axes, place, name_of(method, line["wrong"]), words_of_range(line, inverse=True)
        )
    axes.set_xscale("log")
    axes.set(xlabel=f"speedup over {baseline}", yticks=[], ylim=(len(shown) - 0.6, -0.75))
    plain_log_ticks(axes.xaxis, 1 / shown["ratio"].astype(float))
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    axes.set_title(describe_rows(rows), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


def _with_ratio(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """The lines whose ratio says something: all but the baseline's own, the control at the end."""
    has = table[(table["state"] == "timed") & table["ratio"].notna()]
    has = has.drop(index=[name for name in (baseline, FLOOR) if name in has.index])
    last = np.array([str(name).endswith(AGAIN) for name in has.index], dtype=bool)
    return pd.concat([has[~last], has[last]])


def caption_speedup(rows: pd.DataFrame) -> str:
    """What the marks of `speedup` are."""
    baseline = baseline_of(rows)
    shown = _with_ratio(summary_of(rows), baseline)
    if shown.empty:
        return f"No speedup: {baseline} has no time here. {describe_rows(rows)}."
    runs = int(shown["runs"].max())
    whisker = (
        "the range of the runs" if runs > 1 else "95 % intervals, of which one run knows no better"
    )
    control = (
        f" The line '{baseline}{AGAIN}', a diamond, is the baseline timed a second time: its "
        "interval is the noise floor."
        if f"{baseline}{AGAIN}" in shown.index
        else ""
    )
    return (
        f"Speedup over {baseline}: medians of the ratios within a round, with {whisker} "
        f"({words_of_kernels(runs)}).{control}{words_of_wrong(shown)} {describe_rows(rows)}, "
        f"PyTorch {rows['torch'].iloc[0]}."
    )


def words_of_speedup(rows: pd.DataFrame) -> str:
    """What `speedup` shows, in words: each speedup with its interval."""
    baseline = baseline_of(rows)
    shown = _with_ratio(summary_of(rows), baseline)
    if shown.empty:
        return f"An empty chart: {baseline} has no time here, so there is no speedup over it."
    said = [
        f"{name_of(method, line['wrong'])} {words_of_range(line, inverse=True)}"
        for method, line in shown.iterrows()
    ]
    return f"Chart, one line per method, of the speedup over {baseline}: {'; '.join(said)}."


def finding_speedup(rows: pd.DataFrame) -> str:
    """Which methods are told apart from the baseline, by more than the noise."""
    baseline = baseline_of(rows)
    table = summary_of(rows)
    shown = _with_ratio(table, baseline)
    groups: dict[str, list[str]] = {"faster": [], "slower": [], "neither": []}
    for method, line in shown.iterrows():
        if not is_control(method):
            verdict = "faster" if line["ratio"] < 1 else "slower"
            groups[verdict if stands(table, method) else "neither"].append(
                f"{name_of(method, line['wrong'])} {format_figures(1 / line['ratio'])}×"
            )
    said = [
        f"{words} than {baseline} by more than the noise: {listed(groups[words])}"
        for words in ("faster", "slower")
        if groups[words]
    ]
    if groups["neither"]:
        said.append(f"not told apart from the noise: {listed(groups['neither'])}")
    if not said:
        return f"{baseline} has no time here, so nothing can be said of a speedup over it."
    text = "; ".join(said)
    return f"{sentence(text)}."


def machines_side_by_side(rows: pd.DataFrame, title: str) -> Chart:
    """One line per method, one mark per machine and device: its time over the baseline's there.

    The last line is each machine's control, the baseline timed a second time.
    """
    baseline = baseline_of(rows)
    table = _table_of_machines(rows)
    if table.empty:
        return chart_of_nothing(title, f"{baseline} has no time on any machine: no ratio to it.")
    methods = list(table["method"].unique())
    places = list(table.groupby(["machine", "device"], sort=False))
    apart_by = 0.16 if len(places) < 4 else 0.5 / len(places)
    figure = Chart(figsize=(COLUMN_WIDTH_IN, 1.1 + 0.4 * len(methods)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=FAINT, linewidth=0.6, zorder=1)
    for index, ((machine, device), own) in enumerate(places):
        colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
        shift = apart_by * (index - (len(places) - 1) / 2)
        y = [methods.index(name) + shift for name in own["method"]]
        axes.hlines(
            y, own["ratio_low"].astype(float), own["ratio_high"].astype(float), color=colour
        )
        label = f"{machine}, {device}"
        for at, (_, line) in zip(y, own.iterrows(), strict=True):
            _mark(axes, float(line["ratio"]), at, mark, colour, line["wrong"], label=label)
            label = None
    for place, method in enumerate(methods):
        own = table[table["method"] == method]
        # In the order of the legend, and only where they fit a line.
        ratios = [format_ratio(ratio) + "×" for ratio in own["ratio"]] if len(places) < 4 else []
        _write_on_line(axes, place - 0.08, name_of(method, own["wrong"].any()), ", ".join(ratios))
    axes.set_xscale("log")
    axes.set(xlabel=f"time / time of {baseline} there", yticks=[])
    axes.set_ylim(len(methods) - 0.6, -0.8)
    plain_log_ticks(axes.xaxis, table["ratio"].astype(float))
    axes.grid(axis="x", which="major")
    axes.spines["left"].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=7, frameon=False)
    figure.head(title)
    return figure


def _table_of_machines(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per machine, device and method with a ratio; the control is the last of each."""
    baseline = baseline_of(rows)
    tables = [
        _with_ratio(table, baseline).assign(machine=machine, device=device)
        for (machine, device), table in _tables_by_machine(rows)
    ]
    joined = pd.concat([table.reset_index(names="method") for table in tables], ignore_index=True)
    control = joined["method"].astype(str).str.endswith(AGAIN).astype(bool)
    return pd.concat([joined[~control], joined[control]], ignore_index=True)


def _tables_by_machine(rows: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    host = rows[rows["clock"] == "host"]
    by = ["machine", "device"]
    table = kept(rows, "machines", lambda _: table_of(host, baseline_of(rows), by))
    places = dict.fromkeys(zip(host["machine"], host["device"], strict=True))
    return [(place, table.loc[place]) for place in places]


def caption_machines(rows: pd.DataFrame) -> str:
    """What the marks of `machines_side_by_side` are."""
    baseline = baseline_of(rows)
    table = _table_of_machines(rows)
    facts = rows.groupby(["machine", "device"], sort=False)[["processor", "torch"]].first()
    said = "; ".join(
        f"{machine}, {device}: {line['processor']}, PyTorch {line['torch']}"
        for (machine, device), line in facts.iterrows()
    )
    floors = [
        f"{line['machine']}, {line['device']} {words_of_range(line)}"
        for _, line in table[table["method"] == f"{baseline}{AGAIN}"].iterrows()
    ]
    floor = (
        f" The line '{baseline}{AGAIN}' is the baseline timed a second time, each machine's noise "
        f"floor: {'; '.join(floors)}."
        if floors
        else ""
    )
    return (
        f"Each form's time over that of {baseline} on the same machine, so that machines "
        f"can be compared by ratios ({said}). Marks are medians of paired ratios, whiskers their "
        f"intervals, or the range over several runs.{floor}"
        f"{words_of_wrong(table.set_index('method'))}"
    )


def words_of_machines(rows: pd.DataFrame) -> str:
    """What `machines_side_by_side` shows, in words: the ratios on each machine."""
    said = []
    for method, own in _table_of_machines(rows).groupby("method", sort=False):
        ratios = [
            f"{line['machine']}, {line['device']} {format_ratio(line['ratio'])}×"
            f"{', wrong' if line['wrong'] else ''}"
            for _, line in own.iterrows()
        ]
        said.append(f"{method}: {'; '.join(ratios)}")
    return (
        f"Chart, one line per form and a mark for each machine, of the time over that of "
        f"{baseline_of(rows)} there. {'. '.join(said)}."
    )


def finding_machines(rows: pd.DataFrame) -> str:
    """Of each form, over which ratios the machines go, and where it is faster than the baseline."""
    baseline = baseline_of(rows)
    tables = dict(_tables_by_machine(rows))
    said = []
    for method, own in _table_of_machines(rows).groupby("method", sort=False):
        if is_control(method):
            continue
        times = words_of_span(own["ratio"])
        verdicts = set()
        for _, line in own.iterrows():
            table = tables[line["machine"], line["device"]]
            sure = stands(table, method)
            verdicts.add(("slower" if line["ratio"] > 1 else "faster") if sure else "unsure")
        verdict = {
            frozenset({"slower"}): "slower everywhere",
            frozenset({"faster"}): "faster everywhere",
            frozenset({"unsure"}): "nowhere told apart from the noise",
        }.get(frozenset(verdicts), "not on the same side everywhere, or not told apart")
        said.append(f"{method} {times} times ({verdict})")
    if not said:
        return f"{baseline} has no time on any machine, so there is nothing to compare."
    return f"Over {len(tables)} devices, a form takes of {baseline}'s time: {listed(said)}."


def sweep(rows: pd.DataFrame, title: str) -> Chart:
    """A panel per parameter that was swept: the time per call of each method against it.

    Quartiles are the whiskers; the names stand at the ends of the lines.
    """
    panels = sweeps(rows)
    if not panels:
        return chart_of_nothing(title, _NO_SWEEP)
    methods = [one for one in _timed(rows)["method"].unique() if not is_control(one)]
    looks = {
        method: (COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)])
        for index, method in enumerate(methods)
    }
    height = 0.45 + 2.15 * len(panels)
    figure = Chart(figsize=(COLUMN_WIDTH_IN, height), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (name, own) in zip(grid, panels.items(), strict=True):
        _panel(axes, name, _points(own, name), looks)
        axes.set_title(describe_rows(own), fontsize=6.5, color=FAINT)
    figure.head(title)
    return figure


_NO_SWEEP = "No two runs here differ in one size, or in the threads, alone."


def _panel(axes, name: str, points: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    """One panel of a sweep: a line per method with whiskers, its name at its end."""
    ends = {}
    for method, line in points.groupby("method", sort=False):
        if method not in looks:
            continue
        colour, mark = looks[method]
        x, y = line[name].to_numpy(float), line["median"].to_numpy(float)
        axes.vlines(x, line["q25"].astype(float), line["q75"].astype(float), color=colour, lw=1.6)
        axes.plot(x, y, f"{mark}-", color=colour, markersize=3.4, linewidth=1)
        ends[method] = (x[-1], y[-1])
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="time per call [ms]")
    axes.set_xticks(sorted(points[name].astype(float).unique()))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    plain_log_ticks(axes.yaxis, points["median"].astype(float))
    axes.grid(which="major")
    low, high = np.log10(axes.get_ylim())
    heights = [(np.log10(y) - low) / (high - low) for _, y in ends.values()]
    for (method, end), height in zip(ends.items(), apart(heights, 0.1), strict=True):
        colour = looks[method][0]
        arrow = {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5), "color": colour}
        axes.annotate(
            method, end, (1.08, height), textcoords="axes fraction", va="center", fontsize=7,
            color=as_text(colour), arrowprops={**arrow, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def sweeps(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The timed rows of each parameter that was swept: the runs that differ in nothing else.

    What runs are compared with is the setting from which most others differ in one parameter of
    `_SWEPT` alone, usually the default. A run that differs in two of them, or in another parameter
    such as the rounds, belongs to no sweep.
    """
    rows = _timed(rows).assign(other="")
    if "stem" in rows:  # the rest of a variant's name: what differs beside the swept ones
        swept = "|".join(_SWEPT)
        variant = rows["stem"].astype(str).str.partition("-")[2].radd("-")
        rows["other"] = variant.str.replace(rf"-({swept})=[^-]*", "", regex=True).str.strip("-")
    keys = [*_SWEPT, "dtype", "other"]
    # Two runs of one setting, which no column tells apart, are not to be pooled.
    rows = rows.drop_duplicates([*keys, "run", "round", "method"], keep="last")
    settings = list(dict.fromkeys(zip(*(rows[key] for key in keys), strict=True)))

    def differ(one: tuple, other: tuple) -> list[str]:
        return [key for key, a, b in zip(keys, one, other, strict=True) if a != b]

    def neighbours(centre: tuple) -> int:
        return sum(len(differ(centre, other)) == 1 for other in settings)

    # The default is the last of its folder's files by name, so among equals the last one counts.
    centre = max(reversed(settings), key=neighbours)
    panels = {}
    for name in _SWEPT:
        own = [one for one in settings if differ(centre, one) in ([], [name])]
        if len(own) > 1:
            of_these = rows[keys].apply(tuple, axis=1).isin(own)
            panels[name] = rows[of_these]
    return panels


def _timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a time of the host's clock, without the cost of a call alone."""
    return rows[(rows["clock"] == "host") & (rows["state"] == "timed") & (rows["method"] != FLOOR)]


def _points(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Median and quartiles in milliseconds, of each method at each value of a parameter."""
    ms = rows["seconds"].astype(float).mul(1e3).groupby([rows["method"], rows[name]], sort=False)
    points = pd.DataFrame(
        {"median": ms.median(), "q25": ms.quantile(0.25), "q75": ms.quantile(0.75)}
    )
    order = {method: place for place, method in enumerate(rows["method"].unique())}
    points = points.reset_index()
    place = points["method"].map(order).rename("place")
    return points.assign(place=place).sort_values(["place", name]).drop(columns="place")


def caption_sweep(rows: pd.DataFrame) -> str:
    """What the lines of `sweep` are."""
    panels = sweeps(rows)
    if not panels:
        return f"{_NO_SWEEP} {describe_rows(rows)}."
    said = [
        f"against {name} ({', '.join(f'{value:,}' for value in sorted(own[name].unique()))}; "
        f"{describe_rows(own)})"
        for name, own in panels.items()
    ]
    return (
        f"Median time per call of each form {listed(said)}. Runs that differ in one parameter "
        f"alone make a line; whiskers are the quartiles of the blocks, which may be smaller than "
        f"the mark. PyTorch {rows['torch'].iloc[0]}."
    )


def words_of_sweep(rows: pd.DataFrame) -> str:
    """What `sweep` shows, in words: the times of each method at each value."""
    panels = sweeps(rows)
    if not panels:
        return f"An empty chart. {_NO_SWEEP}"
    said = []
    for name, own in panels.items():
        for method, line in _points(own, name).groupby("method", sort=False):
            if not is_control(method):
                times = [
                    f"{format_figures(one['median'])} ms at {one[name]:,}"
                    for one in line.to_dict("records")
                ]
                said.append(f"{method} against {name}: {', '.join(times)}")
    return f"Chart, one line per form of the time per call. {'; '.join(said)}."


def finding_sweep(rows: pd.DataFrame) -> str:
    """How many times as long each form takes at the largest value as at the smallest."""
    said = []
    for name, own in sweeps(rows).items():
        low, high = own[name].min(), own[name].max()
        grown = []
        for method, line in _points(own, name).groupby("method", sort=False):
            if is_control(method) or len(line) < 2:
                continue
            first, last = line.iloc[0], line.iloc[-1]
            told = first["q75"] < last["q25"] or last["q75"] < first["q25"]
            times = f"{format_figures(last['median'] / first['median'])} times"
            grown.append(f"{method} to {times}" if told else f"{method} by nothing told apart")
        if grown:
            said.append(
                f"from {name} {low:,} to {high:,}, {format_figures(high / low)} times as much, "
                f"the times change: {listed(grown)}"
            )
    if not said:
        return _NO_SWEEP
    text = "; ".join(said)
    return f"{sentence(text)}."


def _mark(axes, x: float, y: float, mark: str, colour: str, wrong: bool, **options) -> None:
    """A mark; a hollow one where the numbers are wrong."""
    face = "white" if wrong else colour
    axes.plot([x], [y], mark, color=colour, markersize=4, markerfacecolor=face, **options)


def _write_on_line(axes, place: float, left: str, right: str) -> None:
    """A line's name at its left and a value at its right, above the marks."""
    style = {"transform": axes.get_yaxis_transform(), "va": "center", "color": INK}
    axes.text(0.0, place - 0.33, left, ha="left", fontsize=7.5, **style)
    axes.text(1.0, place - 0.33, right, ha="right", fontsize=7, **style)
