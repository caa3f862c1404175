"""The table from dimension letters to mesh axes: what fits, where arrays lie, and what it says."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import ALL_SIZES, make_mesh, size_name

from jaxdecode.models.config import PRESETS, LlamaConfig
from jaxdecode.models.kv_cache import cache_tree
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.sharding import (
    AXES,
    RULES,
    Sharding,
    auto_sizes,
    describe,
    fit,
    fit_mesh,
)

CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=32, ffw_dim=48, num_layers=1, num_q_heads=8, num_kv_heads=8,
    head_dim=8,
)  # fmt: skip
FULL = Sharding(2, 2, 2)
ARRAYS = {
    "BT": P("data", None),
    "BSKH": P("data", "seq", "tensor", None),
    "B": P("data"),
    "BTV": P("data", None, ("tensor", "seq")),
    "D": P(None),
    "DNH": P(None, "tensor", "seq"),
    "D2KH": P(None, None, "tensor", "seq"),
    "NHD": P("tensor", "seq", None),
    "D2F": P(None, None, ("tensor", "seq")),
    "FD": P(("tensor", "seq"), None),
    "VD": P(("tensor", "seq"), None),
    "DV": P(None, ("tensor", "seq")),
}


def config_with(**changes) -> LlamaConfig:
    return dataclasses.replace(CONFIG, **changes)


# Where arrays lie
@pytest.mark.parametrize("letters", ARRAYS)
def test_specs_on_a_mesh_with_all_axes(letters):
    assert FULL.spec(letters) == ARRAYS[letters]


def test_the_specs_above_are_those_of_all_arrays_of_a_step():
    cache = cache_tree(CONFIG, 1, lambda letters: letters)
    used = {"BT", "BTV", *param_letters(CONFIG).values(), *jax.tree.leaves(cache)}
    assert used == set(ARRAYS)
    assert {axis for axes in RULES.values() for axis in axes} == set(AXES)


@pytest.mark.parametrize("letters", ARRAYS)
def test_one_device_cuts_nothing(letters):
    assert Sharding().spec(letters) == P(*[None] * len(letters))
    assert Sharding().parts(letters[0]) == 1


def test_axes_of_one_device_are_not_named():
    sharding = Sharding(1, 4, 1)
    assert sharding.spec("BSKH") == P(None, None, "tensor", None)
    assert sharding.spec("DNH") == P(None, "tensor", None)
    assert sharding.axes("F") == ("tensor",)
    assert (sharding.parts("F"), sharding.parts("S"), sharding.parts("B")) == (4, 1, 1)


def test_whole_letters_are_not_cut():
    sharding = Sharding(1, 2, 2, whole="V")
    assert sharding.spec("VD") == P(None, None)
    assert sharding.parts("V") == 1
    assert sharding.parts("F") == 4


@pytest.mark.parametrize("sizes", ALL_SIZES, ids=size_name)
def test_no_device_holds_a_weight_that_another_has_too(sizes):
    sharding = fit(CONFIG, dict(zip(AXES, sizes, strict=True)))
    shapes = param_shapes(CONFIG)
    for name, letters in param_letters(CONFIG).items():
        local = sharding.local_shape(letters, shapes[name])
        parts = 1 if name.endswith("scale") else sharding.tensor * sharding.seq
        assert math.prod(local) * parts == math.prod(shapes[name]), name


@pytest.mark.parametrize("sizes", ALL_SIZES, ids=size_name)
def test_local_shapes_are_those_of_jax(sizes):
    sharding = fit_mesh(CONFIG, make_mesh(sizes))
    assert sharding.num_devices == sharding.mesh.size
    shapes = param_shapes(CONFIG)
    arrays = {letters: shapes[name] for name, letters in param_letters(CONFIG).items()}
    for letters, shape in (arrays | {"BSKH": (8, 1024, 8, 8), "B": (8,)}).items():
        expected = sharding.named(letters).shard_shape(shape)
        assert sharding.local_shape(letters, shape) == expected, letters


# Meshes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes_of_both_kinds_fit_and_become_auto(kind):
    sharding = fit_mesh(CONFIG, make_mesh((2, 2, 2), kind=kind))
    assert sharding.mesh.axis_types == (AxisType.Auto,) * 3
    assert (sharding.data, sharding.tensor, sharding.seq) == (2, 2, 2)
    assert sharding.named("BSKH").spec == ARRAYS["BSKH"]


@pytest.mark.parametrize("axes", [("seq",), ("tensor", "data"), ("seq", "tensor"), ()])
def test_a_mesh_may_have_some_of_the_axes_in_any_order(axes):
    mesh = make_mesh((2,) * len(axes), axes)
    sharding = fit_mesh(CONFIG, mesh)
    assert {axis for axis in AXES if getattr(sharding, axis) == 2} == set(axes)
    for letters in ARRAYS:
        named = {axis for axes in sharding.cuts(letters) for axis in axes}
        assert named <= set(axes)
        sharding.named(letters)
    assert sharding.spec("F") == P(tuple(axis for axis in RULES["F"] if axis in axes) or None)


def test_the_order_of_the_devices_is_kept():
    mesh = make_mesh((2, 2, 2), backwards=True)
    sharding = fit_mesh(CONFIG, mesh)
    assert sharding.mesh.devices.tolist() == mesh.devices.tolist()
    assert sharding.mesh.devices.flat[0] == jax.devices()[7]
    array = jax.device_put(np.arange(4), sharding.named("S"))
    (last,) = (x for x in array.addressable_shards if x.device == jax.devices()[0])
    assert last.data.tolist() == [2, 3]


def test_equal_shardings_are_equal_keys():
    one, same, other = (
        fit_mesh(CONFIG, make_mesh((1, 2, 2), backwards=back)) for back in (False, False, True)
    )
    assert (one, hash(one)) == (same, hash(same))
    assert one != other


def test_a_sharding_without_devices_says_so():
    with pytest.raises(ValueError, match="this sharding has no mesh; make one with fit_mesh"):
        FULL.named("BSKH")


# What does not fit
def test_unknown_axes_are_named():
    message = "mesh axes must be among data, tensor, seq; found model, x"
    with pytest.raises(ValueError, match=message):
        fit(CONFIG, {"model": 2, "tensor": 2, "x": 1})
    with pytest.raises(ValueError, match="found x"):
        fit_mesh(CONFIG, make_mesh((2,), ("x",)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 0}, "mesh axis tensor=0 must be at least 1"),
        ({"data": -1}, "mesh axis data=-1 must be at least 1"),
        (
            {"tensor": 3},
            "mesh axis tensor=3 does not divide num_kv_heads=8 (divisors: 1, 2, 4, 8); "
            "tensor=2,seq=1 fits",
        ),
        (
            {"tensor": 16},
            "mesh axis tensor=16 does not divide num_kv_heads=8 (divisors: 1, 2, 4, 8); "
            "tensor=8,seq=2 fits",
        ),
        (
            {"seq": 16},
            "mesh axis seq=16 does not divide head_dim=8 (divisors: 1, 2, 4, 8); "
            "tensor=8,seq=2 fits",
        ),
        (
            {"tensor": 8, "seq": 4},
            "mesh axis tensor * seq=32 does not divide ffw_dim=48 "
            "(divisors: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48); tensor=8,seq=2 fits",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(CONFIG, sizes)
    if "fits" in message:  # and the advice is good
        tensor, seq = re.search(r"tensor=(\d+),seq=(\d+) fits", message).groups()
        fit(CONFIG, {"tensor": int(tensor), "seq": int(seq)})


def test_any_batch_axis_fits():
    assert fit(CONFIG, {"data": 7}) == Sharding(7)


def test_divisors_of_large_sizes_stop_at_a_thousand():
    with pytest.raises(ValueError, match=r"=4194304 \(divisors: 1, 2, .* 512, 1024\); tensor"):
        fit(config_with(ffw_dim=2**22, num_kv_heads=3, num_q_heads=6), {"tensor": 3})


# Vocabularies
@pytest.mark.parametrize(("vocab_size", "whole"), [(64, ""), (66, "V"), (63, "V")])
def test_a_vocabulary_that_does_not_divide_stays_whole(vocab_size, whole):
    config = config_with(vocab_size=vocab_size)
    sharding = fit(config, {"tensor": 2, "seq": 2})
    assert sharding.whole == whole
    assert sharding.parts("V") == (1 if whole else 4)
    assert fit(config, {"data": 8}).whole == ""
    text = describe(config, sharding)
    assert ("whole on each device" in text) == bool(whole)
    if whole:
        assert f"4 does not divide the vocabulary of {vocab_size}" in text


def test_describe_says_what_people_may_not_expect():
    assert describe(CONFIG, fit(CONFIG, {})) == "mesh: data=1, tensor=1, seq=1"
    assert describe(CONFIG, fit(CONFIG, {"tensor": 4, "data": 2})) == (
        "mesh: data=2, tensor=4, seq=1"
    )
    assert describe(CONFIG, fit(CONFIG, {"seq": 2})) == (
        "mesh: data=1, tensor=1, seq=2; the KV cache is cut along its length over seq"
    )


# Automatic meshes
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "devices", "tensor", "seq"),
    [
        (8, 8, 1, 1, 1),
        (8, 8, 8, 8, 1),
        (8, 8, 16, 8, 2),
        (8, 2, 2, 2, 1),
        (8, 2, 4, 2, 2),
        (8, 2, 8, 2, 4),
        (8, 1, 4, 1, 4),
        (9, 3, 3, 3, 1),
        (9, 3, 4, 1, 4),
        (9, 3, 6, 3, 2),
        (9, 3, 12, 3, 4),
        (12, 6, 4, 2, 2),
    ],
)
def test_auto_cuts_heads_first(num_q_heads, num_kv_heads, devices, tensor, seq):
    config = config_with(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    sizes = auto_sizes(config, devices)
    assert sizes == {"data": 1, "tensor": tensor, "seq": seq}
    assert fit(config, sizes).num_devices == devices
    assert ("over seq" in describe(config, fit(config, sizes))) == (seq > 1)


@pytest.mark.parametrize(
    ("changes", "devices", "fitting"),
    [
        ({"num_q_heads": 6, "num_kv_heads": 6}, 7, 6),
        ({"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 10, "ffw_dim": 45}, 8, 5),
        ({"num_kv_heads": 1}, 16, 8),
        ({"ffw_dim": 47}, 8, 1),
    ],
    ids=str,
)
def test_counts_that_do_not_fit_name_the_next_smaller(changes, devices, fitting):
    config = config_with(**changes)
    message = (
        rf"no mesh over {devices} devices divides num_kv_heads={config.num_kv_heads}, "
        rf"head_dim={config.head_dim} and ffw_dim={config.ffw_dim}; the next smaller number that "
        rf"fits is {fitting}$"
    )
    with pytest.raises(ValueError, match=message):
        auto_sizes(config, devices)
    assert math.prod(auto_sizes(config, fitting).values()) == fitting


@pytest.mark.parametrize("count", [0, -4])
def test_auto_needs_a_device(count):
    with pytest.raises(ValueError, match=f"num_devices must be at least 1, found {count}"):
        auto_sizes(CONFIG, count)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 64))
def test_auto_finds_a_mesh_whenever_there_is_one(name, devices):
    config = PRESETS[name]

    def fits(tensor, seq):
        try:
            return bool(fit(config, {"tensor": tensor, "seq": seq}))
        except ValueError:
            return False

    possible = [n for n in range(1, devices + 1) if devices % n == 0 and fits(n, devices // n)]
    if possible:
        sizes = auto_sizes(config, devices)
        assert sizes == {"data": 1, "tensor": max(possible), "seq": devices // max(possible)}
    else:
        with pytest.raises(ValueError, match="next smaller number that fits"):
            auto_sizes(config, devices)


# Inside shard_map
def over_devices(sharding: Sharding, function, x, letters: str, out: str):
    mapped = jax.shard_map(
        function, mesh=sharding.mesh, in_specs=sharding.spec(letters), out_specs=sharding.spec(out)
    )
    return np.asarray(jax.jit(mapped)(x))


@pytest.mark.parametrize("backwards", [False, True])
def test_sum_gather_and_index_go_over_the_axes_of_a_letter(backwards):
    sharding = fit_mesh(CONFIG, make_mesh((2, 2, 2), backwards=backwards))
    x = jnp.arange(8 * 8, dtype=jnp.float32).reshape(8, 8)
    total = over_devices(sharding, lambda x: sharding.sum(x.sum(0), "N"), x, "NB", "B")
    np.testing.assert_array_equal(total, x.sum(0))
    # Each axis once, even where two letters share it.
    total = over_devices(sharding, lambda x: sharding.sum(x.sum(0), "NF"), x, "FD", "D")
    np.testing.assert_array_equal(total, x.sum(0))
    index = over_devices(
        sharding, lambda x: x * 0 + sharding.index("F"), x[0].astype(jnp.int32), "F", "F"
    )
    assert index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    slots = over_devices(
        sharding, lambda x: x * 0 + sharding.index("S"), x[0].astype(jnp.int32), "S", "S"
    )
    assert slots.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]

    def gathered(part):
        whole = sharding.gather(part, "F", dimension=0)
        assert whole.shape == (8, 8)
        return whole[None] - x[None]

    # One row of zeros from every device that holds a part.
    assert not over_devices(sharding, gathered, x, "FD", "FDD").any()


def test_on_one_device_they_are_the_identity():
    sharding, x = Sharding(), jnp.arange(3)
    assert sharding.sum(x, "NHF") is x
    assert sharding.gather(x, "H", dimension=0) is x
    assert sharding.index("V") == 0
    assert sharding.constrain(x, "B") is x


def test_host_arrays_go_to_their_place_and_back():
    for sharding in (Sharding(), fit_mesh(CONFIG, make_mesh((2, 2, 2)))):
        placed = sharding.place(np.arange(4, dtype=np.int32), "B")
        assert placed.dtype == np.int32
        assert sharding.fetch(placed).tolist() == [0, 1, 2, 3]
        if sharding.mesh is not None:
            assert placed.sharding == sharding.named("B")


def test_constrain_moves_an_array_within_jit():
    sharding = fit_mesh(CONFIG, make_mesh((2, 2, 2)))
    for kind in (AxisType.Auto, AxisType.Explicit):
        x = jax.device_put(
            np.arange(8), jax.NamedSharding(make_mesh((2, 2, 2), kind=kind), P("tensor"))
        )
        moved = jax.jit(lambda x: sharding.constrain(x, "B"))(x)
        assert moved.sharding.spec == P("data")
        assert moved.tolist() == list(range(8))
