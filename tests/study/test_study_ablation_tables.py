"""The gate under shift, one setting varied at a time, and reconstruction, as tables."""

import pytest
from made_up_study import B16, cell, made_up, rows

from hf_vs2.study.documents.tables import study_markdown


def section(document: str, start: str) -> list[list[str]]:
    """The rows of the section whose heading starts so, without the head of its table."""
    (found,) = [part for part in document.split("\n## ")[1:] if part.startswith(start)]
    return rows(found, "")[2:]


def test_gate_shift_has_coverage_and_table_3_beside_it() -> None:
    """Accuracy of a gated model means little without the share it steers; table 3's figures are for that union alone."""
    names = {"cifar100": "A", "cub200": "B", "tiny_imagenet": "C", "sun397": "D"}
    union = ["cifar100", "cub200", "tiny_imagenet"]
    shift = ("gate_shift",)
    cells = [cell("clip", 50.0, dataset="sun397", sections=shift)]
    for seed, coverage in ((0, 0.10), (1, 0.20)):
        cells.append(
            cell("vs2", 45.0 + seed, -5.0 + seed, "sun397", seed, sections=shift, params={"trained_on": union})
        )
        for gate in (0.9, 0.99):
            params = {"trained_on": union, "gate": gate}
            cells.append(cell("vs2+gate", 51.0, 1.0, "sun397", seed, sections=shift, params=params, coverage=coverage))
    about = {name: {"title": title, "registry": name} for name, title in names.items()}
    document = study_markdown(made_up(about, cells))
    assert "one SAE trained on A + B + C" in document
    expected = [
        "D",
        "50.00 [51.79]",
        "45.50 ± 0.71 (-4.50) [45.78]",
        "51.00 ± 0.00 (+1.00); 15.0 % steered",
        "51.00 ± 0.00 (+1.00) [51.92; 7 % steered]; 15.0 % steered",
    ]
    assert rows(document, "D")[0] == expected
    # The same with another union: nothing published is the same.
    for one in cells[1:]:
        one.cell.params["trained_on"] = union[:2]  # type: ignore[index]
    (row,) = rows(study_markdown(made_up(about, cells)), "D")
    assert "[" not in "".join(row[2:])


def test_a_gate_that_could_not_be_had_is_told() -> None:
    """Few held-out rows cannot vouch for q 0.99: a row under that head with another gate is not table 3's cell."""
    union = ["cifar100", "cub200", "tiny_imagenet"]
    about = {name: {"registry": name} for name in union}
    shift = [
        cell("vs2+gate", 51.0, 1.0, "cub200", seed, params={"trained_on": union, "gate": 0.99}, gate=gate)
        for seed, gate in ((0, 0.96), (1, 0.99))
    ]
    for one in shift:
        one.sections = ["gate_shift"]
    share = cell(
        "vs2+gate", 52.0, 2.0, "cub200", 0, sections=("share",), params={"share": 0.01, "gate": 0.99}, gate=0.75
    )
    document = study_markdown(made_up(about, [*shift, share]))
    assert section(document, "Gate under shift")[0][-1] == "51.00 ± 0.00 (+1.00); 100.0 % steered at q 0.96"
    assert section(document, "Share") == [["0.01", "52.00 (+2.00); 100.0 % steered at q 0.75"]]


def test_a_union_with_data_sets_that_this_run_left_out() -> None:
    """`--datasets` measures a part of a study: the SAE of the union still has its data sets' names, and no figure of table 3."""
    union = ["cifar100", "cub200", "tiny_imagenet"]
    cells = [cell("clip", 50.0, dataset="cub200", sections=("table", "gate_shift"))]
    cells += [cell("vs2", 48.0, -2.0, "cub200", 0, sections=("gate_shift",), params={"trained_on": union})]
    document = study_markdown(made_up({"cub200": {"title": "Birds", "registry": "cub200"}}, cells))
    assert "one SAE trained on cifar100 + Birds + tiny_imagenet" in document
    assert rows(document, "Birds (in the union)") == [["Birds (in the union)", "50.00 [51.76]", "48.00 (-2.00)"]]


