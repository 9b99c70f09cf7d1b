"""DeepLesion as published: HU, boxes, parts, and folders that are not as published."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from models.lecl.deeplesion import DeepLesion
from models.lecl.sources import BadSource, Box, CTImage

HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
)
ROWS, COLUMNS = 40, 48  # of the DeepLesion slices here; not square, so that x and y cannot be mistaken
BOX = "11, 6, 21.5, 16"  # as the table has it, counting pixels from 1


def row(file="000001_01_01_109.png", patient=1, box=BOX, noisy=0, spacing="0.7, 0.8, 5", part=1) -> str:
    """One line of DL_info.csv, quoted as the published one is."""
    index = int(file[-7:-4])
    return (
        f'{file},{patient},1,1,{index},"12, 7, 20, 15, 13, 8, 16.5, 11","{box}","11.3, 5.1","0.4, 0.3, 0.4",3,{noisy},'
        f'"103, 115","{spacing}","{ROWS}, {COLUMNS}","-175, 275",F,62,{part}'
    )


def write_deeplesion(folder: Path, *rows: str, header: str = HEADER) -> dict[str, np.ndarray]:
    """The published layout with these rows; the HU by file name."""
    (folder / "DL_info.csv").write_text("\n".join([header, *rows]) + "\n")
    written = {}
    for name in {line.split(",")[0] for line in rows}:
        series, index = name[:-8], name[-7:]
        random = np.random.default_rng(int(name[-7:-4]))
        written[name] = random.integers(-2048, 3000, (ROWS, COLUMNS)).astype(np.int16)
        path = folder / "Images_png" / series / index
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), (written[name].astype(np.int32) + 32768).astype(np.uint16))
    return written


def same(one: CTImage, other: CTImage) -> bool:
    return np.array_equal(one.hu, other.hu) and (one.spacing_mm, one.boxes) == (other.spacing_mm, other.boxes)


def test_a_deeplesion_slice_is_its_png_less_32768_with_all_its_boxes_from_zero(tmp_path):
    second = row(box="2, 3, 9, 10.25")
    hu = write_deeplesion(tmp_path, row(), row("000002_03_02_007.png", patient=2), second)

    source = DeepLesion(tmp_path)

    assert [*source.patients] == ["deeplesion-1", "deeplesion-2"]
    assert same(
        source[0],
        CTImage(hu["000001_01_01_109.png"], (0.8, 0.7), (Box(10, 5, 20.5, 15), Box(1, 2, 8, 9.25))),
    )
    assert same(source[1], CTImage(hu["000002_03_02_007.png"], (0.8, 0.7), (Box(10, 5, 20.5, 15),)))
    assert source[0].hu.dtype == np.int16


def test_deeplesions_own_parts_are_kept_apart_and_noisy_rows_left_out(tmp_path):
    rows = [
        row(f"{patient:06d}_01_01_010.png", patient, part=part) for patient, part in ((1, 1), (2, 2), (3, 3), (4, 1))
    ]
    write_deeplesion(tmp_path, *rows, row("000005_01_01_010.png", 5, noisy=1), row(rows[0][:20], 1, "2, 2, 9, 9", 1))

    parts = {part: DeepLesion(tmp_path, part) for part in ("train", "val", "test")}

    assert {part: [*source.patients] for part, source in parts.items()} == {
        "train": ["deeplesion-1", "deeplesion-4"],
        "val": ["deeplesion-2"],
        "test": ["deeplesion-3"],
    }
    assert parts["train"][0].boxes == (Box(10, 5, 20.5, 15),)


def test_slices_of_deeplesion_without_a_row_are_not_offered(tmp_path):
    write_deeplesion(tmp_path, row())
    key = tmp_path / "Images_png/000001_01_01/109.png"
    key.with_name("110.png").write_bytes(key.read_bytes())

    assert len(DeepLesion(tmp_path)) == 1


def test_the_margin_of_a_deeplesion_box_ends_at_the_slices_edge(tmp_path):
    write_deeplesion(tmp_path, row(box=f"-3, -2.5, {COLUMNS + 4}, {ROWS + 5}"))

    assert DeepLesion(tmp_path)[0].boxes == (Box(0, 0, COLUMNS - 1, ROWS - 1),)


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ("-5, 6, 21, 16", r"DL_info.csv line 2: box x -6 to 20.*expected x within 0 to 47 and y within 0 to 39"),
        ("11, 6, 54, 16", r"line 2: box x 10 to 53"),
        ("11, 6, 21, 46", r"y 5 to 45, expected"),
        ("21, 6, 11, 16", r"line 2: box x 20 to 10.*expected x0 < x1"),
        ("11, 6, 21", r"line 2: Bounding_boxes holds 3 values, expected 4"),
        ("11, 6, 21, Jane", r"line 2: Bounding_boxes is text, expected a finite number"),
        ("11, 6, 21, nan", r"line 2: Bounding_boxes is text, expected a finite number"),
    ],
)
def test_a_deeplesion_box_that_cannot_be_is_named_by_its_line(tmp_path, box, said):
    write_deeplesion(tmp_path, row(box=box))

    with pytest.raises(BadSource, match=said):
        DeepLesion(tmp_path)


def test_a_deeplesion_folder_that_is_not_as_published_is_refused(tmp_path):
    with pytest.raises(BadSource, match=r"no file DL_info.csv, expected a table with File_name"):
        DeepLesion(tmp_path)

    write_deeplesion(tmp_path, row(), header=HEADER.replace("Spacing_mm_px_", "Spacing"))
    with pytest.raises(BadSource, match=r"lacks Spacing_mm_px_: found 18 columns, of them File_name, Patient_index"):
        DeepLesion(tmp_path)

    write_deeplesion(tmp_path, row(spacing="0, 0, 5"))
    with pytest.raises(BadSource, match=r"line 2: pixels of 0 x 0 mm"):
        DeepLesion(tmp_path)

    write_deeplesion(tmp_path, row())
    with pytest.raises(BadSource, match=r"no row of the part 'val'"):
        DeepLesion(tmp_path, "val")
    with pytest.raises(BadSource, match=r"no part 'all' of DeepLesion, expected one of train, val, test"):
        DeepLesion(tmp_path, "all")


def test_a_png_that_is_missing_or_not_of_16_bits_is_named(tmp_path):
    write_deeplesion(tmp_path, row(), row("000002_01_01_007.png", 2))
    path = tmp_path / "Images_png/000002_01_01/007.png"

    path.write_bytes(path.read_bytes()[:33])  # signature and header
    with pytest.raises(BadSource, match=r"000002_01_01/007.png cannot be decoded, expected a 16-bit PNG"):
        DeepLesion(tmp_path)[1]

    cv2.imwrite(str(path), np.zeros((ROWS, COLUMNS), np.uint8))
    with pytest.raises(BadSource, match=r"000002_01_01/007.png has 8 bits and colour type 0, expected 16 bits of gray"):
        DeepLesion(tmp_path)
    cv2.imwrite(str(path), np.zeros((ROWS, COLUMNS, 3), np.uint16))
    with pytest.raises(BadSource, match=r"has 16 bits and colour type 2"):
        DeepLesion(tmp_path)
    path.write_bytes(b"no picture")
    with pytest.raises(BadSource, match=r"000002_01_01/007.png is no PNG"):
        DeepLesion(tmp_path)
    path.unlink()
    with pytest.raises(
        BadSource, match=r"1 of 2 slices of the part 'train' are not there, the first Images_png/0.*/007"
    ):
        DeepLesion(tmp_path)
