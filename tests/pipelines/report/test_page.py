"""The report: an HTML page that states the prediction's values, and works in a browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bragg_data.campaign import BUILT_IN, Campaign
from bragg_data.measurement.load import Measurement, load_measurements
from bragg_data.measurement.resampling import GriddedProfile
from bragg_data.refinement.linear_fit import (
    explained_fraction,
    fit_scale_and_background,
    reflection_positions,
    simulator_of,
)
from bragg_models.predictors import Prediction, Predictor
from catalog.tracking import Tracking
from pipelines import predict
from pipelines.cli.options import OutputError
from pipelines.cli.style import SYSTEM_COLORS
from pipelines.prediction.interface import load_model
from pipelines.prediction.workflow import LoadedModel, PredictedProfile, predict_measurements
from pipelines.report.charts import fixed, miller, probability, space_group
from pipelines.report.environment import both_shades
from pipelines.report.fits import candidate_fits, find_misfits, runner_up
from pipelines.report.page import WELL, collect_evidence, render_report

torch.set_num_threads(1)

CALIBRATION = BUILT_IN / "nomad_bank4.instprm"
URI = "models:/small/1"
CELL = np.array([3.9531, 3.9531, 4.0612, 90.0, 90.0, 90.0])  # tetragonal, off the grid
TETRAGONAL = 1
TITLE = "Ba <script>document.title='stolen'</script> & \"titanate\" </title>"
VOID = {"meta", "input", "br", "link", "img"}
SECTIONS = (
    "Evidence for and against",
    "Measured and calculated",
    "Misfits",
    "The prediction and the library",
    "How the data were prepared",
    "The file",
    "The model and its data",
)


class Page(HTMLParser):
    """Elements of a page with their attributes, texts by element; refuses bad nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]

    def text(self, *tags: str) -> str:
        """The text of some elements, by default all that is visible."""
        texts = (d for t, d in self.texts if (t in tags if tags else t not in ("script", "style")))
        return " ".join("".join(texts).split())


@pytest.fixture(scope="module")
def tracking(trained: Tracking) -> Tracking:
    return trained


@pytest.fixture(scope="module")
def model(tracking: Tracking) -> LoadedModel:
    return load_model(tracking=tracking.uri)


@pytest.fixture(scope="module")
def predictor(model: LoadedModel) -> Predictor:
    return model.predictor


