"""Figures show the numbers of their tables."""

import dataclasses
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from interp import plots
from interp.captions import bucket_caption, heatmap_caption, perplexity_caption, surprisal_caption
from interp.statistics import POOLED, Bootstrap
from interp.tables import ALL_TOKENS, UNFROZEN, bucket_tables, run_tables, time_tables
from tests.interp.planted_run import planted_run

FUNCTIONS = {
    "time": (plots.plot_plasticity_heatmap, heatmap_caption),
    "surprisal": (plots.plot_surprisal, surprisal_caption),
    "buckets": (plots.plot_buckets, bucket_caption),
    "perplexity": (plots.plot_perplexity, perplexity_caption),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    run = planted_run(
        tmp_path_factory.mktemp("run"),
        layers=3,
        silent_layers=[2],
        bucket_factor=(1, 1.2, 1.5, 0.8),
        surprisal_power=0.3,
        freezing=[{"name": "cost_$x$_1", "layers": [0]}, {"name": "all", "layers": [0, 1, 2]}],
    )
    return run_tables(run, boot=Bootstrap(n_boot=100))


def mesh_of(ax):
    return next(artist for artist in ax.collections if isinstance(artist, QuadMesh))


def test_heat_map_cells_are_the_table_and_silent_layers_are_grey(tables):
    _, ax = plots.plot_plasticity_heatmap(tables.time)
    mesh = mesh_of(ax)
    values = np.ma.masked_invalid(mesh.get_array()).reshape(3, -1)
    wanted = tables.time.plasticity.pivot(index="layer", columns="start", values="plasticity").to_numpy()
    np.testing.assert_allclose(values[:2].filled(np.nan), wanted[:2])
    assert values.mask[2].all() and not values.mask[:2].any()
    assert matplotlib.colors.to_hex(mesh.cmap.get_bad()) == plots.BAD_COLOUR
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "1", "2"]


def test_a_burst_does_not_stretch_the_colours(tmp_path):
    data = time_tables(planted_run(tmp_path, documents=1, tokens=3200, layers=1), boot=Bootstrap(n_boot=80))
    first = data.plasticity["start"] == 0
    data.plasticity.loc[first, "plasticity"] *= 1e6
    _, ax = plots.plot_plasticity_heatmap(data)
    assert mesh_of(ax).norm.vmax < 1e3 and mesh_of(ax).colorbar.extend == "both"


def test_surprisal_cells_and_trend_are_the_table(tables):
    _, ax = plots.plot_surprisal(tables.surprisal)
    assert np.ma.sum(mesh_of(ax).get_array()) == tables.surprisal.histogram["tokens"].sum()
    trend = ax.lines[0].get_xydata()
    np.testing.assert_allclose(trend, tables.surprisal.trend[["surprisal", "plasticity"]])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "surprisal of token t (nats)"


def test_a_lag_is_on_the_axis_and_in_the_title(tables):
    lagged = dataclasses.replace(tables.surprisal, lag=1)
    _, ax = plots.plot_surprisal(lagged)
    assert ax.get_xlabel() == "surprisal of token t-1 (nats)" and "lag 1" in ax.get_title(loc="left")


@pytest.mark.parametrize("value", ["ratio", "mean", "median"])
def test_bucket_points_and_bars_are_the_table(tables, value):
    _, ax = plots.plot_buckets(tables.buckets, value=value)
    means = tables.buckets.means[tables.buckets.means["tokens"] == ALL_TOKENS]
    novelty = means[means["bucket"] == "NOVELTY"].set_index("layer")
    container = next(c for c in ax.containers if c.get_label().startswith("NOVELTY"))
    points, _, (bars,) = container
    wanted = novelty.loc[[POOLED, 0, 1, 2]]
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), wanted[value])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()[:3]])
    np.testing.assert_allclose(ends, wanted[[f"{value}_low", f"{value}_high"]].to_numpy()[:3], rtol=1e-9)


def test_hollow_markers_are_the_ratios_at_like_positions(tables):
    _, ax = plots.plot_buckets(tables.buckets)
    hollow = [c for c in ax.containers if c[0].get_markerfacecolor() == "none"]
    assert len(hollow) == 3 and "hollow: like positions" in [t.get_text() for t in ax.get_legend().get_texts()]
    table = tables.buckets.contrasts
    rows = table[(table["tokens"] == ALL_TOKENS) & (table["bucket_a"] == "NOVELTY") & (table["bucket_b"] == "SYNTAX")]
    wanted = rows.set_index("layer").loc[[POOLED, 0, 1, 2]]
    points, _, (bars,) = next(c for c in hollow if c[0].get_color() == plots.BUCKET_STYLES["NOVELTY"][0])
    np.testing.assert_allclose(np.asarray(points.get_ydata(), float), wanted["adjusted"])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()[:3]])
    np.testing.assert_allclose(ends, wanted[["adjusted_low", "adjusted_high"]].to_numpy()[:3], rtol=1e-9)
    assert not [
        c
        for c in plots.plot_buckets(tables.buckets, value="mean")[1].containers
        if c[0].get_markerfacecolor() == "none"
    ]


