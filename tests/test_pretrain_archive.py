"""Folders of DICOM files as slices for pretraining: boxes, what is set aside, and the cache."""

import errno
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from synthetic import random_hu, write_ct, write_slice

from models.lecl import archive
from models.lecl.archive import Archive, patient_key
from models.lecl.hu_cache import HUCache, fill_cache
from models.lecl.sources import BadSource, Box, CTImage


def write_boxes(path: Path, *rows: tuple, columns: str = "sop_uid,x0,y0,x1,y1") -> Path:
    path.write_text("\n".join([columns, *(",".join(map(str, each)) for each in rows)]) + "\n")
    return path


def same(one: CTImage, other: CTImage) -> bool:
    return np.array_equal(one.hu, other.hu) and (one.spacing_mm, one.boxes) == (other.spacing_mm, other.boxes)


def test_an_archive_gives_every_slice_from_feet_to_head_with_its_boxes(tmp_path):
    hu = random_hu()
    write_ct(tmp_path / "a", hu, change=lambda number, dataset: setattr(dataset, "PixelSpacing", [0.5, 0.75]))
    uids = Archive(tmp_path).sop_uids
    boxes = write_boxes(tmp_path / "boxes.csv", (uids[2], 3, 4, 10.5, 31), (uids[4], 0, 0, 1, 1), (uids[2], 5, 6, 7, 8))

    source = Archive(tmp_path / "a", boxes)

    drawn = {2: (Box(3, 4, 10.5, 31), Box(5, 6, 7, 8)), 4: (Box(0, 0, 1, 1),)}
    assert all(
        same(source[k], CTImage(hu[k].astype(np.int16), (0.5, 0.75), drawn.get(k, ()))) for k in range(len(source))
    )
    assert len(source) == len(hu)
    assert source[-1].hu.dtype == np.int16


def test_a_patient_is_a_digest_of_the_id_and_never_the_id(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    write_slice(tmp_path / "named", lambda dataset: setattr(dataset, "PatientID", " MRN 4711"))
    write_slice(tmp_path / "unnamed", lambda dataset: dataset.update({"SOPInstanceUID": "1.2.3", "PatientID": ""}))

    source = Archive(tmp_path)

    assert patient_key("MRN 4711") in source.patients
    assert len(set(source.patients)) == 2
    assert all(len(key) == 16 and set(key) <= set("0123456789abcdef") for key in source.patients)
    assert "4711" not in caplog.text + pickle.dumps(source).decode("latin-1")


def test_what_is_no_axial_slice_is_set_aside_and_counted_and_an_instance_counts_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_ct(tmp_path / "a")
    write_ct(tmp_path / "again")
    (tmp_path / "notes.txt").write_text("no DICOM at all")
    write_slice(
        tmp_path / "scout", lambda d: d.update({"SOPInstanceUID": "1.2.1", "ImageType": ["ORIGINAL", "LOCALIZER"]})
    )
    write_slice(tmp_path / "bare", lambda d: d.update({"SOPInstanceUID": "1.2.2", "PixelSpacing": None}))
    write_slice(tmp_path / "flat", lambda d: d.update({"SOPInstanceUID": "1.2.3", "PixelSpacing": [0, 0]}))

    source = Archive(tmp_path)

    assert len(source) == 6
    assert "6 slices, 0 boxes, 6 duplicates; set aside" in caplog.text
    for reason in ("'not_dicom': 1", "'localizer': 1", "'no_pixel_spacing': 2"):
        assert reason in caplog.text


def test_a_folder_without_slices_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no DICOM at all")

    with pytest.raises(BadSource, match="1 files and no axial CT slice"):
        Archive(tmp_path, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((-0.5, 4, 10, 12), r"line 2, slice [\d.]+: box x -0.5 to 10, y 4 to 12, expected x within 0 to 31 and"),
        ((3, 4, 32, 12), r"box x 3 to 32"),
        ((3, -1, 10, 12), r"y -1 to 12"),
        ((3, 4, 10, 31.5), r"y 4 to 31.5, expected .* y within 0 to 31"),
        ((10, 4, 10, 12), r"box x 10 to 10, y 4 to 12, expected x0 < x1 and y0 < y1"),
        ((3, 12, 10, 4), r"y 12 to 4, expected x0 < x1"),
        (("nan", 4, 10, 12), r"line 2: x0 is text, expected a finite number"),
        ((3, 4, "inf", 12), r"line 2: x1 is text, expected a finite number"),
        ((3, 4, "Jane Doe", 12), r"line 2: x1 is text, expected a finite number"),
        ((3, 4, 10), r"line 2: y1 is empty, expected a finite number"),
    ],
)
def test_a_box_that_cannot_be_is_named_by_line_and_slice(tmp_path, box, said):
    write_ct(tmp_path / "a")
    boxes = write_boxes(tmp_path / "boxes.csv", (Archive(tmp_path).sop_uids[1], *box))

    with pytest.raises(BadSource, match=said) as refused:
        Archive(tmp_path / "a", boxes)

    assert "Jane" not in str(refused.value)
    assert "synthetic patient" not in str(refused.value)


