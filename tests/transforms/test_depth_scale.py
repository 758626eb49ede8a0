import numpy as np
import pytest

from pave_lightning.errors import PaveError
from pave_lightning.transforms import make_transform, transformed
from pave_lightning.transforms.depth_scale import relative_depths
from pave_lightning.weights import Parameter, ParameterKind


def depths(*names):
    return relative_depths([Parameter(name, ParameterKind.OTHER, (1,)) for name in names])


@pytest.mark.parametrize(("first", "last"), [(0.5, 1.0), (1.0, 0.2), (0.0, 0.0)])
def test_the_factor_is_linear_in_the_block(first, last, source, arrays):
    found = arrays(transformed(source, [make_transform("depth_scale", {"first": first, "last": last})]))
    factors = {"layer.0": first, "layer.1": (first + last) / 2, "layer.2": last}
    for (task, name), vector in source.arrays.items():
        factor = factors.get(name[:7], first)  # what lies in no block
        assert found[task, name] == pytest.approx(factor * vector, rel=1e-6)


def test_the_last_block_stays_by_default(source, arrays):
    found = arrays(transformed(source, [make_transform("depth_scale", {"first": 0.25})]))
    assert np.array_equal(found["news", "layer.2.dense.weight"], source.arrays["news", "layer.2.dense.weight"])


def test_factors_of_adapters_are_scaled(adapted):
    scaled = transformed(adapted, [make_transform("depth_scale", {"first": 0.25})])
    parameter = adapted.parameters[3]
    left, right = scaled.factors("topic", parameter)
    assert (left @ right).numpy() == pytest.approx(0.625 * np.matmul(*adapted.pairs["topic", parameter.name]))


def test_depths_of_other_families():
    t5 = depths("encoder.block.0.layer.1.w", "encoder.block.3.layer.0.w", "decoder.block.0.w", "decoder.block.1.w")
    assert list(t5.values()) == [0, 1, 0, 1]
    assert depths("h.0.w", "h.12.w", "h.3.w") == {"h.0.w": 0, "h.12.w": 1, "h.3.w": 0.25}
    assert depths("0.weight", "4.weight", "pooler.weight") == {"0.weight": 0, "4.weight": 1}
    assert depths("heads.0.weight", "norm1.weight", "conv2d.weight") == {}


def test_a_model_without_blocks_is_told(source):
    transform = make_transform("depth_scale", {"first": 0.5})
    assert list(transform.problems(source)) == []
    source.parameters = source.parameters[:1]
    assert "no numbered blocks" in next(transform.problems(source))
    source.parameters = ()  # a base that cannot be read is told elsewhere
    assert list(transform.problems(source)) == []


def test_kinds_and_names_have_factors_beside_the_depth(source, arrays):
    options = {
        "first": 0.5,
        "kinds": {"embedding": 0.25, "bias": 3.0},
        "layers": {"layer.2.*": 0.1, "layer.*.weight": 2.0, "*": 7.0},
    }
    found = arrays(transformed(source, [make_transform("depth_scale", options)]))
    wanted = {
        "embeddings.weight": 0.5 * 0.25 * 7,
        "layer.0.dense.weight": 0.5 * 2,
        "layer.0.dense.bias": 0.5 * 3 * 7,
        "layer.1.dense.weight": 0.75 * 2,
        "layer.2.dense.weight": 1.0 * 0.1,  # the first pattern that matches counts
        "pooler.weight": 0.5 * 7,
    }
    for (task, name), vector in source.arrays.items():
        assert found[task, name] == pytest.approx(wanted[name] * vector, rel=1e-6)


def test_kinds_alone_leave_the_depth(source, arrays):
    found = arrays(transformed(source, [make_transform("depth_scale", {"kinds": {"linear": 0}})]))
    for (task, name), vector in source.arrays.items():
        factor = 0 if name in ("pooler.weight",) or "dense.weight" in name else 1
        assert found[task, name] == pytest.approx(factor * vector, rel=1e-6)


def test_kinds_with_two_words_may_be_written_with_an_underscore():
    assert make_transform("depth_scale", {"kinds": {"norm_scale": 0.5}}).options.kinds == {"norm scale": 0.5}
    with pytest.raises(PaveError, match=r"kinds\.attention"):
        make_transform("depth_scale", {"kinds": {"attention": 0.5}})


def test_what_scales_nothing_is_told(source):
    with pytest.raises(PaveError, match="it scales nothing; give factors"):
        make_transform("depth_scale", {"first": 1, "kinds": {}})
    options = {"kinds": {"convolution": 0.5}, "layers": {"layer.9.*": 0.5}}
    told = list(make_transform("depth_scale", options).problems(source))
    assert "layers: 'layer.9.*' matches no parameter" in told[0]
    assert told[1] == "kinds: the model has no parameter of kind 'convolution'"


def test_what_is_not_said_is_not_written():
    """Merged models are found by what the options say."""
    assert make_transform("depth_scale", {"first": 0.5}).options.model_dump() == {"first": 0.5, "last": 1.0}
