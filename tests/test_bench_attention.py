"""The bench of attention: its bags, the window that is right, and whole runs where the answer is known beforehand."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bench.attention import (
    ASKED,
    by_window,
    chosen_window,
    last_line,
    measure_attention,
    report,
    right_window,
    slices_to_embed,
)
from bench.bags import Bag, Ground, WholeSeries, make_bags, plan_name
from bench.entries import DEFAULT, Entry, league
from bench.fidelity import CONFIGS, chosen
from bench.material import Material, Plan, gather, gather_whole
from bench.patients import SINGLE_SLICES, Nodule, Series
from bench.pooling import Head
from models.abmil import ABMIL, Ensemble
from models.ct.phantom import Identity, chest, write_series
from models.ct.slices import encoder_input
from models.ct.windows import ABDOMEN, LUNG, WINDOWS, Window, apply_window

SLICES, SIZE = 24, 96
SUSPECT = (9, 10, 11)


def patient(number: int) -> Series:
    """A synthetic chest; the first patient is said to have a nodule."""
    phantom = chest(seed=number, lesion=False, slices=SLICES, size=SIZE)
    hu = np.round(phantom.hu).astype(np.int16)
    series = Series(f"series-{number}", f"patient-{number}", hu, np.arange(SLICES) * 10.0, phantom.spacing_mm)
    if number:
        return series
    nodule = Nodule(series.patient, hu[9:12].astype(np.float32), hu[9:12] > 0, series.spacing_mm)
    return replace(series, nodule=nodule, nodule_slices=(10,), suspect_slices=SUSPECT)


@pytest.fixture(scope="module")
def material():
    series = [patient(number) for number in range(6)]
    random = np.random.default_rng(0)
    plans = [Plan(each.name, each, make_bags(WholeSeries(each), 12, random)) for each in series]
    folds = [frozenset(f"patient-{number}" for number in range(first, 6, 2)) for first in range(2)]
    return Material(series, [], folds, {0: plans}, {})


def test_a_bag_is_every_slice_but_those_of_a_real_nodule(material):
    for plan in material.plans[0]:
        assert len(plan.bags) >= 8
        for bag, partner in zip(plan.bags[::2], plan.bags[1::2], strict=True):
            assert bag.slices == tuple(k for k in range(SLICES) if k not in plan.series.suspect_slices)
            assert 1 <= len(bag.lesion) <= len(bag.slices) / 10
            assert (partner.slices, partner.lesion, partner.conspicuous) == (bag.slices, (), bag.conspicuous)


def test_whole_series_and_runs_are_stored_under_names_of_their_own():
    series, donor = patient(1), patient(0).nodule

    # The first is what caches hold since the first run of bench/fidelity.py.
    assert plan_name(Ground(series), 2, 64, [donor]) == "recipe1-series-1-seed2-bags64-patient-0"
    assert plan_name(WholeSeries(series), 2, 64, [donor]) == "whole-recipe1-series-1-seed2-bags64-patient-0"


def test_both_benches_hold_the_same_patients_out_together(tmp_path):
    for number, name in enumerate(("lidc-idri-0001", "lung-fused-ct-0001", "cptac-pda-c3l-00189")):
        phantom = chest(seed=number, lesion=False, slices=20, size=64)
        write_series(tmp_path / "data" / name, phantom.hu, phantom.spacing_mm, Identity(f"SYNTHETIC-{number}"))
    for number in range(3):
        folder = tmp_path / "data" / SINGLE_SLICES
        (path,) = write_series(folder / "one", phantom.hu[:1], phantom.spacing_mm, Identity(f"SINGLE-{number}"))
        path.rename(folder / f"{number}_CONTRAST_0.dcm")
    (folder / "one").rmdir()
    told = []

    runs, whole = (
        how(tmp_path / "data", tmp_path / "cache", 3, range(1), 2, lambda: told.append(1))
        for how in (gather, gather_whole)
    )

    assert runs.folds == whole.folds
    assert [series.name for series in runs.series] == [series.name for series in whole.series]
    assert {bag.slices for plan in whole.plans[0] for bag in plan.bags} == {tuple(range(20))}
    assert not {plan.name for plan in runs.plans[0]} & {plan.name for plan in whole.plans[0]}
    assert len(told) == 6


@pytest.mark.parametrize(
    ("before", "after", "window"),
    [
        (-850, -600, "lung"),
        (45, 105, "abdomen"),
        (-850, -100, "lung"),
        (60, -10, "abdomen"),
        (-850, 30, None),  # 0.46 and 0.44: a solid nodule is seen at either
        (270, 900, "lung"),
    ],
)
def test_the_right_window_is_where_the_picture_changes_most(before, after, window):
    hu = np.full((5, 8, 8), before, np.int16)
    planted = hu[[1, 3, 4]].copy()
    planted[1:, 2:5, 3:6] = after
    planted[0] = 3000  # changed, but not among the slices that show the lesion
    bag = Bag("series", "patient", (0, 1, 2, 3, 4), lesion=(3, 4), changed=(1, 3, 4), planted=planted)
    series = Series("series", "patient", hu, np.arange(5.0), (1.0, 1.0, 1.0))

    assert right_window(bag, series, (ABDOMEN, LUNG)) == WINDOWS.get(window)
    assert right_window(bag, series, (LUNG, ABDOMEN)) == WINDOWS.get(window)
    assert right_window(replace(bag, lesion=(), changed=(), planted=None), series, (ABDOMEN, LUNG)) is None


def test_the_chosen_window_has_most_of_the_attention_on_the_lesion():
    attention = np.array([[0.5, 0.1], [0.1, 0.0], [0.0, 0.2], [0.1, 0.0]])  # (slices, windows)

    assert chosen_window(attention, (1, 2), (ABDOMEN, LUNG)) == LUNG
    assert chosen_window(attention, (3,), (ABDOMEN, LUNG)) == ABDOMEN


def test_attention_by_window_sums_to_that_by_slice_and_is_its_networks_own():
    torch.manual_seed(0)
    networks = [ABMIL(6, 1, hidden=8) for _ in range(2)]
    for network in networks:
        torch.nn.init.normal_(network.w.weight, std=5.0)
    head = Head(
        Ensemble(networks, one_of_n=False).eval(), np.full((2, 6), 0.5, np.float32), np.ones((2, 6), np.float32)
    )
    features = np.random.default_rng(0).normal(size=(7, 2, 6)).astype(np.float32)

    found = by_window(head, features)

    expected = np.zeros((7, 2))
    for network in networks:
        with torch.no_grad():
            scores = [
                [float(network.score(network.encoder(torch.from_numpy(instance - 0.5)))) for instance in slice]
                for slice in features
            ]
        expected += np.exp(scores) / np.exp(scores).sum() / 2
    np.testing.assert_allclose(found, expected, rtol=0.03)  # bags are float16
    np.testing.assert_allclose(found.sum(axis=1), head.read(features)[1], rtol=1e-6)


@dataclass(frozen=True)
class Knowing:
    """Knows every clean slice; `seeing` the difference from it at each window, or nothing but noise."""

    clean: np.ndarray  # (slices, windows, size, size)
    seeing: bool
    windows: tuple[Window, ...] = (ABDOMEN, LUNG)
    input_size: int = 32

    @property
    def id(self) -> str:
        return f"knowing-{self.seeing}"

    def encode(self, slices):
        noise = np.random.default_rng(0).normal(size=(*slices.shape[:2], 4)).astype(np.float32)
        for each, features in zip(slices, noise, strict=True):
            apart = np.abs(self.clean - each).mean(axis=(2, 3))  # (clean, windows)
            if self.seeing:
                features[:, 0] = 1000 * apart[apart.sum(axis=1).argmin()]
        return noise


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def heard():
    """What the runs said: patients held out as encoders were asked for, and slices as they were embedded."""
    return {"held_out": [], "slices": []}


@pytest.fixture(scope="module")
def measured(material, cache, heard):
    """By an encoder that sees every lesion, and by one that sees none."""
    clean = np.concatenate(
        [
            np.stack([encoder_input(hu.astype(np.float32), (ABDOMEN, LUNG), 32) for hu in series.hu])
            for series in material.series
        ]
    )

    def entry(name: str, seeing: bool) -> Entry:
        return Entry(name, lambda held_out: heard["held_out"].append(held_out) or Knowing(clean, seeing))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.heads.evaluation.BOOTSTRAP_DRAWS", 2)  # of the heads' own report, which nobody reads here
        return {
            name: measure_attention(entry(name, seeing), material, cache, heard["slices"].append, lambda: None)
            for name, seeing in ((DEFAULT, True), ("blind", False))
        }


def test_every_fold_asks_for_an_encoder_that_never_saw_its_patients(measured, material, heard):
    assert measured.keys() == {DEFAULT, "blind"}
    assert heard["held_out"] == 2 * material.folds
    assert sum(heard["slices"]) == 2 * slices_to_embed(material)


def test_attention_finds_what_the_encoder_shows_and_nothing_else(measured):
    seeing, blind = (measured[name].figures() for name in (DEFAULT, "blind"))

    for task in ("conspicuous", "all"):
        for name in ("abmil_auroc", "max_auroc", "hit_at_1", "hit_at_5"):
            assert seeing[f"{name}/{task}"].value > 0.85, (name, task)
        assert seeing[f"lesion_mass_over_uniform/{task}"].value > 4
        assert abs(blind[f"hit_at_1/{task}"].value - blind[f"chance_hit_at_1/{task}"].value) < 0.2
        assert blind[f"lesion_mass_over_uniform/{task}"].value == pytest.approx(1, abs=0.5)


def test_a_second_run_opens_no_encoder(measured, material, cache):
    def encoder(held_out):
        raise AssertionError

    again = measure_attention(Entry(DEFAULT, encoder), material, cache, lambda done: None, lambda: None)

    assert vars(again) == vars(measured[DEFAULT])


def test_a_window_counts_as_right_by_the_lesion_and_not_by_the_head(measured):
    seeing = measured[DEFAULT]
    right, abdomen, lung = (seeing.values[f"window_right{name}/all"] for name in ("", "_abdomen", "_lung"))

    assert 0 < len(right) == len(abdomen) + len(lung) <= len(seeing.values["hit_at_1/all"])
    assert sorted(right) == sorted(abdomen + lung)
    assert seeing.figures()["window_right/all"].value > 0.7


def test_the_last_line_is_of_the_default_encoder(measured):
    line = last_line(measured)

    assert json.loads(json.dumps(line)) == line
    assert line["encoder"] == DEFAULT
    assert line["encoders"].keys() == {DEFAULT, "blind"}
    assert line["lesion_mass_over_uniform"] == line["encoders"][DEFAULT]["lesion_mass_over_uniform"]
    assert {
        "abmil_auroc",
        "mean_auroc",
        "max_auroc",
        "hit_at_1",
        "chance_hit_at_1",
        "hit_at_5",
        "chance_hit_at_5",
        "window_right",
    } <= line.keys()


def test_the_tables_hold_encoders_chance_and_what_was_planted(measured, material, capsys):
    report(measured, material)

    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "chance" in line]
    assert len(rows) == 3  # two tasks, and the real nodule
    assert str((SLICES + 1) / 2) in rows[2]
    assert all(series.name in printed for series in material.series)


def test_the_default_encoder_and_lite0_are_measured_unless_others_are_asked_for(tmp_path):
    everyone = league(tmp_path, CONFIGS)

    assert {entry.name for entry in chosen(everyone, ASKED)} == {DEFAULT, "imagenet_lite0"}
    assert [entry.name for entry in chosen(everyone, "planting")] == ["planting"]


def test_windows_agree_with_the_definition_by_pixel(material):
    (plan, *_) = material.plans[0]
    for bag in plan.bags[::2]:
        sums = {ABDOMEN.name: 0.0, LUNG.name: 0.0}
        for place, planted in zip(bag.changed, bag.planted, strict=True):
            before = plan.series.hu[bag.slices[place]]
            for window in (ABDOMEN, LUNG) if place in bag.lesion else ():
                for old, new in zip(before.ravel(), planted.ravel(), strict=True):
                    if old != new:
                        two = apply_window(np.array([old, new], np.float32), window)
                        sums[window.name] += abs(float(two[1] - two[0]))

        less, more = sorted(sums, key=sums.get)
        expected = WINDOWS[more] if sums[more] >= 1.5 * sums[less] else None
        assert right_window(bag, plan.series, (ABDOMEN, LUNG)) == expected
