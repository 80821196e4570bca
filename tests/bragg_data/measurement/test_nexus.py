"""NeXus files: Mantid's processed workspaces and NXdata, read with the right numbers or refused."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bragg_data.campaign import Campaign, load_campaign
from bragg_data.measurement import readers
from bragg_data.measurement.load import load_measurements
from bragg_data.measurement.readers import ProfileError, Reading, read_nexus_apart, read_profiles
from bragg_data.measurement.readers.checks import checked_profile
from bragg_data.measurement.readers.nexus import read_nexus
from bragg_data.measurement.resampling import in_time_of_flight

N = 40
EDGES = 2000 * 1.01 ** np.arange(N + 1)  # to 2978 µs
WIDTHS = np.diff(EDGES)
CENTRES = EDGES[:-1] + WIDTHS / 2
COUNTS = np.stack([np.arange(1.0, N + 1), 2 * np.arange(1.0, N + 1)])  # of two banks
IDF = """<instrument name="GEM"><component type="moderator"><location z="-17" /></component>
<type name="moderator" is="Source"></type></instrument>"""
# Bank 1 of two detectors at 89° and 91°, bank 2 of one: L2 (m), 2θ and φ (degrees).
POSITIONS = np.array([[1.5, 89.0, 0.0], [2.5, 91.0, 180.0], [1.0, 120.0, 0.0]])


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process, except where `read_nexus_apart` itself is called."""
    monkeypatch.setattr(readers, "read_nexus_apart", read_nexus)


def mantid(path: Path, *, units: str = "TOF", x: np.ndarray = EDGES, **changes: object) -> Path:
    """Write a processed workspace of two spectra, as SaveNexusProcessed does."""
    with h5py.File(path, "w") as file:
        file.attrs["NX_class"] = "NXroot"
        entry = file.create_group("mantid_workspace_1")
        entry.attrs["NX_class"] = "NXentry"
        entry["title"] = [np.bytes_("silicon at 300 K")]
        group = entry.create_group("workspace")
        group.attrs["NX_class"] = "NXdata"
        group["values"] = changes.get("values", COUNTS)
        group["values"].attrs["signal"] = np.int32(1)
        group["values"].attrs["axes"] = np.bytes_("axis2,axis1")
        group["errors"] = changes.get("errors", np.sqrt(COUNTS))
        group["axis1"] = x
        group["axis1"].attrs["units"] = np.bytes_(units)
        group["axis1"].attrs["distribution"] = np.bytes_(str(changes.get("distribution", "0")))
        group["axis2"] = changes.get("numbers", np.array([1.0, 2.0]))
        group["axis2"].attrs["units"] = np.bytes_("spectraNumber")
        instrument = entry.create_group("instrument")
        instrument["name"] = [np.bytes_("GEM")]
        instrument["instrument_xml/data"] = [np.bytes_(changes.get("xml", IDF))]
        moved = str(changes.get("moved", "GEM/bank1;double;Efixed;1"))
        instrument["instrument_parameter_map/data"] = [np.bytes_(moved)]
        detector = instrument.create_group("detector")
        detector["spectra"] = np.array([1, 2], np.int32)
        detector["detector_index"] = np.array([0, 2, 3], np.int32)
        detector["detector_count"] = np.array([2, 1], np.int32)
        detector["detector_list"] = np.array([11, 12, 21], np.int32)
        detector["detector_positions"] = changes.get("positions", POSITIONS)
    return path


def edited(path: Path, edit: Callable[[h5py.Group], None]) -> Path:
    with h5py.File(mantid(path), "a") as file:
        edit(file["mantid_workspace_1"])
    return path


