"""The three layouts hold the integers, bit for bit as the formats' own tools write them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from quant.config import FORMATS, Format, Grid  # noqa: E402
from quant.errors import NotExact  # noqa: E402
from quant.formats import PACKED_SUFFIX, shapes_of, size_of  # noqa: E402
from quant.pack import QuantizedLinear, pack, pack_words, unpack, unpack_words  # noqa: E402


def random_linear(n: int, k: int, grid: Grid, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    groups = k // grid.group_size
    q_NK = torch.randint(0, grid.max_level + 1, (n, k), generator=generator).to(torch.uint8)
    zero_NG = torch.randint(0, grid.max_level + 1, (n, groups), generator=generator).to(torch.uint8)
    if grid.symmetric:
        zero_NG.fill_(grid.middle)
    scale_NG = (torch.rand(n, groups, generator=generator) + 0.01).to(torch.float16)
    return QuantizedLinear(q_NK, scale_NG, zero_NG, grid)


def allowed(form: Format, grid: Grid) -> bool:
    return not (form == "awq" and grid.bits == 8) and not (form == "gptq" and not grid.symmetric)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    n_words=st.integers(1, 6),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_round_trip(form, bits, group_size, symmetric, n_words, groups, seed) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    if not allowed(form, grid):
        return
    n, k = 8 * n_words, group_size * groups
    linear = random_linear(n, k, grid, seed)
    tensors = pack(linear, form)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes_of(form, n, k, grid)
    suffix = PACKED_SUFFIX[form]
    assert size_of(form, suffix, tuple(tensors[suffix].shape), bits) == (n, k)
    again = unpack(tensors, form, grid)
    assert torch.equal(again.q_NK, linear.q_NK)
    assert torch.equal(again.zero_NG, linear.zero_NG)
    assert torch.equal(again.scale_NG, linear.scale_NG)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_words_equal_compressed_tensors_packer(bits: int, dim: int) -> None:
    oracle = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = torch.randint(0, 2**bits, (64, 96), generator=torch.Generator().manual_seed(bits + dim))
    signed = (values - 2 ** (bits - 1)).to(torch.int8)
    expected = oracle.pack_to_int32(signed, bits, packed_dim=dim)
    words = pack_words(values, bits, dim)
    assert torch.equal(words, expected)
    unpacked = oracle.unpack_from_int32(words, bits, torch.Size(values.shape), packed_dim=dim)
    assert torch.equal(unpacked, signed)


def test_awq_to_compressed_tensors_equals_its_own_converter() -> None:
    """compressed-tensors ships a converter of AutoAWQ checkpoints: it makes of ours the very tensors we write."""
    oracle = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    grid = Grid(group_size=32)
    linear = random_linear(48, 96, grid, 4)
    tensors = {f"model.layers.0.q_proj.{suffix}": tensor for suffix, tensor in pack(linear, "awq").items()}
    converted = oracle.AutoAWQConverter(group_size=32).process(tensors)
    expected = pack(linear, "compressed-tensors")
    assert converted.keys() == {f"model.layers.0.q_proj.{suffix}" for suffix in expected}
    for suffix, tensor in expected.items():
        assert torch.equal(converted[f"model.layers.0.q_proj.{suffix}"], tensor), suffix


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_dequantizes_to_our_weight(bits: int, symmetric: bool) -> None:
    compressor = pytest.importorskip("compressed_tensors.compressors").PackedQuantizationCompressor
    quantization = pytest.importorskip("compressed_tensors.quantization")
    linear = random_linear(48, 96, Grid(bits=bits, group_size=32, symmetric=symmetric), 5)
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    weight = compressor.decompress(pack(linear, "compressed-tensors"), scheme)["weight"]
    assert torch.allclose(weight.float(), linear.dequantize(), rtol=2**-10)


def test_awq_interleaves_columns() -> None:
    """Nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    (word,) = pack_words(torch.arange(8).view(1, 8), 4, 1, (0, 2, 4, 6, 1, 3, 5, 7)).view(-1).tolist()
    assert [(word >> (4 * slot)) & 15 for slot in range(8)] == [0, 2, 4, 6, 1, 3, 5, 7]


def test_gptq_v1_stores_zero_minus_one_and_both_versions_read() -> None:
    grid = Grid(bits=4, group_size=32, symmetric=True)
    tensors = pack(random_linear(16, 64, grid, 1), "gptq")
    assert set(tensors["qzeros"].flatten().tolist()) == {0x77777777}
    v2 = dict(tensors, qzeros=tensors["qzeros"] + 0x11111111)
    assert (unpack(v2, "gptq", grid, gptq_v2=True).zero_NG == 8).all()


def test_words_use_the_sign_bit() -> None:
    words = pack_words(torch.full((1, 8), 15), 4, 1)
    assert words.tolist() == [[-1]]
    assert (unpack_words(words, 4, 1) == 15).all()


def test_symmetric_forms_refuse_zero_points_and_desc_act() -> None:
    asymmetric = random_linear(16, 64, Grid(group_size=32), 2)
    with pytest.raises(NotExact, match="zero points"):
        pack(asymmetric, "gptq")
    grid = Grid(group_size=32, symmetric=True)
    tensors = pack(random_linear(16, 64, grid, 3), "gptq")
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(NotExact, match="desc_act"):
        unpack(tensors, "gptq", grid)


def test_ragged_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="12 values"):
        pack_words(torch.zeros(4, 12), 4, 1)