@pytest.fixture(scope="module")
def file(small_campaign: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counts of a tetragonal cell and a foreign peak, in a file with a malicious title."""
    path = tmp_path_factory.mktemp("measured") / "a & <b>bold sample.xye"
    tof = small_campaign.grid.tof
    pattern = simulator_of(small_campaign).simulate(np.array([TETRAGONAL]), CELL[None])[0]
    expected = 4000 * pattern / pattern.max() + 400 + foreign_peak(tof)
    counts = np.random.default_rng(5).poisson(expected)
    np.savetxt(
        path,
        np.stack([tof, counts, np.sqrt(counts)], axis=1),
        header=f"title: {TITLE}\noperator: A. <i>Person</i>\ntof y sigma",
        encoding="utf-8",
    )
    return path


PLACE = 14600.0
"""µs; between the last two reflections of the tetragonal cell on the small grid."""


def foreign_peak(tof: np.ndarray, height: float = 800.0) -> np.ndarray:
    return height * np.exp(-(((tof - PLACE) / 60.0) ** 2) / 2)


@pytest.fixture(scope="module")
def measurement(file: Path, predictor: Predictor) -> Measurement:
    (measurement,) = load_measurements(file, predictor.campaign, CALIBRATION)
    return measurement


@pytest.fixture(scope="module")
def profile(measurement: Measurement, model: LoadedModel) -> PredictedProfile:
    """A prediction of a good model, with matches of the real library."""
    (predicted,) = predict_measurements([measurement], model)
    good = Prediction(np.array([[0.021, 0.9712, 0.0078]]), np.array([TETRAGONAL]), CELL[None])
    return replace(predicted, prediction=good)


@pytest.fixture(scope="module")
def text(profile: PredictedProfile, predictor: Predictor) -> str:
    return render_report([profile], predictor)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_sections_and_numbers_are_there(
    page: Page, profile: PredictedProfile, predictor: Predictor
) -> None:
    assert [h.strip() for t, h in page.texts if t == "h2"] == list(SECTIONS)
    seen = page.text()
    assert page.text("h1") == "tetragonal"
    for number in ("3.9531\u202fÅ", "4.0612\u202fÅ", "0.971", "0.021", "0.008", "63.464\u202fÅ³"):
        assert number.replace("\u202f", " ") in seen, number
    fit = fit_scale_and_background(
        profile.measurement.gridded,
        simulator_of(predictor.campaign).simulate(np.array([TETRAGONAL]), CELL[None])[0],
    )
    assert f"{100 * fit.rwp:.1f} %" in seen
    library = profile.result().library_match
    assert library is not None
    for candidate in library.candidates:
        assert f"{candidate.cell.a:.4f} Å" in seen
        assert f"{candidate.correlation:.4f}" in seen
    data = predictor.provenance.data
    provenance = predictor.provenance
    facts = (URI, data.tag, data.snapshot_id, provenance.code_commit, provenance.trained_at)
    for fact in (*facts, "difC 9 496.17"):
        assert fact in seen, fact
    assert "A. <i>Person</i>" in seen
    for warning in profile.measurement.warnings:
        assert warning in seen


def test_the_correlations_are_those_of_the_library_match(profile: PredictedProfile) -> None:
    fits = candidate_fits(profile)
    assert [f.source for f in fits] == ["model", "library", "library", "library"]
    assert profile.matches is not None
    for fit in fits[1:]:
        assert fit.correlation == pytest.approx(profile.matches.correlation[0, fit.code], abs=1e-4)


def test_nothing_is_loaded_from_anywhere(page: Page, text: str) -> None:
    addresses = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}
    for tag, attributes in page.elements:
        for key in addresses & attributes.keys():
            assert attributes[key].startswith("#"), (tag, attributes)
    assert not re.search(r"url\(|@import", page.text("style"))
    assert not re.search(r"https?:|fetch|XMLHttp|import\b", page.text("script"))
    assert not page.of("link") + page.of("img") + page.of("iframe")
    (policy,) = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none';")
    assert len(text) < 600_000


def test_what_comes_from_a_file_is_text(page: Page, text: str) -> None:
    assert TITLE in page.text()
    assert "a & <b>bold sample.xye" in page.text()
    assert len(page.of("script")) == 2  # the data of the chart, and the page's script
    assert text.count("</title>") == 1
    (numbers,) = (d for t, d in page.texts if t == "script" and d.lstrip().startswith("{"))
    assert json.loads(numbers)["fits"]


def test_the_chart_works_without_scripts(page: Page, predictor: Predictor) -> None:
    paths = {a.get("class", ""): a["d"] for a in page.of("path")}
    points = predictor.campaign.grid.points
    assert paths["measured"].count("M") == points
    assert paths["calculated"].count("L") == points - 1
    for name in ("background", "difference", "reflections", "baseline", "profile", "clipped"):
        assert re.match(r"M[\d.]+ ", paths[name]), name
    assert not re.search("nan|inf", " ".join(paths.values()))
    assert len(page.of("svg")) == 4


def test_a_foreign_peak_is_a_misfit(
    profile: PredictedProfile, predictor: Predictor, page: Page
) -> None:
    campaign = predictor.campaign
    fit = candidate_fits(profile)[0]
    gridded = profile.measurement.gridded
    places = find_misfits(fit, gridded, campaign)
    assert places[0].tof == pytest.approx(PLACE, abs=40)
    assert places[0].d == pytest.approx(
        float(campaign.instrument.d_spacing_from_tof(np.array(places[0].tof))), rel=1e-9
    )
    assert (places[0].kind, places[0].hkl) == ("excess", ())
    assert places[0].sigmas > 20
    assert "none" in page.text("b")
    # Where an intensity is twice what was calculated, the cell has a reflection.
    at, hkl = reflection_positions(fit.phase, fit.cell, campaign)
    place = at[-2]
    assert fit.pattern_fit is not None
    bump = foreign_peak(campaign.grid.tof + PLACE - place)
    changed = replace(fit.pattern_fit, difference=fit.pattern_fit.difference + bump)
    changed_places = find_misfits(replace(fit, pattern_fit=changed), gridded, campaign)
    near = min(changed_places, key=lambda misfit: abs(misfit.tof - place))
    assert tuple(hkl[-2]) in near.hkl
    assert near.kind == "excess"
    assert near.share is not None
    assert near.share > 0


def test_noise_alone_has_no_misfits_and_a_moved_peak_is_displaced(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    campaign = predictor.campaign
    fit = candidate_fits(profile)[0]
    assert fit.pattern_fit is not None
    gridded = profile.measurement.gridded
    noise = np.random.default_rng(1).normal(size=campaign.grid.points) * gridded.sigma
    drift = 300 * np.linspace(-1, 1, campaign.grid.points)
    quiet = replace(fit.pattern_fit, difference=noise + drift)
    assert find_misfits(replace(fit, pattern_fit=quiet), gridded, campaign) == []
    moved = foreign_peak(campaign.grid.tof) - foreign_peak(campaign.grid.tof + 150)
    places = find_misfits(
        replace(fit, pattern_fit=replace(quiet, difference=noise + moved)), gridded, campaign
    )
    assert [place.kind for place in places] == ["displaced"]


def test_the_runner_up_is_the_second_most_probable_system(profile: PredictedProfile) -> None:
    fits = candidate_fits(profile)
    second = runner_up(profile, fits)
    assert second is not None
    assert second.phase.crystal_system.name == "cubic"  # 0.021 against 0.0078
    certain = replace(
        profile, prediction=Prediction(np.array([[0.0, 1.0, 0.0]]), np.array([1]), CELL[None])
    )
    second = runner_up(certain, candidate_fits(certain))
    assert profile.matches is not None
    assert second is not None
    assert second.code == max((0, 2), key=lambda code: profile.matches.correlation[0, code])
    assert runner_up(profile, fits[:1]) is None


@pytest.mark.parametrize(
    ("changes", "statement"),
    [
        ({"matches": None}, "The library of stored patterns was not searched."),
        ({"cell": [np.nan] * 6}, "This model predicts the crystal system and no cell."),
        ({"cell": [4.0, 4.0, 4.0, 120.0, 120.0, 120.0]}, "cannot be fitted to the measurement"),
        ({"cell": [0.3, 0.3, 0.3, 90.0, 90.0, 90.0]}, "cannot be fitted to the measurement"),
        ({"cell": [5.0, 5.0, 5.1, 90.0, 90.0, 90.0]}, "Outside the training ranges"),
        ({"cell": [np.nan] * 6, "matches": None}, "No pattern could be calculated"),
        ({"calibration": None}, "the file's times were taken as those of the model's instrument"),
        ({"nominal": True}, "header's nominal calibration"),
    ],
)
def test_what_cannot_be_shown_is_stated(
    profile: PredictedProfile, predictor: Predictor, changes: dict, statement: str
) -> None:
    measurement, prediction = profile.measurement, profile.prediction
    if "cell" in changes:
        prediction = replace(prediction, cells=np.array([changes["cell"]]))
    of_measurement = {k: v for k, v in changes.items() if k in ("calibration", "nominal")}
    changed = replace(
        profile,
        prediction=prediction,
        measurement=replace(measurement, **of_measurement),
        matches=None if "matches" in changes else profile.matches,
    )
    page = Page(render_report([changed], predictor))
    assert statement in page.text()
    assert not re.search(r"\bnan\b", page.text())


def test_a_model_is_not_confident_of_what_it_does_not_determine(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    def evidence_of(half_width: float) -> tuple[PredictedProfile, dict]:
        intervals = np.full((1, 6, 2), np.nan)
        for column in (0, 2):
            intervals[0, column] = CELL[column] + np.array([-half_width, half_width])
        prediction = replace(
            profile.prediction,
            intervals=intervals,
            accepted=np.array([True]),
            unexplained=np.array([0.01]),
            limit=0.15,
        )
        changed = replace(profile, prediction=prediction)
        fits = candidate_fits(changed)
        return changed, collect_evidence(changed, fits, [])

    assert evidence_of(0.001)[1]["confident"]
    changed, evidence = evidence_of(90_013.0)
    assert not evidence["confident"]
    assert changed.result().intervals == {"a": None, "c": None}
    page = Page(render_report([changed], predictor))
    assert "90 % intervals: a not determined, c not determined" in page.text()
    assert "The model is confident" not in page.text()


def test_points_that_were_not_measured_are_gaps(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    gridded = profile.measurement.gridded
    covered = gridded.covered.copy()
    covered[100:180] = covered[-60:] = False
    cut = replace(
        gridded,
        covered=covered,
        intensity=np.where(covered, gridded.intensity, 0.0),
        sigma=np.where(covered, gridded.sigma, 0.0),
    )
    measurement = replace(profile.measurement, gridded=cut)
    page = Page(render_report([replace(profile, measurement=measurement)], predictor))
    assert len(page.of("rect", **{"class": "gap"})) == 2
    assert "140 that were not measured are 0" in page.text()


def test_of_many_predictions_twenty_are_on_a_page(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    alone = replace(profile, matches=None)
    page = Page(render_report([alone] * 21, predictor))
    assert [a["id"] for a in page.of("article")] == [f"prediction-{k}" for k in range(1, 21)]
    assert "This page shows the first 20 of 21 predictions." in page.text()
    assert {a["href"] for a in page.of("a")} == {f"#prediction-{k}" for k in range(1, 21)}
    assert (
        "the first 1 of 300 predictions"
        in Page(render_report([alone], predictor, total=300)).text()
    )


def test_predict_writes_it(tracking: Tracking, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    arguments = [str(file), "--report", str(target), "--json", "--tracking", tracking.uri]
    result = CliRunner().invoke(predict.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    (values,) = json.loads(result.stdout)
    page = Page(target.read_text(encoding="utf-8"))
    assert page.text("h1") == values["crystal_system"]
    assert values["warnings"][0] in page.text()
    arguments[2] = str(tmp_path / "no" / "out.html")
    with pytest.raises(OutputError, match="directory that exists"):
        CliRunner().invoke(predict.app, arguments, catch_exceptions=False)


def test_numbers_are_written_as_in_print() -> None:
    assert fixed(-12345.678, 1) == "−12\u202f345.7"
    assert fixed(0.5, 2, sign=True) == "+0.50"
    written = [probability(p) for p in (1.0, 0.9712, 1e-9)]
    assert written == [">\u202f0.999", "0.971", "<\u202f0.001"]
    assert miller((1, -2, 0)) == "1\u20092\u0305\u20090"
    assert miller((-11, 1, 0)) == "1\u03051\u0305\u20091\u20090"
    assert space_group("P m -3 m") == '<i>P</i><i>m</i><span class="bar">3</span><i>m</i>'
    assert space_group("R 3 m:R") == "<i>R</i>3<i>m</i>"
    assert space_group("P 42/m n m") == "<i>P</i>4<sub>2</sub>/<i>m</i><i>n</i><i>m</i>"


def test_dark_colors_stand_out() -> None:
    def luminance(color: str) -> float:
        part = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    paper = luminance("#121519")
    for color in SYSTEM_COLORS.values():
        light = luminance(both_shades(color)[1])
        assert (light + 0.05) / (paper + 0.05) > 4.5  # WCAG's bar for text


def test_a_good_fit_has_reflections_and_explains_the_signal(
    profile: PredictedProfile, predictor: Predictor
) -> None:
    campaign = predictor.campaign
    fit = candidate_fits(profile)[0]
    assert len(fit.tof) == len(fit.hkl) > 3
    assert (np.diff(fit.tof) >= 0).all()
    pattern = simulator_of(campaign).simulate(np.array([TETRAGONAL]), CELL[None])[0]
    points = campaign.grid.points
    rng = np.random.default_rng(2)
    for height in (60.0, 20000.0):  # not much above the noise, and far above it
        sigma = np.full(points, 10.0)
        y = height * pattern / pattern.max() + 50 + sigma * rng.normal(size=points)
        gridded = GriddedProfile(y, sigma, np.ones(points, dtype=bool))
        assert explained_fraction(fit_scale_and_background(gridded, pattern)) > WELL
        assert explained_fraction(fit_scale_and_background(gridded, pattern[::-1])) < 0.3


# ---- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    programs = map(shutil.which, ("chromium", "chromium-browser", "chrome"))
    program = next(filter(None, programs), None)
    if program is None:
        pytest.skip("Chromium is not installed: the report's script is not tested.")
    return program


OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-logging=stderr",
    "--hide-scrollbars",
    "--window-size=1280,900",
    "--virtual-time-budget=3000",
)


def dumped(browser: str, path: Path, directory: Path) -> Page:
    """The page as it is when its scripts have run, which must not complain."""
    done = subprocess.run(
        [browser, *OPTIONS, f"--user-data-dir={directory}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return Page(done.stdout)


@pytest.mark.slow
def test_the_page_runs_as_a_file(browser: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    page = dumped(browser, path, tmp_path / "profile")
    (root,) = page.of("html")
    assert root["data-ready"] == "1"
    assert "data-error" not in root
    assert root["data-scroll-width"] == root["data-width"]
    assert "hidden" not in page.of("div", **{"class": "tools"})[0]
    # The malicious title ran nothing.
    assert page.text("title").startswith("a & <b>bold")


STEPS = """
const of = (name) => document.getElementById(name).contentDocument;
const all = () => {
  const results = {};
  for (const name of ["phone", "laptop"]) {
    const page = of(name), root = page.documentElement, tick = () =>
      page.querySelector("svg.plot").textContent;
    const press = (act) => page.querySelector(`[data-act=${act}]`).click();
    const whole = tick();
    press("in"); const nearer = tick();
    press("left"); press("right"); press("out"); press("all");
    const back = tick() === whole;
    press("root"); const bent = tick();
    press("root");
    page.querySelector(".go").click();
    const place = page.querySelectorAll("svg.plot .place").length;
    press("all");
    const svg = page.querySelector("svg.plot"), box = svg.getBoundingClientRect();
    const at = (kind, share) => svg.dispatchEvent(new PointerEvent(kind,
      {clientX: box.left + share * box.width, clientY: box.top + box.height / 2, pointerId: 1}));
    at("pointermove", 0.5);
    const values = page.querySelector(".readout").textContent;
    svg.setPointerCapture = () => {};
    at("pointerdown", 0.4); at("pointermove", 0.5);
    const selection = page.querySelectorAll(".selection").length;
    at("pointerup", 0.5);
    const dragged = tick() !== whole;
    svg.dispatchEvent(new MouseEvent("dblclick"));
    const restored = tick() === whole;
    const calculated = () => page.querySelector(".calculated[d]").getAttribute("d");
    const before = calculated();
    page.querySelectorAll("input[type=radio]")[2].click();
    const wide = [...page.querySelectorAll("body *")].filter((e) =>
      e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest("svg")).length;
    results[name] = {width: root.clientWidth, scroll: root.scrollWidth, error: root.dataset.error,
      ready: root.dataset.ready, zoomed: nearer !== whole, back, bent: bent !== whole, place,
      values, selection, dragged, restored, switched: calculated() !== before, wide,
      system: svg.getAttribute("class")};
  }
  document.body.dataset.results = JSON.stringify(results);
};
window.addEventListener("load", all);
"""


@pytest.mark.slow
def test_the_chart_can_be_zoomed_and_nothing_is_too_wide(
    browser: str, text: str, tmp_path: Path
) -> None:
    frames = "".join(
        f'<iframe id="{name}" style="width: {width}px; height: 900px; border: 0" '
        f'srcdoc="{html.escape(text)}"></iframe>'
        for name, width in (("phone", 390), ("laptop", 1280))
    )
    path = tmp_path / "frames.html"
    # Without the character set the browser guesses it, and the script's hash may not match.
    head = '<!DOCTYPE html><meta charset="utf-8">'
    path.write_text(f"{head}<body>{frames}<script>{STEPS}</script></body>", "utf-8")
    (body,) = dumped(browser, path, tmp_path / "profile").of("body")
    results = json.loads(body["data-results"])
    for name, width in (("phone", 390), ("laptop", 1280)):
        result = results[name]
        assert result["ready"] == "1"
        assert "error" not in result
        assert result["width"] == result["scroll"] == width
        assert result["wide"] == 0
        for done in ("zoomed", "back", "bent", "dragged", "restored", "switched"):
            assert result[done] is True, done
        assert result["place"] >= 1
        assert result["selection"] == 1
        assert re.match(
            r"[\d\u202f.]+\u202fµs  ·  d \d\.\d{4}\u202fÅ  ·  measured ", result["values"]
        )
        assert "of-" in result["system"]