def test_spectra_of_a_workspace_are_banks(tmp_path: Path) -> None:
    profiles = read_profiles(mantid(tmp_path / "w.nxs"))
    assert [p.bank for p in profiles] == [1, 2]
    for profile, counts in zip(profiles, COUNTS, strict=True):
        np.testing.assert_allclose(profile.tof, CENTRES)  # all n bins of n + 1 edges
        np.testing.assert_allclose(profile.intensity, counts / WIDTHS)
        np.testing.assert_allclose(profile.sigma, np.sqrt(counts) / WIDTHS)
        assert (profile.unit, profile.title, profile.maybe_edges) == (
            "us",
            "silicon at 300 K",
            False,
        )
        assert profile.warnings == ()
    # 2θ and L2 are means; L = 17 + 2 m and 17 + 1 m; difC = 505.557 L sin θ.
    assert [p.two_theta for p in profiles] == [90, 120.0]
    assert profiles[0].difc == pytest.approx(505.557 * 19 * np.sqrt(0.5), rel=1e-9)
    assert profiles[1].difc == pytest.approx(505.557 * 18 * np.sqrt(0.75), rel=1e-9)
    assert profiles[0].header["instrument"] == "GEM"
    (second,) = read_profiles(tmp_path / "w.nxs", 2)
    np.testing.assert_array_equal(second.intensity, profiles[1].intensity)
    (apart,) = read_nexus_apart(tmp_path / "w.nxs", 2)
    np.testing.assert_array_equal(checked_profile(apart).intensity, second.intensity)
    for read in (read_profiles, read_nexus_apart):
        with pytest.raises(ProfileError, match=r"has no bank 3\. It holds banks 1, 2"):
            read(tmp_path / "w.nxs", 3)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    units=st.sampled_from(["TOF", "dSpacing", "MomentumTransfer"]),
    edges=st.booleans(),
    density=st.booleans(),
    per_spectrum=st.booleans(),
)
def test_axes_points_and_densities(
    tmp_path_factory: pytest.TempPathFactory,
    units: str,
    edges: bool,
    density: bool,
    per_spectrum: bool,
) -> None:
    """Counts become a density over d or time; a density stays as it is."""
    edges_of = {"TOF": EDGES, "dSpacing": EDGES / 5000, "MomentumTransfer": 2 * np.pi / EDGES[::-1]}
    x = edges_of[units]
    centres = x[:-1] + np.diff(x) / 2
    axis = x if edges else centres
    path = mantid(
        tmp_path_factory.mktemp("nexus") / "w.nxs",
        units=units,
        x=np.stack([axis, axis]) if per_spectrum else axis,
        distribution=int(density),
    )
    profile, _ = read_profiles(path)
    d = 2 * np.pi / centres[::-1] if units == "MomentumTransfer" else centres
    y = COUNTS[0][::-1] if units == "MomentumTransfer" else COUNTS[0]
    bins = 2 * np.pi / x[::-1] if units == "MomentumTransfer" else x
    np.testing.assert_allclose(profile.tof, d, rtol=1e-9)
    widths = np.diff(bins) if edges else np.gradient(d)
    np.testing.assert_allclose(profile.intensity, y if density else y / widths, rtol=1e-6)
    assert profile.unit == ("us" if units == "TOF" else "d")
    assert bool(profile.warnings) == (not density and not edges)


def test_d_becomes_time_of_flight_by_the_calibration(tmp_path: Path) -> None:
    path = mantid(tmp_path / "w.nxs", units="dSpacing", x=EDGES / 5000, distribution=1)
    campaign = load_campaign("batio3-nomad")
    calibration = campaign.instrument.with_parameters(difc=9000.0, difa=-5.0, difb=0, tzero=-3.0)
    profile = in_time_of_flight(read_profiles(path, 1)[0], calibration)
    d = CENTRES / 5000
    np.testing.assert_allclose(profile.tof, 9000 * d - 5 * d**2 - 3)


