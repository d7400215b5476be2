"""What a flow of cells is conditioned on: vectors of compounds, doses, batches."""

import numpy as np
import pytest
import torch

from cellflux_bridge.base.errors import UserError
from cellflux_bridge.condition.base import ConditionEmbedding, ConditionSpec, Names
from cellflux_bridge.condition.batch import Batch
from cellflux_bridge.condition.dose import Dose
from cellflux_bridge.condition.embedding import Embedding

NAMES = Names(("DMSO", "a", "b"), ("p1", "p2"))
VECTORS = {"b": [3.0, 0.0], "a": [0.0, 4.0], "spare": [9.0, 9.0]}
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [0.5, 0.5, 0]])


@pytest.fixture
def table(tmp_path):
    def write(text: str | None = None):
        rows = [f"{name},{','.join(map(str, vector))}" for name, vector in VECTORS.items()]
        (tmp_path / "vectors.csv").write_text(text or "\n".join([",0,1", *rows]) + "\n")
        return tmp_path / "vectors.csv"

    return write


def embedded(*parts, width=6) -> ConditionEmbedding:
    torch.manual_seed(0)
    return ConditionEmbedding(ConditionSpec(parts), width, forms=("vector",))


def fields(**given) -> dict[str, torch.Tensor]:
    num = len(next(iter(given.values())))
    batch, dose = torch.full((num,), -1), torch.zeros(num)
    return {"batch": batch, "dose": dose, "target_level": torch.tensor([[0.0, 1, 0]]).repeat(num, 1), **given}


def test_a_class_is_its_vector_and_a_level_lies_between_whatever_the_order_of_the_table(table):
    module = embedded(Embedding(NAMES, 3, table=table(), dimension=2, without=["DMSO"]))
    module.prepare()
    spec = ConditionSpec(module._parts)
    cond = spec.read(fields(target_level=LABELS))
    assert cond.present["embedding"].tolist() == [False, True, True, True, True]
    torch.nn.init.normal_(module.nulls["embedding"])
    found, project = module(cond)[0], module.embedding.project
    scale = (25 / 4) ** 0.5  # of entries 3, 0, 0, 4
    expected = torch.tensor([[0, 0.0], [0, 4], [3, 0], [1.5, 2], [0, 2]]) / scale
    torch.testing.assert_close(found[1:], expected[1:] @ project.weight.T)
    torch.testing.assert_close(found[0], module.nulls["embedding"])
    assert not project.bias.any()
    assert "embedding.vectors" in module.state_dict(), "the vectors travel with the weights"


def test_vectors_begin_as_strong_as_those_of_classes(tmp_path):
    rng = np.random.default_rng(0)
    names = Names(tuple(f"c{n}" for n in range(40)))
    rows = [f"c{n},{','.join(map(str, (rng.random(512) < 0.05).astype(int)))}" for n in range(40)]
    (tmp_path / "bits.csv").write_text("\n".join([",".join(map(str, range(513))), *rows]))
    module = embedded(Embedding(names, 3, table=tmp_path / "bits.csv", dimension=512), Dose(names, 3), width=256)
    module.prepare()
    for part, value in (("embedding", torch.eye(40)), ("dose", torch.linspace(-3, 2, 40)[:, None])):
        size = module.get_submodule(part)(value).square().mean().sqrt()
        assert 0.5 < size < 2, part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",0,1\na,1,2\n", r"vectors.csv: has no row for 2 of 3 classes: DMSO, b; add them, or .* `without`"),
        (",0\na,1\n", r"vectors.csv: has vectors of 1 numbers, the configuration says dimension=2"),
        (",0,1\na,1,2\na,1,2\n", r"vectors.csv, row 3: 'a' stands twice"),
        (",0,1\na,1,x\n", r"vectors.csv: cannot be read as a table of vectors"),
        (",0,1\na,1,nan\n", r"row 2 holds NaN"),
        (",0,1\na,1\n", r"vectors.csv, line 2: 2 cells, but the header has 3"),
        (",0,1\nDMSO,0,0\na,0,0\nb,0,0\n", r"vectors.csv: all vectors are zero"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(table, text, message):
    module = embedded(Embedding(NAMES, 3, table=table(text), dimension=2))
    with pytest.raises(UserError, match=message):
        module.prepare()


def test_a_missing_table_and_an_unknown_class_are_told(tmp_path):
    with pytest.raises(UserError, match=r"none.csv: cannot be read"):
        embedded(Embedding(NAMES, 3, table=tmp_path / "none.csv", dimension=2)).prepare()
    with pytest.raises(UserError, match=r"embedding.without: no class 'dmso'"):
        Embedding(NAMES, 3, table=tmp_path / "none.csv", dimension=2, without=["dmso"])


def test_smiles_become_fingerprints(table):
    pytest.importorskip("rdkit", reason="fingerprints need RDKit: pip install 'cellflux-bridge[chem]'")
    text = "name,smiles\na,CCO\nb,c1ccccc1O\n"
    module = embedded(Embedding(NAMES, 3, table=table(text), dimension=1024, without=["DMSO"]))
    module.prepare()
    on = (module.embedding.vectors > 0).sum(1).tolist()
    assert on[0] == 0
    assert 3 <= on[1] < on[2] < 30  # ethanol has fewer environments of radius 2 than phenol
    module = embedded(Embedding(NAMES, 3, table=table("name,smiles\na,CCO\nb,C(C\n"), dimension=64, without=["DMSO"]))
    with pytest.raises(UserError, match=r"row 3: 'C\(C' is no SMILES"):
        module.prepare()


def test_a_dose_is_its_logarithm_and_none_is_absent():
    spec = ConditionSpec((Dose(NAMES, 3),))
    cond = spec.read(fields(dose=torch.tensor([0.0, 0.1, 1.0, 100.0])))
    assert cond.dose[1:, 0].tolist() == pytest.approx([-1, 0, 2])
    assert cond.present["dose"].tolist() == [False, True, True, True]
    assert torch.isfinite(cond.dose).all()


def test_a_batch_is_a_learned_vector_and_an_unknown_one_is_absent():
    module = embedded(Batch(NAMES, 3))
    cond = ConditionSpec(module._parts).read(fields(batch=torch.tensor([1, -1, 0])))
    torch.nn.init.normal_(module.nulls["batch"])
    expected = torch.stack([module.batch.weight[1], module.nulls["batch"], module.batch.weight[0]])
    torch.testing.assert_close(module(cond)[0], expected)
    with pytest.raises(UserError, match="batch needs data that names batches"):
        Batch(Names(("a", "b")), 3)


def test_each_part_is_lost_by_itself_and_permuted_with_its_presence():
    spec = ConditionSpec((Dose(NAMES, 3), Batch(NAMES, 3)))
    cond = spec.read(fields(dose=torch.tensor([0.0, 1, 10]), batch=torch.tensor([0, 1, -1])))
    less = cond.without("dose", torch.tensor([False, True, False]))
    assert less.present["dose"].tolist() == [False, False, True]
    assert less.present["batch"].tolist() == [True, True, False]
    turned = cond.permuted(["dose"], torch.tensor([2, 1, 0]))
    assert turned.present["dose"].tolist() == [True, True, False]
    assert turned.dose[0, 0] == 1
    assert torch.equal(turned.batch, cond.batch)
