"""The page on joint refinements: static, complete, and of the values of the result."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bragg_data.refinement.calibration_uncertainty import CalibrationKind
from bragg_data.refinement.joint_summary import unexplained
from pipelines.refinement.events import Event
from pipelines.refinement.frames import FrameResult
from pipelines.refinement.inputs import Sample
from pipelines.refinement.result import JointRefinement, joint_refinement
from pipelines.report.refinement import chart_of_bank, render_refinements, render_series
from tests.bragg_data.handover.refined import mixture


@pytest.fixture(scope="module")
def result() -> JointRefinement:
    fit = mixture()
    banks = tuple(bank.bank for bank in fit.banks)
    sample = Sample((Path("a <b>.gsa"),), banks, CalibrationKind.OTHER, ())
    return joint_refinement(sample, fit).with_fit(fit)


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def paths(svg: ET.Element, name: str) -> list[ET.Element]:
    return [e for e in svg.iter("path") if name in e.get("class", "").split()]


def test_a_page_has_all_banks_phases_and_sites(result):
    page = render_refinements([result])
    assert "a &lt;b&gt;.gsa" in page
    banks = charts(page)
    assert len(banks) == 2
    for svg in banks:
        assert len(paths(svg, "calculated")) == len(paths(svg, "difference")) == 1
        rows = paths(svg, "reflections")
        assert [row.get("class") for row in rows] == [
            "reflections of-phase1",
            "reflections of-phase2",
        ]
        ends = [re.findall(r"M[\d.]+ ([\d.]+)v([\d.]+)", row.get("d", ""))[0] for row in rows]
        assert float(ends[0][0]) + float(ends[0][1]) <= float(ends[1][0])  # below each other
    for phase in result.phases:
        assert phase.name in page
    for phase in result.fit.phases:
        for site in phase.sites:
            assert f'<td data-label="site">{site.label}</td>' in page
    assert f"{100 * result.rwp:.2f}" in page


def test_a_sample_without_phases_has_its_profiles():
    nothing = unexplained([bank.bank for bank in mixture().banks])
    sample = Sample((Path("foreign.gsa"),), (), CalibrationKind.OTHER, ())
    page = render_refinements([joint_refinement(sample, nothing).with_fit(nothing)])
    assert len(charts(page)) == 2
    assert "Not accepted" in page
    assert "<h2>Sites</h2>" not in page


def test_a_page_loads_nothing_and_runs_nothing(result):
    page = render_refinements([result])
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|url\(|https?://", page)


def test_reflections_are_where_the_refined_cell_has_them(result):
    bank = result.fit.banks[0]
    chart = chart_of_bank(bank, result.fit)
    x = chart["x"]
    a = float(result.fit.phases[0].cell[0])
    expected = float(x(bank.instrument.tof_from_d_spacing(a / 8**0.5 / 2)))  # 440
    ticks = [float(t) for t in re.findall(r"M([\d.]+)", chart["reflections"][0])]
    assert min(abs(t - expected) for t in ticks) < 0.1


def test_frames_are_listed_with_their_events(result):
    frames = [
        FrameResult(0, Path("f0.gsa"), 10.0, result),
        FrameResult(1, Path("f1.gsa"), 20.0, result),
        FrameResult(2, Path("f2.gsa"), 30.0, None, "f2.gsa cannot be read"),
    ]
    event = Event(2, "blank", "the frame <is> blank")
    page = render_series(frames, [event], "temperature")
    assert "the frame &lt;is&gt; blank" in page
    assert "f2.gsa cannot be read" in page
    trends = charts(page)
    labels = [svg.get("aria-label", "") for svg in trends]
    assert [label.removesuffix(" along the series") for label in labels] == [
        "silicon, a / Å",
        "srtio3, a / Å",
        "srtio3, c / Å",
        "wt %",
        "R_wp / %",
    ]
    for svg in trends:
        assert len(paths(svg, "cursor")) == 1  # of the event
    marks = paths(trends[0], "calculated")
    assert marks[0].get("d", "").count("a2 2") == 4  # two frames, a circle of two arcs each
