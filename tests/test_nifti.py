"""NIfTI in: a volume as a CT series of its own, with a stated assumption about its values."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from posting import embed, post, read, tarred

from models.ct.decode import read_hu
from models.ct.nifti import UnusableNifti, is_nifti, nifti_slices
from models.ct.reasons import Reason
from models.ct.series import Finding, Status, read_series

AFFINE = np.array([[-0.75, 0, 0, 30], [0, -0.5, 0, 40], [0, 0, 5, -100], [0, 0, 0, 1.0]])  # RAS of an LPS array


def random_voxels(shape=(20, 24, 6), seed: int = 0) -> np.ndarray:
    """(x, y, z) whole HU."""
    return np.random.default_rng(seed).integers(-1024, 2000, shape).astype(np.int16)


def write(folder: Path, voxels: np.ndarray, affine=AFFINE, name: str = "volume.nii", kind=nib.Nifti1Image) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = kind(voxels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / name)
    return folder / name


def sliced(path: Path, **how) -> list[Path]:
    folder = path.parent / f"slices of {path.name}"
    folder.mkdir()
    return [*nifti_slices(path, folder, **how)]


def stack(paths: list[Path]) -> np.ndarray:
    """(slices, rows, columns) HU in the series' order."""
    return np.stack([read_hu(each.path) for each in read_series(paths).slices])


@pytest.mark.parametrize("name", ["volume.nii", "volume.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_volume_is_its_slices_feet_to_head_with_its_geometry(tmp_path, name, kind):
    voxels = random_voxels()
    path = write(tmp_path, voxels, name=name, kind=kind)

    paths = sliced(path, patient_id="Müller 7")
    series = read_series(paths)

    assert is_nifti(path)
    np.testing.assert_array_equal(stack(paths), voxels.T)
    assert [each.z_mm for each in series.slices] == [-100, -95, -90, -85, -80, -75]
    assert series.geometry()["pixel_spacing_mm"] == (0.5, 0.75)
    first = pydicom.dcmread(paths[0])
    assert first.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    assert first.ImagePositionPatient == [-30, -40, -100]
    assert first.PatientID == "Müller 7"
    assert series.verdict().status == Status.ACCEPTED_WITH_WARNINGS
    assert series.verdict().findings == (
        Finding("nifti_hu_assumed", {"slices": 6, "from": float(voxels.min()), "to": float(voxels.max())}),
    )


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR", "ASL", "IRP"])
def test_a_volume_stored_along_other_axes_is_the_same_slices(tmp_path, axes):
    voxels = random_voxels()
    plain = nib.Nifti1Image(voxels, AFFINE)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(axes))
    )
    turned = plain.as_reoriented(turn)

    paths = sliced(write(tmp_path, np.asarray(turned.dataobj), turned.affine))

    np.testing.assert_array_equal(stack(paths), voxels.T)
    assert pydicom.dcmread(paths[0]).ImagePositionPatient == [-30, -40, -100]


def test_an_oblique_volume_keeps_its_tilt(tmp_path):
    angle = np.radians(10)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]

    series = read_series(sliced(write(tmp_path, random_voxels(), affine)))

    assert series.geometry()["tilt_degrees"] == pytest.approx(10, abs=0.01)
    assert series.spacing_mm == pytest.approx(5, abs=1e-3)


