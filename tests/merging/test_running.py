"""Running any method: what it is fed, what is refused, and what matrix methods share."""

import numpy as np
import pytest
import torch

from pave_lightning.errors import PaveError
from pave_lightning.merging import MatrixMethod, MatrixOptions, StaticMethod, merge
from pave_lightning.merging.methods.average import Average
from pave_lightning.merging.methods.emr import Emr
from pave_lightning.merging.methods.ties import Ties

MATRIX = "a"


@pytest.fixture
def source_of(make_source):
    def build(vectors, **options):
        return make_source(vectors, matrices=[MATRIX], low_rank=True, **options)

    return build


def test_methods_that_are_not_elementwise_get_whole_tensors(make_source, random_vectors):
    shapes = []

    class Whole(Average):
        elementwise = False

        def merge(self, parameter, base, vectors):
            shapes.append(tuple(base.shape))
            return super().merge(parameter, base, vectors)

    merge(Whole(), make_source(random_vectors, elements=2))
    assert shapes == [(7, 5), (11,), (3, 2, 2), ()]


@pytest.mark.parametrize("method", [Average(), Emr()], ids=["static", "per task"])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_experts(method, count, make_source, random_vectors):
    few = dict(list(random_vectors.items())[:count])
    with pytest.raises(PaveError, match=f"merging needs at least two experts, found {count}"):
        merge(method, make_source(few))


@pytest.mark.parametrize("method", [Average(), Emr()], ids=["static", "per task"])
def test_nothing_in_common(method, make_source):
    with pytest.raises(PaveError, match="share no floating-point tensor"):
        merge(method, make_source({"a": {}, "b": {}}))


def test_what_is_no_matrix_is_averaged_summed_or_left(source_of, random_vectors):
    class Matrices(MatrixMethod):
        summary = source = "a test"

        def merge_matrix(self, parameter, base, vectors):
            return torch.full_like(base, 7.0).double()

    source = source_of(random_vectors)
    total = sum(named["b"] for named in random_vectors.values())
    for others, expected in (("mean", total / 3), ("sum", total), ("base", 0 * total)):
        merged = merge(Matrices(MatrixOptions(others=others)), source)
        assert np.allclose(merged.vectors["b"].numpy(), expected, atol=1e-6)
        assert (merged.vectors[MATRIX] == 7).all()
        assert merged.vectors[MATRIX].dtype == torch.float32


def test_transposed_weights_are_merged_as_output_by_input(make_source, random_vectors):
    seen = []

    class Matrices(MatrixMethod):
        summary = source = "a test"

        def merge_matrix(self, parameter, base, vectors):
            seen.append(tuple(base.shape))
            return sum(vectors.values())

    merged = merge(Matrices(), make_source(random_vectors, transposed=[MATRIX]))
    assert seen == [(5, 7)]
    assert np.allclose(merged.vectors[MATRIX], sum(named[MATRIX] for named in random_vectors.values()))


def test_a_method_may_rescale_once_it_has_seen_everything(make_source, random_vectors):
    class Rescaled(Average):
        rescales = True

        def prepare(self, vectors):
            self.largest = 0.0

        def merge(self, parameter, base, vectors):
            merged = super().merge(parameter, base, vectors)
            self.largest = max(self.largest, float(merged.abs().max()))
            return merged

        def factor(self, parameter):
            return 1 / self.largest

    plain, scaled = merge(Average(), make_source(random_vectors)), merge(Rescaled(), make_source(random_vectors))
    largest = max(float(vector.abs().max()) for vector in plain.vectors.values())
    for name, vector in plain.vectors.items():
        assert torch.allclose(scaled.vectors[name], vector / largest)


def test_a_method_tells_everything_that_is_wrong_before_it_begins(make_source, random_vectors):
    class Choosy(StaticMethod):
        name = "choosy"
        summary = source = "a test"

        def problems(self, vectors, evidence):
            yield "first"
            yield "second"

        def prepare(self, vectors):
            raise AssertionError("begun")

        def merge(self, parameter, base, vectors):
            raise AssertionError("begun")

    with pytest.raises(PaveError, match=r"merge method 'choosy' cannot merge these experts:\n  - first\n  - second"):
        merge(Choosy(), make_source(random_vectors))


def test_a_method_may_be_called_by_its_name(source_of, random_vectors):
    source = source_of(random_vectors)
    for name, method in (("ties", Ties()), ("emr", Emr())):
        found, expected = merge(name, source), merge(method, source)
        assert found.vectors.keys() == expected.vectors.keys() != set()
        assert all(torch.equal(found.vectors[key], value) for key, value in expected.vectors.items())
        assert found.rescalers == expected.rescalers
    with pytest.raises(PaveError, match="unknown merge method 'tiess'; did you mean 'ties'"):
        merge("tiess", source)
    with pytest.raises(TypeError, match=r"expected a merge method such as Ties\(\), or the name of one, found <class"):
        merge(Ties, source)