def test_boxes_of_slices_that_are_not_there_are_counted(tmp_path):
    write_ct(tmp_path / "a")
    known = Archive(tmp_path).sop_uids[0]
    boxes = write_boxes(
        tmp_path / "b.csv", (known, 1, 1, 2, 2), ("1.9", 1, 1, 2, 2), ("1.9", 3, 1, 4, 2), ("1.8", 1, 1, 2, 2)
    )

    with pytest.raises(BadSource, match=r"3 of 4 rows of b.csv are boxes of 2 sop_uid .* the first on line 3"):
        Archive(tmp_path / "a", boxes)


def test_a_table_without_its_columns_or_its_file_is_refused(tmp_path):
    write_ct(tmp_path / "a")
    boxes = write_boxes(tmp_path / "b.csv", columns="sop_uid,x0,y0,width,height")

    with pytest.raises(
        BadSource, match=r"b.csv lacks x1, y1: found 5 columns, of them sop_uid, x0, y0 of sop_uid, x0, y0"
    ):
        Archive(tmp_path / "a", boxes)
    boxes.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadSource, match=r"b.csv is no CSV in UTF-8"):
        Archive(tmp_path / "a", boxes)
    with pytest.raises(BadSource, match=r"no file c.csv"):
        Archive(tmp_path / "a", tmp_path / "c.csv")


def test_a_table_from_a_spreadsheet_is_read(tmp_path):
    write_ct(tmp_path / "a")
    uid = Archive(tmp_path).sop_uids[0]
    (tmp_path / "b.csv").write_bytes(
        b"\xef\xbb\xbfsop_uid, note,y1,x1,y0,x0\r\n" + uid.encode() + b",x,4,3, 2,1\r\n\r\n"
    )

    assert Archive(tmp_path / "a", tmp_path / "b.csv")[0].boxes == (Box(1, 2, 3, 4),)


# The cache


def mixed(folder: Path) -> None:
    """Two series of different size, and one slice that cannot be decoded."""
    write_ct(folder / "small")
    write_ct(
        folder / "large",
        random_hu(slices=3, size=48, seed=1),
        lambda number, d: d.update({"SOPInstanceUID": f"1.2.{number}", "SeriesInstanceUID": "1.2"}),
    )
    write_slice(folder / "broken", lambda d: d.update({"SOPInstanceUID": "1.3", "PixelData": d.PixelData[:100]}))


