"""The sources of pretraining on real slices, and splits by patient."""

import csv
import json
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ct.decode import read_hu
from models.ct.series import read_slices
from models.lecl.archive import Archive
from models.lecl.sources import BadSource, Concat, CTImage, Source, Subset, leave_out, split


def test_the_boxes_of_a_real_nodule_lie_on_the_nodule(data, lidc_0001, tmp_path):
    readers = json.loads((data / "lidc-idri-0001/annotations.json").read_text())["annotations"]
    contours = [each for reader in readers for each in reader["contours"]]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("sop_uid", "x0", "y0", "x1", "y1"), *((each["SOPInstanceUID"], *each["bbox_xyxy"]) for each in contours)]
        )

    source = Archive(Path(os.path.commonpath(lidc_0001)), tmp_path / "boxes.csv")

    lesions = [image for image in source if image.boxes]
    assert (len(source), len(set(source.patients)), len(lesions)) == (133, 1, 9)
    assert sum(len(image.boxes) for image in lesions) == len(contours) == 32
    for number, image in enumerate(lesions):
        for box in image.boxes:
            x0, y0, x1, y1 = (int(edge) for edge in (box.x0, box.y0, box.x1, box.y1))
            down, across = (y1 - y0 + 1) // 4, (x1 - x0 + 1) // 4
            middle = image.hu[y0 + down : y1 + 1 - down, x0 + across : x1 + 1 - across].mean()
            around = image.hu[y0 - 25 : y1 + 26, x0 - 25 : x1 + 26].astype(float)
            around[25 : 26 + y1 - y0, 25 : 26 + x1 - x0] = np.nan
            lung = np.nanpercentile(around, 10)
            assert lung < -700
            assert middle > lung + 300
            assert middle > -300 or number in (0, 8)  # the nodule's ends are half air


def test_real_files_of_every_kind_are_read_or_set_aside(data, caplog):
    caplog.set_level(logging.INFO)

    source = Archive(data / "oddities")

    assert len(source) == len(set(source.sop_uids)) == 12
    for reason in ("not_axial", "localizer", "multiframe", "not_ct"):
        assert f"'{reason}'" in caplog.text


def test_five_of_the_hundred_tcga_files_are_instances_that_were_there_already(data, tmp_path):
    with tarfile.open(next((data / "tcga-luad-lusc-contrast").glob("*.tar.xz"))) as packed:
        packed.extractall(tmp_path, filter="data")

    source = Archive(tmp_path)

    assert (len(source), len(set(source.patients))) == (95, 54)
    by_hand = {read_slices(path)[0].sop_uid: path for path in tmp_path.rglob("*.dcm")}[source.sop_uids[0]]
    assert np.array_equal(source[0].hu, read_hu(by_hand).round())


class Numbered:
    """A source whose slices say which they are."""

    def __init__(self, *patients: str) -> None:
        self.patients = patients

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> CTImage:
        return CTImage(np.full((1, 1), range(len(self))[index], np.int16), (1.0, 1.0))


def numbers_of(source: Source) -> list[int]:
    return [int(source[index].hu[0, 0]) for index in range(len(source))]


@given(
    patients=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    folds=st.integers(1, 10),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_is_a_partition_in_which_no_patient_straddles(patients, folds, seed):
    different = len(set(patients))
    if folds > different:
        with pytest.raises(BadSource, match=f"{different} patients for {folds} folds"):
            split(patients, folds, seed)
        return

    parts = split(patients, folds, seed)

    assert sorted(index for part in parts for index in part) == list(range(len(patients)))
    held = [{patients[index] for index in part} for part in parts]
    assert sum(map(len, held)) == different
    assert max(map(len, held)) - min(map(len, held)) <= 1
    backwards = split(patients[::-1], folds, seed)
    assert [{patients[::-1][index] for index in part} for part in backwards] == held


def test_another_seed_splits_otherwise():
    patients = [f"p{number}" for number in range(20)]
    assert split(patients, 4, seed=1) != split(patients, 4, seed=2)


def test_a_subset_and_a_concatenation_keep_slices_with_their_patients():
    one, two = Numbered("a", "b", "a"), Numbered("b", "c")

    both = Concat(one, two)
    part = Subset(both, (4, 0, 3))

    assert (numbers_of(both), [*both.patients]) == ([0, 1, 2, 0, 1], ["a", "b", "a", "b", "c"])
    assert (numbers_of(part), [*part.patients]) == ([1, 0, 0], ["c", "a", "b"])
    assert len(list(part)) == 3  # a for loop ends


def test_leaving_patients_out_leaves_all_their_slices_out_of_every_source():
    both = Concat(Numbered("a", "b", "a"), Numbered("b", "c"))

    assert [*leave_out(both, {"b"}).patients] == ["a", "a", "c"]
    with pytest.raises(BadSource, match="1 of 2 patients to leave out have no slice") as refused:
        leave_out(both, {"a", "secret"})
    assert "secret" not in str(refused.value)