def test_ablations_list_each_value_and_mark_the_tables_own() -> None:
    """A row under the wrong value, or a mean over two values, would turn an ablation's message around."""
    cells = [
        cell("vs2", 60.0 + k, float(k), seed=0, sections=("top_k",), params={"top_k": k}, held_out_fvu=0.5)
        for k in (32, 8, 16)
    ]
    cells += [cell("centroid", 70.0, 1.0, sections=("share",))]
    cells += [cell("centroid", 65.0, -4.0, seed=0, sections=("share",), params={"share": 0.01})]
    weights = {"pass_weight": 0.5}
    cells += [cell("vs2_pass", 71.0, 2.0, seed=0, sections=("pass",), params=weights, held_out_fvu=0.4)]
    document = study_markdown(made_up({"set": {"registry": "cifar100"}}, cells, B16))
    assert section(document, "SAE sparsity k (VS2)") == [
        ["8", "68.00 (+8.00); FVU 0.500"],
        ["16 (as in the tables)", "76.00 (+16.00); FVU 0.500"],
        ["32", "92.00 (+32.00); FVU 0.500"],
    ]
    assert section(document, "Share of the unlabelled") == [
        ["0.01", "65.00 (-4.00)"],
        ["1 (as in the tables)", "70.00 (+1.00)"],
    ]
    assert section(document, "PASS trade-off") == [["0.5", "71.00 (+2.00); FVU 0.400"]]
    assert "w_aux 0.5 [70.40, FVU 0.4887]" in document  # the paper's, for B/16 on CIFAR-100


@pytest.mark.parametrize(
    ("name", "param", "method", "varied", "standard"),
    [
        ("top_k", "top_k", "vs2", 8, 16),
        ("expansion", "expansion_factor", "vs2", 2, 4),
        ("share", "share", "vs2+gate", 0.1, 1),
        ("neighbors", "num_neighbors", "vs2++", 5, 50),
        ("pass", "pass_weight", "vs2_pass", 0.1, 0.8),
    ],
)
def test_the_tables_own_cell_is_its_value_of_an_ablation(
    name: str, param: str, method: str, varied: float, standard: float
) -> None:
    """The cell of the main table, which does not say what it did not vary, is the row of the standard value, beside one that does."""
    cells = [
        cell(method, 60.0, 1.0, seed=0, sections=("table", name)),
        cell(method, 50.0, -9.0, seed=0, sections=(name,), params={param: varied}),
        cell(method, 64.0, 5.0, seed=1, sections=(name,), params={param: standard}),
        cell(method, 54.0, -5.0, seed=1, sections=(name,), params={param: varied}),
    ]
    study = made_up({"set": {}}, cells)
    study.meta["defaults"] |= {"num_neighbors": 50, "pass_weight": 0.8}
    (ablation,) = [part for part in study_markdown(study).split("\n## ")[1:] if f"| {varied} |" in part]
    assert "n = 2 SAE seeds." in ablation
    first, second = rows(ablation, "")[2:]
    assert [first[0], second[0]] == [f"{varied}", f"{standard} (as in the tables)"]
    assert first[1].startswith("52.00 ± 2.83 (-7.00)") and second[1].startswith("62.00 ± 2.83 (+3.00)")


def test_fvu_is_that_of_each_saes_once_beside_the_papers() -> None:
    """Rows of two prompt sets share their SAEs: counted twice they would make the deviation too small."""
    cells = [
        cell("vs2", 60.0, seed=seed, prompts=prompts, held_out_fvu=0.2 + 0.1 * seed)
        for prompts in ("single", "ensemble")
        for seed in (0, 1)
    ]
    document = study_markdown(made_up({"set": {"registry": "cifar100"}}, cells))
    assert section(document, "Reconstruction") == [["enc", "A set", "0.2500 ± 0.0707 [0.2812]"]]
