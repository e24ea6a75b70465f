"""Figures and the page of an attribution show the numbers of their tables, for any text, and break on none."""

import re
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from interp import attribution_plots as plots
from interp.ablation import EraseCurve
from interp.attribution import WriteAttribution, block_groups, pooled_write_map, write_read_matrix
from interp.attribution_data import AttributedText, attributed_text, lag_histogram
from interp.attribution_page import render_attribution, write_attribution_page
from interp.pooled_maps import PooledWriteMap
from interp.records import record_writes
from interp.state import follow_state
from tests.interp.strong_models import random_ids, strong_model

ODD = ("$x_1$", "\n\n", "\u4e2d\u6587", "<script>alert(1)</script>", "\u202e", "a&b", "\ufffd", " word")


def text_of(length, odd=ODD):
    values = np.random.default_rng(0).normal(size=(length, 2)) * 0.1
    values[3] = [2.0, 1.0]
    tokens = tuple(odd[i % len(odd)] for i in range(length))
    return AttributedText(tokens, (0, 2), values, length - 1, "logit of '$7' less <others>", 3.25, (3,))


@pytest.fixture(scope="module")
def model():
    return strong_model("linear")


@pytest.fixture(scope="module")
def records(model):
    return record_writes(model, random_ids(1, 23))


def drawn(figure_axes):
    """The axes of a figure, drawn without a warning."""
    figure, ax = figure_axes
    pyplot = sys.modules.get("matplotlib.pyplot")  # Captum imports it
    assert isinstance(figure, Figure) and (pyplot is None or not pyplot.get_fignums())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig("/dev/null", format="png")
    return ax


def test_top_writes_show_every_token_and_name_the_largest():
    data = text_of(40)
    ax = drawn(plots.plot_top_writes(data))
    np.testing.assert_allclose(sum(steps.get_data().values for steps in ax.patches), data.contributions)
    assert any("<script>" in text.get_text() and "(3)" in text.get_text() for text in ax.texts)
    assert not any(text.get_parse_math() for text in ax.texts)


def test_long_texts_keep_their_extremes_in_few_bars():
    data = text_of(32768)
    data.by_layer[20000] = -5.0
    ax = drawn(plots.plot_top_writes(data))
    raises, lowers = (steps.get_data().values for steps in ax.patches)
    assert len(raises) == plots.MAX_CELLS
    assert raises.max() == pytest.approx(3.0) and lowers.min() == pytest.approx(-10.0)


def test_the_write_map_is_symmetric_about_zero(records):
    groups = block_groups(23, 4)
    data = pooled_write_map(records, 1, groups, read_groups=groups)
    ax = drawn(plots.plot_write_map(data, head=1))
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    np.testing.assert_allclose(mesh.get_array(), data.mean[0, 1].numpy(), rtol=1e-6)
    assert mesh.norm.vmin == -mesh.norm.vmax == pytest.approx(-float(data.mean[0, 1].abs().max()))
    lengths = pooled_write_map(records, 1, groups, mode="norm")
    assert next(c for c in drawn(plots.plot_write_map(lengths)).collections if isinstance(c, QuadMesh)).norm.vmin == 0


def test_reads_of_a_long_text_are_binned():
    values = torch.randn(1, 2, 32768, 3)
    data = PooledWriteMap(0, "signed", values, ODD[:3])
    ax = drawn(plots.plot_write_map(data))
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    assert mesh.get_array().shape == (plots.MAX_CELLS, 3)
    assert ax.get_ylim()[0] == pytest.approx(32767.5)


def test_erase_curves_show_the_band_of_random_orders():
    curve = EraseCurve("deletion", np.array([0, 0.5, 1]), np.array([4.0, 1, 0]), np.array([[4.0, 3, 0], [4, 2, 0]]))
    ax = drawn(plots.plot_erase_curve(curve))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [4, 1, 0])
    assert "area 1.5" in ax.get_legend().get_texts()[0].get_text() and len(ax.collections) == 1
    alone = EraseCurve("insertion", curve.fractions, curve.values[::-1], np.zeros((0, 3)))
    assert not drawn(plots.plot_erase_curve(alone)).collections


def test_the_state_over_time_is_that_of_the_trace(model):
    trace = follow_state(model, random_ids(1, 40), [8, 24, 40])
    np.testing.assert_allclose(
        drawn(plots.plot_drift(trace)).lines[1].get_ydata(), trace.drift[0, 1].square().sum(0).sqrt()
    )
    ax = drawn(plots.plot_spectra(trace, layer=1))
    np.testing.assert_allclose(ax.lines[2].get_ydata(), trace.singular_values[0][0, 1, :, 2].mean(0))
    assert len(drawn(plots.plot_ranks(trace)).lines) == 4
    with pytest.raises(ValueError, match=r"layer must be one of \[0, 1\], got 5"):
        plots.plot_spectra(trace, layer=5)