def test_the_source_may_have_been_moved_or_be_unknown(tmp_path: Path) -> None:
    moved = "GEM/source;double;x;1|GEM/moderator;V3D;pos;[0,0,-20.0];visible:true"
    profile, _ = read_profiles(mantid(tmp_path / "a.nxs", moved=moved))
    assert profile.difc == pytest.approx(505.557 * 22 * np.sqrt(0.5), rel=1e-9)
    profile, _ = read_profiles(mantid(tmp_path / "b.nxs", xml=""))
    assert (profile.two_theta, profile.difc) == (90, None)
    lost = np.full((3, 3), np.nan)
    profile, _ = read_profiles(mantid(tmp_path / "c.nxs", positions=lost))
    assert (profile.two_theta, profile.difc) == (None, None)


def test_masked_values_and_spectra_without_counts(tmp_path: Path) -> None:
    values = COUNTS.copy()
    values[0, 5], values[1] = np.nan, 0
    (profile,) = read_profiles(mantid(tmp_path / "w.nxs", values=values))
    assert profile.bank == 1
    assert (profile.intensity[5], profile.sigma[5]) == (0, 0)
    assert "Spectra without counts were left out: 2." in profile.warnings
    with pytest.raises(ProfileError, match="holds no intensity"):
        read_profiles(tmp_path / "w.nxs", 2)
    with pytest.raises(ProfileError, match="every value of its spectra is zero"):
        read_profiles(mantid(tmp_path / "zero.nxs", values=0 * values))


def test_masked_bins_hold_no_information(tmp_path: Path) -> None:
    """What MaskBins leaves: lists of bins for some spectra, the second of which begins at 2."""

    def mask(entry: h5py.Group) -> None:
        group = entry["workspace"]
        group["masked_spectra"] = np.array([[0, 0], [1, 2]], np.int32)
        group["masked_bins"] = np.array([3, 4, 30], np.int32)
        group["mask_weights"] = np.array([1.0, 0.5, 1.0])

    first, second = read_profiles(edited(tmp_path / "w.nxs", mask))
    assert np.flatnonzero(first.sigma == 0).tolist() == [3, 4]
    assert np.flatnonzero(second.sigma == 0).tolist() == [30]
    assert first.intensity[5] == COUNTS[0, 5] / WIDTHS[5]


def test_angles_of_spectra(tmp_path: Path) -> None:
    """An axis of 2θ, as ConvertSpectrumAxis makes it, of a workspace without detectors."""

    def turn(entry: h5py.Group) -> None:
        entry["workspace/axis2"][:] = [30.5, 121.25]
        entry["workspace/axis2"].attrs["units"] = np.bytes_("Degrees")
        del entry["instrument/detector"]

    profiles = read_profiles(edited(tmp_path / "w.nxs", turn))
    assert [(p.bank, p.two_theta) for p in profiles] == [(1, 30.5), (2, 121.25)]


def test_spectra_that_their_axis_does_not_number(tmp_path: Path) -> None:
    """An axis of text: the list of detectors has the numbers, in the order of the spectra."""

    def name(entry: h5py.Group) -> None:
        del entry["workspace/axis2"]
        entry["workspace/axis2"] = np.frombuffer(b"high\nlow\n", "S1")
        entry["workspace/axis2"].attrs["units"] = np.bytes_("TextAxis")
        entry["instrument/detector/spectra"][:] = [7, 1]

    profiles = read_profiles(edited(tmp_path / "w.nxs", name))
    assert [(p.bank, p.two_theta) for p in profiles] == [(7, 90.0), (1, 120.0)]


def test_spectra_of_unequal_lengths_are_padded(tmp_path: Path) -> None:
    x = np.stack([EDGES, EDGES])
    x[1, -10:] = np.nan
    first, second = read_profiles(mantid(tmp_path / "w.nxs", x=x))
    assert (len(first.tof), len(second.tof)) == (N, N - 10)
    np.testing.assert_allclose(second.intensity, (COUNTS[1] / WIDTHS)[:-10])