def test_the_cache_gives_what_decoding_gives_for_mixed_sizes_and_sets_undecodable_slices_aside(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mixed(tmp_path / "ct")
    plain = Archive(tmp_path / "ct")
    boxes = write_boxes(tmp_path / "b.csv", (plain.sop_uids[-1], 1, 2, 3, 4), ("1.2.1", 40, 2, 47, 4))

    cached = Archive(tmp_path / "ct", boxes, cache=tmp_path / "cache")

    plain = Archive(tmp_path / "ct", boxes)
    decodable = [index for index, uid in enumerate(plain.sop_uids) if uid != "1.3"]
    assert (len(plain), len(cached)) == (10, 9)
    assert all(same(cached[place], plain[index]) for place, index in enumerate(decodable))
    assert cached.patients == tuple(plain.patients[index] for index in decodable)
    assert "'undecodable': 1" in caplog.text
    with pytest.raises(BadSource, match=r"slice 1.3: "):
        plain[plain.sop_uids.index("1.3")]


def test_a_cache_is_written_once_and_anew_for_other_slices(tmp_path):
    paths = write_ct(tmp_path / "ct")
    Archive(tmp_path / "ct", cache=tmp_path / "cache")
    written = sorted((tmp_path / "cache").glob("*.npy"))
    before = written[0].stat().st_mtime_ns

    again = Archive(tmp_path / "ct", cache=tmp_path / "cache")

    assert written[0].stat().st_mtime_ns == before
    assert np.array_equal(again[3].hu, random_hu()[3])
    paths[0].unlink()
    assert np.array_equal(Archive(tmp_path / "ct", cache=tmp_path / "cache")[0].hu, random_hu()[1])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_file_that_was_repaired_or_rescaled_is_decoded_again(tmp_path):
    def hu() -> list[np.ndarray]:
        source = Archive(tmp_path / "ct", cache=tmp_path / "cache")
        return [image.hu for image in source]

    def cut(number, dataset):
        if number == 5:
            dataset.PixelData = dataset.PixelData[:100]

    write_ct(tmp_path / "ct", change=cut)
    assert np.array_equal(hu(), random_hu()[:5])
    write_ct(tmp_path / "ct")
    assert np.array_equal(hu(), random_hu())
    write_ct(tmp_path / "ct", change=lambda number, dataset: setattr(dataset, "RescaleIntercept", -1023))
    assert np.array_equal(hu(), random_hu() + 1)


def test_numpy_reads_the_cache_as_a_flat_array_of_slices_and_then_their_flags(tmp_path):
    mixed(tmp_path / "ct")
    Archive(tmp_path / "ct", cache=tmp_path / "cache")

    flat = np.load(next((tmp_path / "cache").glob("*.npy")), mmap_mode="r")

    assert (flat.dtype, flat.shape) == (np.dtype("<i2"), (3 * 48**2 + 7 * 32**2 + 10,))
    assert flat[-10:].sum() == 9
    assert np.array_equal(flat[: 48**2].reshape(48, 48), random_hu(slices=3, size=48, seed=1)[0])


def test_a_worker_gets_a_cached_archive_without_its_pixels_and_cannot_spoil_them(tmp_path):
    write_ct(tmp_path / "ct", np.stack([np.full((256, 256), k, np.float32) for k in range(4)]))
    source = Archive(tmp_path / "ct", cache=tmp_path / "cache")

    sent = pickle.dumps(source)
    received: Archive = pickle.loads(sent)
    received[2].hu[:] = 99

    assert len(sent) < 10_000  # a slice has 131,072 bytes
    assert all(np.array_equal(source[k].hu, np.full((256, 256), k)) for k in range(4))


def test_a_disk_that_fills_up_leaves_no_half_cache(tmp_path):
    cache = HUCache(tmp_path / "c.npy", ((2, 2), (2, 2)), (0, 4, 8))
    slices = [np.full((2, 2), 7, np.int16), np.full((2, 2), 8, np.int16)]

    def full():
        yield slices[0]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        fill_cache(cache, full())
    assert {path.suffix for path in tmp_path.iterdir()} <= {".lock"}

    fill_cache(cache, slices)
    fill_cache(cache, full())  # it is there, so nothing is asked for
    assert np.array_equal(cache[1], slices[1])


def test_many_files_are_read_by_several_processes_with_the_same_result(tmp_path, monkeypatch):
    mixed(tmp_path / "ct")
    alone = Archive(tmp_path / "ct", cache=tmp_path / "one")

    monkeypatch.setattr(archive, "FEW", 2)
    monkeypatch.setattr(archive, "AT_ONCE", 4)
    together = Archive(tmp_path / "ct", cache=tmp_path / "two")

    assert together.sop_uids == alone.sop_uids
    assert all(same(together[index], alone[index]) for index in range(len(alone)))