def test_without_syntax_buckets_are_drawn_relative_to_the_largest(tmp_path):
    run = planted_run(tmp_path, documents=2, tokens=200)
    run.tokens.loc[run.tokens["bucket"] == 0, "bucket"] = 2
    _, ax = plots.plot_buckets(bucket_tables(run, boot=Bootstrap(n_boot=80)))
    assert ax.get_ylabel() == "plasticity relative to NOVELTY"
    drawn = {
        c.get_label().split()[0]: np.asarray(c[0].get_ydata(), float)
        for c in ax.containers
        if c[0].get_markerfacecolor() != "none"
    }
    assert (drawn["NOVELTY"] == 1).all() and np.isfinite(drawn["RETRIEVAL"]).all() and np.isnan(drawn["SYNTAX"]).all()


def test_the_confidence_asked_for_is_on_the_figures(tmp_path):
    run = planted_run(tmp_path, documents=1, tokens=60)
    tables = run_tables(run, boot=Bootstrap(n_boot=80, confidence=0.9))
    for name in ("surprisal", "buckets", "perplexity"):
        _, ax = FUNCTIONS[name][0](getattr(tables, name))
        legend = ax.get_legend()
        words = " ".join([legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())])
        assert "90% interval" in words and "95%" not in words


def test_the_legend_of_the_surprisal_figure_covers_no_data(tables):
    figure, ax = plots.plot_surprisal(tables.surprisal)
    figure.draw_without_rendering()
    assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
    assert not ax.get_legend().get_window_extent().overlaps(ax.xaxis.label.get_window_extent())


def test_an_unknown_bucket_value_is_refused(tables):
    with pytest.raises(ValueError, match="value must be one of .* got 'sum'"):
        plots.plot_buckets(tables.buckets, value="sum")


def test_perplexity_has_two_lines_per_configuration(tables):
    _, ax = plots.plot_perplexity(tables.perplexity)
    curve = tables.perplexity.curve
    lines = {(round(line.get_linewidth(), 1), line.get_color()): line.get_ydata() for line in ax.lines}
    assert len(lines) == 6
    base = curve[curve["configuration"] == UNFROZEN]
    np.testing.assert_allclose(lines[2.2, plots.CONFIGURATION_COLOURS[0]], base["cumulative"])
    np.testing.assert_allclose(lines[0.9, plots.CONFIGURATION_COLOURS[0]], base["windowed"])


def test_names_with_dollars_are_drawn_as_they_are(tables, tmp_path):
    figure, ax = plots.plot_perplexity(tables.perplexity)
    texts = ax.get_legend().get_texts()
    assert any(text.get_text() == "cost_$x$_1 frozen" and not text.get_parse_math() for text in texts)
    ax.set_title("$\\broken{", loc="left")  # mathtext would fail on this when drawn
    plots.save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_figure_draws_into_axes_given_and_titles_itself_from_the_data(tables, name):
    function, caption = FUNCTIONS[name]
    mine = Figure()
    ax = mine.subplots()
    figure, same = function(getattr(tables, name), ax=ax)
    assert figure is mine and same is ax
    title = ax.get_title(loc="left").replace("\n", " ").replace("\u00a0", " ")
    assert title == caption(getattr(tables, name)).title


@pytest.mark.parametrize("name", FUNCTIONS)
def test_figures_leave_nothing_behind(tables, name):
    settings = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    first, _ = FUNCTIONS[name][0](getattr(tables, name))
    second, _ = FUNCTIONS[name][0](getattr(tables, name))
    assert first is not second and dict(matplotlib.rcParams) == settings
    if had_pyplot:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("options", [{"tokens": 2}, {"tokens": 40, "silent_layers": [0, 1]}])
def test_runs_of_any_size_can_be_drawn(tmp_path, options):
    run = planted_run(tmp_path / "run", documents=1, freezing=[], **options)
    tables = run_tables(run, boot=Bootstrap(n_boot=80))
    for name, (function, _) in FUNCTIONS.items():
        function(getattr(tables, name))[0].draw_without_rendering()


def test_many_layers_get_few_labels(tmp_path):
    run = planted_run(tmp_path, documents=1, tokens=40, layers=30, freezing=[])
    boot = Bootstrap(n_boot=80)
    for axis in (
        plots.plot_plasticity_heatmap(time_tables(run, boot=boot))[1].yaxis,
        plots.plot_buckets(bucket_tables(run, boot=boot))[1].xaxis,
    ):
        assert 10 < len(axis.get_ticklabels()) <= plots.MAX_LABELS