def test_events_are_counted_in_the_bins_of_the_workspace(tmp_path: Path) -> None:
    path = mantid(tmp_path / "w.nxs")
    rng = np.random.default_rng(7)
    tof = [rng.uniform(1990, 2990, n) for n in (4000, 0)]
    weight = rng.uniform(0.5, 2.0, 4000)
    with h5py.File(path, "a") as file:
        entry = file["mantid_workspace_1"]
        entry.move("workspace", "event_workspace")
        group = entry["event_workspace"]
        del group["values"], group["errors"]
        group["indices"] = np.array([0, 4000, 4000])
        group["tof"], group["weight"] = np.concatenate(tof), weight
        group["error_squared"] = weight**2
    (profile,) = read_profiles(path)  # the second bank has no events
    k = 11
    inside = (tof[0] >= EDGES[k]) & (tof[0] < EDGES[k + 1])
    assert profile.intensity[k] == pytest.approx(weight[inside].sum() / WIDTHS[k])
    assert profile.sigma[k] == pytest.approx(np.sqrt((weight[inside] ** 2).sum()) / WIDTHS[k])


def test_several_workspaces_of_a_group(tmp_path: Path) -> None:
    path = mantid(tmp_path / "w.nxs")
    with h5py.File(path, "a") as file:
        for number in (10, 2):
            file.copy("mantid_workspace_1", f"mantid_workspace_{number}")
            file[f"mantid_workspace_{number}/workspace/values"][:] = number * COUNTS
    profiles = read_profiles(path)
    assert [p.bank for p in profiles] == [1, 2] * 3
    assert [round(p.intensity[0] / profiles[0].intensity[0]) for p in profiles[::2]] == [1, 2, 10]
    (third,) = read_profiles(path, reading=Reading(position=3))
    assert third.intensity[0] == pytest.approx(2 / WIDTHS[0])


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("Degrees", r"constant wavelength, 2θ 20–29\.78°"),
        ("Wavelength", "neither time of flight nor d-spacing nor Q"),
        ("Energy", "neither time of flight nor d-spacing nor Q"),
    ],
)
def test_other_axes_are_refused(tmp_path: Path, units: str, message: str) -> None:
    path = mantid(tmp_path / "w.nxs", units=units, x=EDGES / 100)
    with pytest.raises(ProfileError, match=message):
        read_profiles(path)


def test_detectors_are_no_banks(tmp_path: Path) -> None:
    path, many = tmp_path / "w.nxs", np.tile(COUNTS[:1], (600, 1))
    mantid(path, values=many, errors=np.sqrt(many), numbers=np.arange(1.0, 601))
    with pytest.raises(ProfileError, match="holds 600 spectra: focus them into banks"):
        read_profiles(path)
    assert read_profiles(path, 600)[0].bank == 600


def test_a_measurement_of_a_workspace(tmp_path: Path, campaign: Campaign) -> None:
    """As the same profile in a text file: the bank at the model's angle is chosen by itself."""
    tof = campaign.grid.tof
    comb = np.where(np.arange(len(tof)) % 100 == 0, 500.0, 10.0)
    positions = np.array([[1.5, 30.0, 0.0], [1.5, 30.0, 0.0], [2.0, 122.0, 0.0]])
    path = mantid(
        tmp_path / "w.nxs",
        x=tof,
        values=np.stack([comb, comb]),
        errors=np.stack([np.sqrt(comb)] * 2),
        positions=positions,
        distribution=1,
        xml="",
    )
    np.savetxt(tmp_path / "w.xye", np.stack([tof, comb, np.sqrt(comb)], axis=1), fmt="%.9f")
    calibration = tmp_path / "mine.instprm"
    calibration.write_text(campaign.instrument.instprm)
    (measurement,) = load_measurements(path, campaign, calibration)
    (as_text,) = load_measurements(
        tmp_path / "w.xye", campaign, calibration, reading=Reading(bin_edges=False)
    )
    assert measurement.profile.bank == 2
    np.testing.assert_allclose(measurement.prepared, as_text.prepared, atol=1e-6)


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    return load_campaign("batio3-nomad")


