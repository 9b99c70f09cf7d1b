"""The export that the bench writes is one of usable slices, and its scan finds all of them."""

import numpy as np
import pydicom

from bench.export import scan_apart, write_export
from models.ct.screening import SetAside, screened_header


def test_a_synthetic_export_is_of_whole_slices_that_take_no_room(tmp_path):
    write_export(tmp_path / "export", files=7, series=2)

    paths = sorted(path for path in (tmp_path / "export").rglob("*") if path.is_file())
    headers = [screened_header(path) for path in paths]
    assert not [header for header in headers if isinstance(header, SetAside)]
    assert sorted(
        len({str(h.SOPInstanceUID) for h in headers if h.SeriesInstanceUID == uid})
        for uid in {h.SeriesInstanceUID for h in headers}
    ) == [3, 4]
    assert np.array_equal(pydicom.dcmread(paths[0]).pixel_array, np.zeros((512, 512)))
    assert max(path.stat().st_blocks * 512 for path in paths) < 20_000


def test_its_scan_finds_every_file_and_is_measured(tmp_path):
    write_export(tmp_path / "export", files=5, series=1)

    found = scan_apart(tmp_path / "export", tmp_path / "data")

    assert found.files == 5
    assert found.seconds > 0 and found.peak_mb > 30
