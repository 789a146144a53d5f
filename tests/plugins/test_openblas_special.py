"""What a header stands for: packed weights, exponentials, parts of layers; through MLX in children."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_openblas import child, with_library

ALL = os.environ.get("MLXLORA_TEST_ALL", "") not in ("", "0")
BUILDS = {"as built": (), "avx2": ("-DAT_MOST_AVX2",), "for any processor": ("-DPORTABLE",)}

START = """
import math
import mlx.core as mx
import numpy as np
from mlxlora_openblas import special
from mlxlora_openblas.runtime import start
{library}
note = start()
assert not note.warning and note.packed_product and note.exp_rows and note.layers, note
rng = np.random.default_rng(0)

def packed(outputs, inputs, group, bits, dtype=mx.float32):
    \"\"\"Words, scales, biases, and what they stand for.\"\"\"
    words = mx.array(rng.integers(0, 2**32, (outputs, inputs * bits // 32), dtype=np.uint32))
    drawn = rng.standard_normal((2, outputs, inputs // group)).astype(np.float32)
    scales, biases = (mx.array(part).astype(dtype) for part in drawn)
    values = (np.array(words)[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    values = values.reshape(outputs, -1, group).astype(np.float64)
    s, b = (np.array(p.astype(mx.float32)).astype(np.float64)[..., None] for p in (scales, biases))
    whole = (values * s + b).reshape(outputs, inputs)
    size = (np.abs(values * s) + np.abs(b)).reshape(outputs, inputs)
    return (words, scales, biases), whole, size
"""


@pytest.fixture(scope="module", params=BUILDS)
def built(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    compile_sgemm: Callable[..., Path],
) -> Path:
    """The library, for this processor and for lesser ones."""
    return compile_sgemm(tmp_path_factory.mktemp("special"), *BUILDS[request.param])


def run(built: Path, code: str, **environment: str) -> None:
    child(START.format(library=with_library(built)) + code, **environment)


def test_packed_products_are_those_of_numpy_for_every_kind_of_weight(built: Path) -> None:
    """All bits, groups and types, odd sizes, few rows and many, both ways, with one thread and with three.

    By day the large size, which takes the time, with one of the types for each bits and groups, in turn.
    """
    run(
        built,
        f"ALL = {ALL}"
        + """
sizes = ((1, 1), (33, 3), (77, 5), (700, 17))
for i, bits in enumerate((2, 4, 8)):
    for j, group in enumerate((32, 64, 128)):
        for k, dtype in enumerate((mx.float32, mx.float16, mx.bfloat16)):
            for outputs, groups in sizes if ALL or (i + j + k) % 3 == 0 else sizes[:-1]:
                parts, whole, size = packed(outputs, groups * group, group, bits, dtype)
                product = note.packed_product(*parts, group_size=group, bits=bits)
                for rows, threads in ((1, 1), (1, 3), (2, 3), (3, 1), (7, 3), (13, 1), (70, 3)):
                    note.set_threads(threads)
                    both = ((product.times, whole.T, size.T), (product.times_back, whole, size))
                    for times, right, most in both:
                        x = rng.standard_normal((rows, len(right))).astype(np.float32)
                        got = np.array(times(mx.array(x)))
                        assert got.shape == (rows, right.shape[1])
                        bound = (len(right) + 8) * 2.0**-24 * (np.abs(x) @ most)
                        apart = np.abs(got - x.astype(np.float64) @ right)
                        assert np.all(apart <= bound), (bits, group, dtype, rows, threads)
""",
    )


def test_each_of_up_to_sixteen_rows_has_the_same_bits_whatever_their_number(built: Path) -> None:
    run(
        built,
        """
for outputs, groups, bits in ((33, 3, 4), (700, 17, 4), (70, 5, 8), (70, 40, 2)):
    parts, _, _ = packed(outputs, groups * 32, 32, bits, mx.float16)
    product = note.packed_product(*parts, group_size=32, bits=bits)
    x = rng.standard_normal((16, groups * 32)).astype(np.float32)
    alone = np.concatenate([np.array(product.times(mx.array(row[None]))) for row in x])
    for rows in range(2, 17):
        note.set_threads(rows % 3 + 1)
        assert np.array_equal(np.array(product.times(mx.array(x[-rows:]))), alone[-rows:]), (bits, rows)
""",
    )


def test_many_rows_times_a_weight_of_many_pieces(built: Path) -> None:
    """More terms than a piece has, in both directions; the bits are those of any number of threads."""
    run(
        built,
        """
for outputs, groups, bits in ((1100, 80, 4), (2500, 9, 8), (70, 40, 2)):
    parts, whole, size = packed(outputs, groups * 32, 32, bits, mx.float16)
    product = note.packed_product(*parts, group_size=32, bits=bits)
    for times, right, most in ((product.times, whole.T, size.T), (product.times_back, whole, size)):
        x = rng.standard_normal((96, len(right))).astype(np.float32)
        found = []
        for threads in (1, 2, 3):
            note.set_threads(threads)
            found.append(np.array(times(mx.array(x))))
        bound = (len(right) + 8) * 2.0**-24 * (np.abs(x) @ most)
        assert np.all(np.abs(found[0] - x.astype(np.float64) @ right) <= bound), (outputs, bits)
        assert all(np.allclose(found[0], other, rtol=0, atol=bound.max()) for other in found)
""",
    )


def test_packed_products_of_views_and_of_what_mlx_quantizes(built: Path) -> None:
    run(
        built,
        """
weight = rng.standard_normal((96, 256)).astype(np.float32)
parts = mx.quantize(mx.array(weight), group_size=64, bits=4)
whole = np.array(mx.dequantize(*parts, group_size=64, bits=4)).astype(np.float64)
multiply = note.packed_product(*parts, group_size=64, bits=4).times
wide = mx.array(rng.standard_normal((2, 3, 300)).astype(np.float32))
same = mx.broadcast_to(wide[0, 0, :256], (4, 256))
many = mx.broadcast_to(wide[0, 0, :256], (20, 256))
for x in (many, wide[..., :256], wide[:, 1:2, 44:], wide[:1, :1, 10:266], same):
    got = np.array(multiply(x))
    assert got.shape == (*x.shape[:-1], 96)
    np.testing.assert_allclose(got, np.array(x).astype(np.float64) @ whole.T, atol=1e-4)
cut = [p[8:40] for p in parts]  # not at the beginning of their memory
x = wide[0, :, :256]
got = np.array(note.packed_product(*cut, group_size=64, bits=4).times(x))
np.testing.assert_allclose(got, np.array(x).astype(np.float64) @ whole[8:40].T, atol=1e-4)
# A scale that is no number, and one that float16 holds below its normal ones.
words, scales, biases = (mx.array(p) for p in parts)
half = scales.astype(mx.float16)
half[5, 2], half[7, 1], half[9, 0] = math.nan, math.inf, 3e-6
one = mx.ones((1, 256))
nothing = mx.zeros_like(half)
got = np.array(note.packed_product(words, half, nothing, group_size=64, bits=4).times(one))[0]
wide_scales = half.astype(mx.float32)
want = mx.quantized_matmul(one, words, wide_scales, mx.zeros((96, 4)), group_size=64, bits=4)
want = np.array(want)[0]
broken = ~np.isfinite(want)
assert broken.sum() == 2 and not np.isfinite(got[broken]).any()
np.testing.assert_allclose(got[~broken], want[~broken], atol=1e-4)
""",
    )


def test_a_product_that_is_computed_later_keeps_what_it_needs(built: Path) -> None:
    run(
        built,
        """
parts, whole, _ = packed(512, 1024, 64, 4)
x = rng.standard_normal((1, 1024)).astype(np.float32)
multiply = note.packed_product(*parts, group_size=64, bits=4).times
later = multiply(mx.array(x))
del parts, multiply
mx.clear_cache()
waste = [mx.full((512, 128), 7, mx.uint32) for _ in range(50)]
mx.eval(waste)
np.testing.assert_allclose(np.array(later), x.astype(np.float64) @ whole.T, atol=0.05)
""",
    )


def test_what_is_no_header_to_the_letter_is_a_product_and_what_was_one_gives_no_number(built: Path) -> None:
    run(
        built,
        """
parts, whole, _ = packed(64, 128, 64, 4)
seen = []
true = mx.depends
mx.depends = lambda product, rest: seen.append(product) or true(product, rest)
x = mx.array(rng.standard_normal((1, 128)).astype(np.float32))
multiply = note.packed_product(*parts, group_size=64, bits=4).times
header = multiply.__closure__[multiply.__code__.co_freevars.index("header")].cell_contents
one = mx.as_strided(x, (1, 1), (1, 1))
copy = mx.array(np.array(header))
zeros = mx.zeros(64)
added = [mx.addmm(zeros, one, header, alpha=2.0), mx.addmm(zeros, one, header, beta=0.5)]
for product in (*added, one @ copy, one @ header[:, :32], one @ (header * 1.0), header.T @ one):
    assert np.isnan(np.array(product)).any(), product.shape
slope = mx.grad(lambda x: multiply(x).sum())(x)
assert np.isnan(np.array(slope)).any()
rows, columns = (rng.standard_normal(shape).astype(np.float32) for shape in ((70, 1), (1, 90)))
np.testing.assert_array_equal(np.array(mx.array(rows) @ mx.array(columns)), rows * columns)
for wrong in (dict(bits=3), dict(bits=8), dict(group_size=32), dict(group_size=48)):
    assert note.packed_product(*parts, **(dict(group_size=64, bits=4) | wrong)) is None
words, scales, biases = parts
assert note.packed_product(words, scales.astype(mx.float16), biases, group_size=64, bits=4) is None
assert note.packed_product(words.view(mx.int32), scales, biases, group_size=64, bits=4) is None
assert note.packed_product(words[None], scales[None], biases[None], group_size=64, bits=4) is None
""",
    )


def test_packed_products_by_tiles_keep_within_their_bound(built: Path) -> None:
    """Where there are tiles: all bits, groups and types, odd sides, both ways, one thread and three."""
    run(
        built,
        """
tried = [(bits, dtype) for bits in (2, 4, 8) for dtype in (mx.float32, mx.float16, mx.bfloat16)]
for compute, share in (("bfloat16", 2.0**-7), ("bfloat16x3", 3 * 2.0**-18)) if note.set_precision else ():
    for (bits, dtype), (outputs, inputs, group, rows) in zip(
        tried * 2, ((301, 160, 32, 33), (161, 2304, 64, 70), (1500, 256, 128, 47)) * 6
    ):
        parts, whole, size = packed(outputs, inputs, group, bits, dtype)
        product = note.packed_product(*parts, group_size=group, bits=bits)
        for multiply, right, most in ((product.times, whole.T, size.T), (product.times_back, whole, size)):
            x = rng.standard_normal((rows, len(right))).astype(np.float32)
            found = []
            for threads in (1, 3):
                note.set_threads(threads)
                note.set_precision(compute)
                found.append(np.array(multiply(mx.array(x))))
                note.set_precision("float32")
            bound = (share + 2.0**-23 * len(right)) * (np.abs(x) @ most)
            assert (np.abs(found[0] - x @ right) <= bound).all(), (compute, bits, dtype, outputs, inputs)
            np.testing.assert_array_equal(*found)
            assert np.any(found[0] != np.array(multiply(mx.array(x))))
    words, scales, biases = parts
    product = note.packed_product(words, scales * 3e38, biases, group_size=group, bits=bits)
    note.set_precision(compute)
    got = np.array(product.times(mx.array(x[:, :256])))
    note.set_precision("float32")
    np.testing.assert_array_equal(got, np.array(product.times(mx.array(x[:, :256]))))
""",
    )


def test_parts_of_layers_are_those_of_numpy(built: Path) -> None:
    """Every length of a row around that of a vector, with one thread and with three; each row by itself."""
    run(
        built,
        """
layers, eps = note.layers, 1e-3
for shape in ((1, 2), (3, 14), (5, 16), (2, 7, 18), (2, 3, 700, 34), (40, 1030)):
    for threads in (1, 3):
        note.set_threads(threads)
        x, dy, cosines = (rng.standard_normal(shape).astype(np.float32) * 3 for _ in range(3))
        wide, d = x.astype(np.float64), dy.astype(np.float64)
        s = 1 / (1 + np.exp(-wide))
        f = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)
        powers = np.exp(wide)
        turned = cosines[0] if len(shape) > 2 else cosines
        while turned.ndim > 2:
            turned = turned[0]
        beside = wide.reshape(-1, 2)[:, ::-1].reshape(shape)
        pull = (wide * d).mean(-1, keepdims=True) * f**2
        mean = (powers * d).sum(-1, keepdims=True) / powers.sum(-1, keepdims=True)
        gate, slope = mx.array(x), mx.array(dy)
        for got, want in (
            (layers.silu_times(gate, slope), wide * s * d),
            (layers.silu_slope(gate, slope), s * (1 + wide * (1 - s)) * d),
            (layers.normalise(gate, eps), wide * f),
            (layers.normalise_back(gate, slope, eps), (d - wide * pull) * f),
            (layers.rotation(mx.array(turned), mx.array(-turned))(gate), (wide - beside) * turned),
            (layers.softmax_back(mx.array(powers.astype(np.float32)), slope), powers * (d - mean)),
        ):
            size = np.abs(want).max()
            np.testing.assert_allclose(np.array(got), want, rtol=1e-5, atol=4e-6 * size)
        assert np.array_equal(np.array(gate), x) and np.array_equal(np.array(slope), dy)
        rows = layers.normalise(gate, eps).reshape(-1, shape[-1])
        assert mx.array_equal(rows[-1:], layers.normalise(gate.reshape(-1, shape[-1])[-1:], eps))
ends, one = mx.array([-math.inf, math.inf, math.nan, -200.0, 200.0]), mx.ones(5)
got = np.array(layers.silu_times(ends, one)), np.array(layers.silu_slope(ends, one))
assert got[0][1] == math.inf and list(got[0][3:]) == [0, 200] and list(got[1][3:]) == [0, 1], got
assert np.isnan([got[0][2], got[1][2]]).all()
view = mx.array(rng.standard_normal((6, 20, 30)).astype(np.float32)).swapaxes(0, 2)
assert mx.allclose(layers.silu_times(view, view), view * view * mx.sigmoid(view), atol=1e-6)
""",
    )


def test_exponentials_of_rows_are_those_of_numpy(built: Path) -> None:
    run(
        built,
        """
shapes = ((1,), 0), ((3, 1), 1), ((7, 33), 0), ((2, 3, 8, 40), 8), ((2, 10, 16), 5), ((4, 100, 700), 50)
for shape, queries in shapes:
    for threads in (1, 3):
        note.set_threads(threads)
        x = rng.uniform(-60, 60, shape).astype(np.float32)
        wide = x.astype(np.float64)
        if queries:
            seen = np.arange(shape[-1] - queries, shape[-1])[:, None] >= np.arange(shape[-1])
            wide = np.where(seen, wide.reshape(-1, queries, shape[-1]), -np.inf).reshape(shape)
        want = np.exp(wide - wide.max(-1, keepdims=True))
        got = np.array(note.exp_rows(mx.array(x), queries))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-38)
        assert not queries or np.array_equal(got == 0, want < 1e-45) or (got[want == 0] == 0).all()
x = rng.standard_normal((4, 50)).astype(np.float32)
x[1, 0] = x[2, 49] = x[3, 20] = math.nan
x[0, :10] = -math.inf
got = np.array(note.exp_rows(mx.array(x), 0))
assert np.isfinite(got[0]).all() and (got[0, :10] == 0).all() and np.isnan(got[1:]).any(axis=1).all()
whole = mx.array(rng.standard_normal((6, 20, 30)).astype(np.float32))
for view in (whole.swapaxes(0, 2), whole[:, 3:7], whole[::2, :, 1::3]):
    v = np.array(view).astype(np.float64)
    want = np.exp(v - v.max(-1, keepdims=True))
    np.testing.assert_allclose(np.array(note.exp_rows(view, 0)), want, rtol=1e-5)
special.MOST = 3  # more than a product can take is left to MLX
for queries in (0, 4):
    got = np.array(note.exp_rows(mx.ones((1, 4, 8)), queries))
    assert got.shape == (1, 4, 8) and (got.sum() == 32 if not queries else got[0, 0].sum() == 5)
""",
    )


def test_rows_are_changed_in_place_but_never_what_others_hold(built: Path) -> None:
    run(
        built,
        """
for shape in (1, 5), (3, 1), (5, 2011), (300, 40), (2, 49152):
    for threads in (1, 3):
        note.set_threads(threads)
        x = rng.uniform(-60, 60, shape).astype(np.float32)
        factors = rng.standard_normal((shape[0], 1)).astype(np.float32)
        wide = x.astype(np.float64)
        highest = wide.max(-1, keepdims=True)
        want = wide - highest - np.log(np.exp(wide - highest).sum(-1, keepdims=True))
        given, by = mx.array(x), mx.array(factors)
        got = note.log_softmax(given)
        np.testing.assert_allclose(np.array(got), want, rtol=1e-6, atol=1e-6)
        assert np.array_equal(np.array(given), x)
        powers = np.array(note.scaled_exp(got, by))
        np.testing.assert_allclose(powers, factors * np.exp(want), rtol=2e-5, atol=1e-38)
        np.testing.assert_allclose(np.array(got), want, rtol=1e-6, atol=1e-6)
        mx.set_cache_limit(0)
        mx.reset_peak_memory()
        held, size = mx.get_active_memory(), x.nbytes
        mx.eval(note.scaled_exp(note.log_softmax(mx.array(x) + 0), by))
        assert size < 2**18 or mx.get_peak_memory() - held < 2.5 * size
view = mx.array(rng.standard_normal((30, 20)).astype(np.float32)).T
np.testing.assert_allclose(np.exp(np.array(note.log_softmax(view)).astype(np.float64)).sum(1), 1, rtol=1e-6)
x = rng.standard_normal((4, 50)).astype(np.float32)
x[1, 0] = x[2, 49] = x[3, 20] = math.nan
x[0, :10] = -math.inf
got = np.array(note.log_softmax(mx.array(x)))
assert (got[0, :10] == -math.inf).all() and np.isfinite(got[0, 10:]).all() and np.isnan(got[1:]).all()
assert note.log_softmax(mx.zeros((0, 4))).shape == (0, 4)
""",
    )