# ---- NXdata ------------------------------------------------------------------------------------


def nxdata(
    path: Path,
    datasets: Mapping[str, np.ndarray],
    units: Mapping[str, str],
    attributes: Mapping[str, object],
    *,
    default: bool = True,
) -> Path:
    with h5py.File(path, "w") as file:
        entry = file.create_group("entry")
        entry.attrs["NX_class"] = "NXentry"
        entry["title"] = "diamond"
        group = entry.create_group("plot")
        group.attrs["NX_class"] = "NXdata"
        if default:
            file.attrs["default"], entry.attrs["default"] = "entry", "plot"
        for name, values in datasets.items():
            group[name] = values
        for name, unit in units.items():
            group[name].attrs["units"] = unit
        group.attrs.update(attributes)
    return path


FACTORS = {"us": 1, "microsecond": 1, "µs": 1, "ms": 1e-3, "s": 1e-6, "ns": 1e3, "microseconds": 1}


@pytest.mark.slow
@settings(max_examples=6)
@given(
    unit=st.sampled_from(sorted(FACTORS)),
    errors=st.sampled_from(["counts_errors", "errors", None]),
    banks=st.sampled_from([1, 2, 0]),
    default=st.booleans(),
    edges=st.booleans(),
)
def test_nxdata(
    tmp_path_factory: pytest.TempPathFactory,
    unit: str,
    errors: str | None,
    banks: int,
    default: bool,
    edges: bool,
) -> None:
    x = (EDGES if edges else CENTRES) * FACTORS[unit]
    values = COUNTS[0] if not banks else COUNTS[:banks]
    datasets = {"counts": values, "tof": x} | ({errors: 2 * values} if errors else {})
    axes = ["tof"] if not banks else ["bank", "tof"]
    path = nxdata(
        tmp_path_factory.mktemp("nxdata") / "p.h5",
        datasets,
        {"tof": unit, "counts": "counts"},
        {"signal": "counts", "axes": axes},
        default=default,
    )
    profiles = read_profiles(path)
    assert [p.bank for p in profiles] == list(range(1, max(banks, 1) + 1))
    for profile, y in zip(profiles, COUNTS, strict=False):
        width = WIDTHS if edges else 1.0
        np.testing.assert_allclose(profile.tof, CENTRES, rtol=1e-12)
        np.testing.assert_allclose(profile.intensity, y / width)
        np.testing.assert_allclose(profile.sigma, (2 * y if errors else np.sqrt(y)) / width)
        assert (profile.title, profile.warnings) == ("diamond", ())


@pytest.mark.parametrize(
    ("name", "unit", "factor", "declared"),
    [
        ("d", "angstrom", 1, "d"),
        ("dspacing", "Å", 1, "d"),
        ("d", "nm", 0.1, "d"),
        ("Q", "1/angstrom", 1, "Q"),
        ("q", "angstrom^-1", 1, "Q"),
        ("q", "1/nm", 10, "Q"),
        ("tof", "", 1, "us"),
    ],
)
def test_units_of_an_axis(
    tmp_path: Path, name: str, unit: str, factor: float, declared: str
) -> None:
    d = CENTRES / 1000
    values = {"d": d, "Q": 2 * np.pi / d[::-1], "us": CENTRES}[declared]
    path = nxdata(
        tmp_path / "p.h5",
        {"y": COUNTS[0], name: values * factor},
        {name: unit} if unit else {},
        {"signal": "y", "axes": name},
    )
    (profile,) = read_profiles(path)
    np.testing.assert_allclose(profile.tof, CENTRES if declared == "us" else d, rtol=1e-12)
    assert profile.intensity[0] == (N if declared == "Q" else 1)