def test_slope_and_intercept_are_applied_once(tmp_path):
    stored = random_voxels()
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, -100)
    image.header.set_data_dtype(np.int16)
    path = tmp_path / "scaled.nii"
    path.write_bytes(image.to_bytes())
    # to_bytes() scales what it writes; the stored numbers are put back as they were
    content = bytearray(path.read_bytes())
    content[352 : 352 + stored.nbytes] = stored.tobytes(order="F")
    path.write_bytes(content)

    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), stored * 0.5 - 100)
    np.testing.assert_array_equal(stack(sliced(path)), (stored * 0.5 - 100).T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
def test_other_types_of_voxels_are_the_same_hu(tmp_path, dtype):
    voxels = random_voxels() if dtype != np.uint16 else random_voxels() + 1024

    np.testing.assert_array_equal(stack(sliced(write(tmp_path, voxels.astype(dtype)))), voxels.T)


def test_fractions_of_a_hu_are_rounded(tmp_path):
    voxels = random_voxels() + 0.3

    np.testing.assert_array_equal(stack(sliced(write(tmp_path, voxels))), random_voxels().T)


def test_units_other_than_millimetres_are_converted(tmp_path):
    affine = AFFINE.copy()
    affine[:3] /= 1000
    image = nib.Nifti1Image(random_voxels(), affine)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")

    assert read_series(sliced(tmp_path / "metres.nii")).spacing_mm == pytest.approx(5, abs=1e-3)


def test_uids_follow_from_the_content_alone(tmp_path):
    path = write(tmp_path, random_voxels(), name="a.nii")
    packed, other = path.with_name("b.nii.gz"), write(tmp_path, random_voxels(seed=1), name="c.nii")
    packed.write_bytes(gzip.compress(path.read_bytes()))

    one, two, three = ([pydicom.dcmread(each) for each in sliced(each)] for each in (path, packed, other))

    assert [each.SOPInstanceUID for each in one] == [each.SOPInstanceUID for each in two]
    assert len({each.SOPInstanceUID for each in one + three}) == 12
    assert one[0].SeriesInstanceUID == two[0].SeriesInstanceUID != three[0].SeriesInstanceUID
    assert all(each.SeriesInstanceUID.is_valid and each.SeriesInstanceUID.startswith("2.25.") for each in one)


def test_values_without_air_are_a_finding(tmp_path):
    series = read_series(sliced(write(tmp_path, random_voxels().clip(0, 1500))))

    assert [each.code for each in series.verdict().findings] == ["nifti_hu_assumed", "nifti_unlike_hu"]


@pytest.mark.parametrize(
    ("voxels", "reason"),
    [
        (random_voxels().clip(0, 255).astype(np.uint8), Reason.NOT_HU),
        (random_voxels() / 4096.0, Reason.NOT_HU),
        (np.zeros((8, 8, 3), np.int16), Reason.NOT_HU),
        (np.full((8, 8, 3), np.nan), Reason.NOT_HU),
        (np.where(np.arange(192).reshape(8, 8, 3) == 100, np.nan, -500.0), Reason.NOT_HU),
        (random_voxels().astype(np.int32) * 1000, Reason.NOT_HU),
        (random_voxels((8, 8, 3, 2)), Reason.NOT_A_VOLUME),
        (random_voxels((8, 8)), Reason.NOT_A_VOLUME),
        (random_voxels((8, 8, 3)).astype(np.complex64), Reason.NOT_GRAYSCALE),
        (np.zeros((8, 8, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), Reason.NOT_GRAYSCALE),
    ],
    ids=["8-bit", "0 to 1", "constant", "nan", "one nan", "too large", "4D", "2D", "complex", "rgb"],
)
def test_what_cannot_be_a_ct_volume_is_refused_with_its_reason(tmp_path, voxels, reason):
    with pytest.raises(UnusableNifti) as error:
        sliced(write(tmp_path, voxels))

    assert error.value.reason == reason


def test_a_fourth_axis_of_one_is_none(tmp_path):
    assert len(sliced(write(tmp_path, random_voxels((8, 8, 3, 1))))) == 3


@pytest.mark.parametrize(
    "affine",
    [None, np.diag([1.0, 1.0, 0.0, 1.0]), np.array([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])],
    ids=["none", "flat", "skew"],
)
def test_a_volume_that_does_not_say_how_the_patient_lies_is_refused(tmp_path, affine):
    image = nib.Nifti1Image(random_voxels(), None)
    if affine is not None:
        image.header.set_sform(affine, code=1)
    path = tmp_path / "nowhere.nii"
    path.write_bytes(image.to_bytes())

    with pytest.raises(UnusableNifti) as error:
        sliced(path)

    assert error.value.reason == Reason.NO_POSITION


@pytest.mark.parametrize("name", ["cut.nii", "cut.nii.gz"])
def test_a_volume_that_ends_early_is_refused(tmp_path, name):
    path = write(tmp_path, random_voxels(), name=name)
    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(UnusableNifti) as error:
        sliced(path)

    assert error.value.reason == Reason.NOT_A_VOLUME


def test_a_bomb_stops_at_the_limit(tmp_path):
    path = write(tmp_path, np.zeros((200, 200, 50), np.int16), name="bomb.nii.gz")

    with pytest.raises(UnusableNifti, match="inflates beyond the limit"):
        sliced(path, max_bytes=2**20)


def test_dicom_and_archives_are_no_nifti(tmp_path, data):
    packed = tmp_path / "files.tar.gz"
    packed.write_bytes(tarred([("a.txt", b"text")], "w:gz"))

    assert not is_nifti(packed)
    assert not is_nifti(data / "oddities" / "cornerstone" / "CTImage.dcm")


def twin(paths: list[Path], target: Path) -> Path:
    """The series as a NIfTI volume, as its converters write it: columns to the right, rows to the front."""
    ordered = read_series(paths).slices
    hu = np.stack([read_hu(each.path) for each in ordered]).astype(np.int16)  # (slices, rows, columns)
    first, (row_mm, column_mm) = pydicom.dcmread(ordered[0].path), ordered[0].pixel_spacing_mm
    x, y, z = map(float, first.ImagePositionPatient)
    affine = np.diag([-column_mm, -row_mm, (ordered[-1].z_mm - ordered[0].z_mm) / (len(ordered) - 1), 1.0])
    affine[:3, 3] = -x, -y, z
    image = nib.Nifti1Image(hu.T, affine).as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
    image.header.set_xyzt_units("mm")
    nib.save(image, target)
    return target


def test_a_twin_of_a_real_dicom_series_embeds_to_the_same(http, lidc_0001, tmp_path):
    path = twin(lidc_0001, tmp_path / "twin.nii.gz")

    answer = embed(http, read([path]), patient_id="NIFTI-TWIN")
    original = embed(http, read(lidc_0001))

    bags = []
    for each in (answer, original):
        series_uid = each["series"][0]["series_uid"]
        bags.append(http.get(f"/v1/series/{series_uid}/embeddings").json())
    one, other = (np.array(each["embeddings"]) for each in bags)
    assert one.shape == other.shape == (133, *one.shape[1:])
    assert [each["z_mm"] for each in bags[0]["slices"]] == pytest.approx([each["z_mm"] for each in bags[1]["slices"]])
    norms = np.linalg.norm(one, axis=2) * np.linalg.norm(other, axis=2)
    assert ((one * other).sum(axis=2) / norms).min() >= 0.9999
    series = http.get(f"/v1/series/{answer['series'][0]['series_uid']}").json()
    assert series["patient_id"] == "NIFTI-TWIN"
    assert [each["code"] for each in series["verdict"]["findings"]] == ["nifti_hu_assumed"]


def test_the_same_volume_again_changes_nothing(http, tmp_path):
    files = read([write(tmp_path, random_voxels(seed=5), name="again.nii.gz")])

    first, second = embed(http, files)["series"], embed(http, files)["series"]

    assert [(each["received"], each["duplicates"]) for each in (*first, *second)] == [(6, 0), (0, 6)]
    series = http.get(f"/v1/series/{first[0]['series_uid']}").json()
    assert series["patient_id"] == f"unknown-{series['study_uid']}"


def test_volumes_come_in_archives_and_beside_what_is_refused(http, tmp_path):
    good = write(tmp_path, random_voxels(seed=6), name="good.nii.gz")
    bad = write(tmp_path, random_voxels((8, 8, 3, 2)), name="time.nii")

    answer = post(http, [("both.tar", tarred(read([good, bad])))]).json()

    assert [each["received"] for each in answer["series"]] == [6]
    assert [(each["file"], each["reason"]) for each in answer["set_aside"]] == [("time.nii", "not_a_volume")]


def test_a_volume_that_is_refused_alone_is_a_problem_that_names_it(http, tmp_path):
    answer = post(http, read([write(tmp_path, np.zeros((8, 8, 3), np.uint8), name="mask.nii")]))

    assert answer.status_code == 422
    assert [(each["file"], each["reason"]) for each in answer.json()["set_aside"]] == [("mask.nii", "not_hu")]


@pytest.mark.parametrize("patient_id", ["x" * 65, "a\\b", "a\nb"])
def test_a_patient_id_that_dicom_cannot_hold_is_refused(http, tmp_path, patient_id):
    path = write(tmp_path, random_voxels(seed=7))

    assert post(http, read([path]), patient_id=patient_id).status_code == 422


def test_the_header_of_a_pair_is_refused(tmp_path):
    nib.save(nib.Nifti1Pair(random_voxels(), AFFINE), tmp_path / "pair.hdr")

    assert is_nifti(tmp_path / "pair.hdr")
    with pytest.raises(UnusableNifti) as error:
        sliced(tmp_path / "pair.hdr")
    assert error.value.reason == Reason.NOT_A_VOLUME


def test_spoiled_headers_are_read_or_refused_and_raise_nothing_else(tmp_path):
    random = np.random.default_rng(0)
    sound = write(tmp_path, random_voxels((8, 9, 4))).read_bytes()
    outcomes = set()
    for number in range(400):
        content = bytearray(sound)
        for at in random.integers(0, 348, random.integers(1, 4)):
            content[at] = random.choice([0, 127, 128, 255])
        path = tmp_path / f"{number}.nii"
        path.write_bytes(content)
        try:
            outcomes.add(len(sliced(path)))
        except UnusableNifti as error:
            outcomes.add(error.reason)

    assert outcomes >= {4, Reason.NOT_A_VOLUME, Reason.NO_POSITION}