def test_a_frozen_layer_has_an_empty_spectrum(model):
    model.config.frozen_layers = [0]
    try:
        trace = follow_state(model, random_ids(1, 8), [8])
    finally:
        model.config.frozen_layers = None
    drawn(plots.plot_spectra(trace, layer=0))
    drawn(plots.plot_drift(trace))


def test_lags_are_counted_from_the_matrix(records):
    found = lag_histogram(records, 1, rows=range(23))
    sizes = write_read_matrix(records, 1).abs().sum((0, 1)).numpy()
    lag = np.subtract.outer(np.arange(23), np.arange(23))
    for low, high, mass, pairs in zip(found.low, found.high, found.mass, found.pairs, strict=True):
        inside = (lag >= low) & (lag <= high)
        assert mass == pytest.approx(sizes[inside].sum()) and pairs == 2 * inside.sum()
    assert found.low.tolist() == [0, 1, 2, 4, 8, 16] and found.to_pandas()["share"].sum() == pytest.approx(1)
    ax = drawn(plots.plot_lags(found))
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], 100 * found.to_pandas()["share"])


def test_labels_are_one_line_of_what_the_font_has():
    assert plots.token_label("a\n\tb") == "a\u23ce\u21e5b"
    assert plots.token_label("\u4e2d") == "\u27e8U+4E2D\u27e9"
    assert len(plots.token_label("x" * 99)) == 18


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_escapes_the_text_and_holds_no_script(tmp_path):
    data = text_of(16)
    page = write_attribution_page(data, tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = _Page()
    parsed.feed(page)
    names = {tag for tag, _ in parsed.tags}
    assert "script" not in names and "img" not in names and not any("style" in attrs for _, attrs in parsed.tags)
    assert "default-src 'none'" in page and not re.search(r"https?:", page)
    assert "<script>alert(1)</script>" in "".join(parsed.text) and "\u202e" not in page
    spans = [attrs for tag, attrs in parsed.tags if tag == "span" and "title" in attrs]
    assert len(spans) == 16 and spans[3]["class"] == "r9 m" and spans[3]["title"] == "3: +3"
    assert "q" in spans[15]["class"]


def test_a_page_of_nothing_learnt_is_a_page():
    data = AttributedText(("a", "b"), (0,), np.zeros((2, 1)), 1, "logit", 0.0)
    assert "<span title" in render_attribution(data)
    drawn(plots.plot_top_writes(data))


def test_texts_go_with_their_attribution():
    writes = torch.randn(2, 3, 4, 5)
    found = WriteAttribution(writes, {}, torch.tensor([1.0, 2.0]), (0, 1, 3), torch.tensor([3, 4]), None)
    data = attributed_text(found, list("abcde"), "logit", row=1, marked=[2])
    np.testing.assert_allclose(data.contributions, writes[1].sum((0, 1)).numpy(), rtol=1e-5)
    table = data.to_pandas()
    assert list(table) == ["column", "token", "contribution", "layer_0", "layer_1", "layer_3", "marked"]
    assert table["marked"].tolist() == [False, False, True, False, False] and data.position == 4
    assert data.top(1)["column"].item() == abs(data.contributions).argmax()
    with pytest.raises(ValueError, match="tokens must hold the 5 texts"):
        attributed_text(found, ["a"], "logit")
    with pytest.raises(ValueError, match="marked must be columns"):
        attributed_text(found, list("abcde"), "logit", marked=[5])


def test_labels_of_neighbouring_writes_do_not_meet():
    values = np.zeros((1024, 1))
    for column, value in ((260, 1.08), (261, 0.323), (188, 0.055), (222, 0.0496), (28, 0.047), (760, 0.0435)):
        values[column] = value
    values[258], values[268] = -0.0468, 0.0425
    data = AttributedText(("x",) * 1024, (0,), values, 1019, "logit", 10.1)
    figure, ax = plots.plot_top_writes(data)
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the arrows
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_heads_and_maps_that_are_not_there_are_refused(model):
    records = record_writes(model, random_ids(1, 9), heads=[1])
    data = pooled_write_map(records, 0, block_groups(9, 2))
    assert "head 1" in plots.plot_write_map(data, head=1)[1].get_title(loc="left")
    with pytest.raises(ValueError, match=r"head must be one of \[1\], got 0"):
        plots.plot_write_map(data, head=0)
    trace = follow_state(model, random_ids(1, 9), [9])
    for plot in (plots.plot_spectra, plots.plot_ranks):
        with pytest.raises(ValueError, match=r"inner_map must be in \[1, 1\], got 0"):
            plot(trace, inner_map=0)