def test_nxdata_as_before_2014(tmp_path: Path) -> None:
    path = nxdata(tmp_path / "p.nxs", {"data": COUNTS, "t": CENTRES}, {"t": "microsecond"}, {})
    with h5py.File(path, "a") as file:
        file["entry/plot/data"].attrs["signal"] = 1
        file["entry/plot/data"].attrs["axes"] = "bank:t"
    assert [p.bank for p in read_profiles(path)] == [1, 2]
    with h5py.File(path, "a") as file:
        del file["entry/plot/data"].attrs["axes"]
        file["entry/plot/t"].attrs["axis"] = 2
    np.testing.assert_allclose(read_profiles(path)[1].intensity, COUNTS[1])


def test_angles_and_profiles_among_other_groups(tmp_path: Path) -> None:
    """Rows may have their angles as axis; images and monitors are left out."""
    path = nxdata(
        tmp_path / "p.nxs",
        {"y": COUNTS, "polar_angle": np.radians([90.0, 150.0]), "tof": CENTRES},
        {"tof": "us", "polar_angle": "rad"},
        {"signal": "y", "axes": ["polar_angle", "tof"]},
        default=False,
    )
    with h5py.File(path, "a") as file:
        for name, axis, unit in (("image", "x", "mm"), ("monitor", "wavelength", "angstrom")):
            group = file.create_group(f"entry/{name}")
            group["y"], group[axis] = COUNTS[0], CENTRES / 1000
            group[axis].attrs["units"] = unit
            group.attrs.update({"NX_class": "NXdata", "signal": "y", "axes": axis})
    profiles = read_profiles(path)
    assert [(p.bank, round(p.two_theta or 0, 6)) for p in profiles] == [(1, 90), (2, 150)]


def test_what_intensities_over_bins_are_is_reported(tmp_path: Path) -> None:
    for unit, text, y in (
        ("", "were taken as such, and divided", COUNTS[0] / WIDTHS),
        ("counts/us", "taken as a density", COUNTS[0]),
    ):
        path = nxdata(
            tmp_path / "p.nxs",
            {"y": COUNTS[0], "tof": EDGES},
            {"tof": "us"} | ({"y": unit} if unit else {}),
            {"signal": "y", "axes": "tof"},
        )
        (profile,) = read_profiles(path)
        np.testing.assert_allclose(profile.intensity, y)
        assert text in profile.warnings[0]


@pytest.mark.parametrize(
    ("name", "unit", "message"),
    [
        ("two_theta", "deg", "constant wavelength, 2θ"),
        ("polar", "degree", "constant wavelength, 2θ"),
        ("wavelength", "angstrom", "neither time of flight"),
        ("energy", "meV", "neither time of flight"),
        ("x", "", "Name the unit of the axis with --x-unit"),
    ],
)
def test_nxdata_over_other_axes(tmp_path: Path, name: str, unit: str, message: str) -> None:
    units = {name: unit} if unit else {}
    plot = {"y": COUNTS[0], name: EDGES[:-1] / 50}
    path = nxdata(tmp_path / "p.nxs", plot, units, {"signal": "y", "axes": name})
    with pytest.raises(ProfileError, match=message):
        read_profiles(path)


# ---- what is not trusted ------------------------------------------------------------------------


def test_no_link_leads_out_of_the_file(tmp_path: Path) -> None:
    mantid(tmp_path / "other.nxs")

    def external(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        entry["workspace/values"] = h5py.ExternalLink(
            str(tmp_path / "other.nxs"), "mantid_workspace_1/workspace/values"
        )

    def through_a_soft_link(entry: h5py.Group) -> None:
        external(entry)
        entry.move("workspace/values", "elsewhere")
        entry["workspace/values"] = h5py.SoftLink("/mantid_workspace_1/elsewhere")

    def virtual(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        layout = h5py.VirtualLayout((2, N), float)
        layout[:] = h5py.VirtualSource(
            str(tmp_path / "other.nxs"), "mantid_workspace_1/workspace/values", (2, N)
        )
        entry["workspace"].create_virtual_dataset("values", layout)

    def outside(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        store = [(str(tmp_path / "raw.bin"), 0, 16 * N)]
        entry["workspace"].create_dataset("values", (2, N), float, external=store)

    for edit in (external, through_a_soft_link, virtual, outside):
        path = edited(tmp_path / f"{edit.__name__}.nxs", edit)
        with pytest.raises(ProfileError, match="in another file"):
            read_profiles(path)


def test_links_inside_the_file_are_followed(tmp_path: Path) -> None:
    def soft(entry: h5py.Group) -> None:
        entry.move("workspace/values", "elsewhere")
        entry["workspace/values"] = h5py.SoftLink("/mantid_workspace_1/elsewhere")

    def circular(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        entry["workspace/values"] = h5py.SoftLink("/mantid_workspace_1/workspace/values")

    first, _ = read_profiles(edited(tmp_path / "a.nxs", soft))
    np.testing.assert_allclose(first.intensity, COUNTS[0] / WIDTHS)
    with pytest.raises(ProfileError, match="holds no values"):
        read_profiles(edited(tmp_path / "b.nxs", circular))


def test_sizes_are_bounded(tmp_path: Path) -> None:
    """A small file may announce an array that no memory holds."""

    def huge(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        entry["workspace"].create_dataset("values", (2, 10**11), float, chunks=(1, 1000))

    def chunk(entry: h5py.Group) -> None:
        del entry["workspace/values"]
        entry["workspace"].create_dataset(
            "values", (2, N), "f4", maxshape=(2, None), chunks=(2, 2**27)
        )

    for edit, message in ((huge, "200000000000 values"), (chunk, "chunks that are too large")):
        path = edited(tmp_path / f"{edit.__name__}.nxs", edit)
        with pytest.raises(ProfileError, match=message):
            read_nexus_apart(path, None)


def test_files_without_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "raw.nxs"
    with h5py.File(path, "w") as file:
        file["entry/bank1_events/event_time_offset"] = np.arange(5.0)
    with pytest.raises(ProfileError, match="neither a processed workspace of Mantid nor an NXdata"):
        read_profiles(path)
    with h5py.File(path, "w") as file:
        file.create_group("mantid_workspace_1/table_workspace")
    with pytest.raises(ProfileError, match="is no workspace of spectra"):
        read_profiles(path)
    path.write_bytes(b"\x0e\x03\x13\x01" + bytes(100))
    with pytest.raises(ProfileError, match="HDF4"):
        read_profiles(path)


def plot(path: Path) -> Path:
    values = {"y": COUNTS[0], "tof": CENTRES}
    return nxdata(path, values, {"tof": "us"}, {"signal": "y", "axes": "tof"})


@pytest.mark.slow
def test_a_file_on_which_the_library_hangs_is_refused(tmp_path: Path) -> None:
    """A free part of no size in the heap of texts, which HDF5 1.14 passes over for ever."""
    path = plot(tmp_path / "w.nxs")
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 18], content[heap + 24 : heap + 32] = bytes(2), bytes(8)
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="damaged HDF5 file"):
        read_nexus_apart(path, None, seconds=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("write", [mantid, plot])
def test_a_damaged_file_is_refused_in_a_sentence(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    path, messages = write(tmp_path / "w.nxs"), []
    content, rng = path.read_bytes(), random.Random(11)
    for attempt in range(8):
        damaged = bytearray(content)
        for _ in range(5 * attempt):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: len(damaged) - 100 * (attempt == 7)])
        try:
            profiles = [checked_profile(raw) for raw in read_nexus_apart(path, None, seconds=20)]
        except ProfileError as error:
            messages.append(str(error))
        else:
            assert all(np.isfinite([p.tof, p.intensity, p.sigma]).all() for p in profiles)
    assert 0 < len(messages) < 8
    assert all(message.startswith(str(path)) and len(message) < 400 for message in messages)
