"""Packed files hold each weight in its bits, give all back exactly, and say what is wrong with them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modules.quantization.attachment import attach_quantizers, bake, input_quantizers, set_bits, weight_quantizers
from modules.quantization.packing import load_packed, pack, packed_mib, read_packed, unpack, write_packed

BITS = {"0": 3, "3": 8, "6": 5}


def plain_network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 7, 3, groups=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 5),
        nn.Linear(5, 2),
    )


@pytest.fixture
def network():
    network = plain_network()
    network(torch.randn(4, 3, 8, 8))  # statistics of the norm
    attach_quantizers(network, ["0", "3", "6"])
    set_bits(network, BITS, {"0": 8, "3": 4})
    network(torch.randn(4, 3, 8, 8))  # ranges of the inputs
    return network.eval()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_bytes_are_what_a_loop_over_bits_writes(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    integers = torch.arange(low, low + 2**bits).repeat(2)[: 2**bits + 3].to(torch.int16)  # both ends, no whole byte
    stream = 0
    for position, integer in enumerate(integers.tolist()):
        stream |= (integer % 2**bits) << (position * bits)
    expected = stream.to_bytes(-(-len(integers) * bits // 8), "little")
    packed = pack(integers, bits)
    assert packed.numpy().tobytes() == expected
    assert torch.equal(unpack(packed, bits, integers.shape, signed), integers)


def test_a_plain_network_computes_what_the_quantized_one_does(network, tmp_path):
    path = write_packed(tmp_path / "folder" / "model.packed", network, {"classes": ["a", "b"]})
    images = torch.randn(6, 3, 8, 8)
    loaded = plain_network().eval()
    packed = load_packed(loaded, path)
    assert torch.equal(loaded(images), bake(network)(images)), "weights are the same to the last bit"
    assert {name: weight.bits for name, weight in packed.weights.items()} == BITS
    assert packed.facts == {"classes": ["a", "b"]}
    assert [file.name for file in path.parent.iterdir()] == ["model.packed"]


def test_integers_scales_and_grids_come_back(network, tmp_path):
    packed = read_packed(write_packed(tmp_path / "p", network))
    for name, quantizer in weight_quantizers(network).items():
        expected = quantizer.quantized(network.get_submodule(name).parametrizations.weight.original)
        found = packed.weights[name]
        assert torch.equal(found.integers, expected.integers)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero_point, expected.zero_point)
    assert packed.inputs.keys() == {"0", "3"}
    scale, zero_point, signed = input_quantizers(network)["3"].grid()
    grid = packed.inputs["3"]
    assert (grid.bits, grid.scale, grid.zero_point, grid.signed) == (4, float(scale), int(zero_point), signed)


def test_asymmetric_weights_keep_their_zero_points(tmp_path):
    layer = nn.Linear(6, 4)
    network = nn.Sequential(layer)
    attach_quantizers(network, ["0"], weight_scale="fixed", input_scheme=None)
    quantizer = weight_quantizers(network)["0"]
    quantizer.set_scale(torch.full((4,), 0.05), torch.tensor([3.0, 0.0, 7.0, 5.0]), signed=False)
    set_bits(network, {"0": 4})
    expected = network[0].weight.detach().clone()
    fresh = nn.Sequential(nn.Linear(6, 4))
    packed = load_packed(fresh, write_packed(tmp_path / "p", network))
    assert torch.equal(fresh[0].weight.detach(), expected)
    assert packed.weights["0"].zero_point.tolist() == [3, 0, 7, 5]


def test_the_file_is_as_large_as_its_bits(tmp_path):
    network = nn.Sequential(*(nn.Conv2d(64, 64, 3, bias=False) for _ in range(4)))
    attach_quantizers(network, list("0123"), input_scheme=None)
    set_bits(network, {"0": 2, "1": 3, "2": 5, "3": 8})
    numbers = 64 * 64 * 9
    integers = numbers * (2 + 3 + 5 + 8) // 8
    assert packed_mib(network) == pytest.approx(integers / 2**20)
    size = write_packed(tmp_path / "p", network).stat().st_size
    scales = 4 * 4 * 64
    assert 0 < size - integers - scales < 4 * 300


def test_without_bits_there_is_nothing_to_write(tmp_path):
    network = plain_network()
    attach_quantizers(network, ["0"])
    with pytest.raises(ValueError, match=r"model.packed: there is nothing to pack.* allocate bits first"):
        write_packed(tmp_path / "model.packed", network)
    assert not list(tmp_path.iterdir())


def test_another_network_is_named(network, tmp_path):
    path = write_packed(tmp_path / "p", network)
    other = plain_network()
    other[3] = nn.Conv2d(10, 8, 3)
    with pytest.raises(ValueError, match=r"p: does not fit Sequential: .*3.weight is \(7, 10, 3, 3\) in the file and"):
        load_packed(other, path)
    other = plain_network()
    other.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"2 tensors are missing in the file \(8.weight, 8.bias\)"):
        load_packed(other, path)
    with pytest.raises(ValueError, match=r"2 tensors are not in the network \(7.bias, 7.weight\)"):
        load_packed(plain_network()[:7], path)
    with pytest.raises(ValueError, match="is for a network without quantizers"):
        load_packed(network, path)


@pytest.mark.parametrize("kept", [0, 5, 400, -1])
def test_a_file_that_is_cut_short_is_not_read(network, tmp_path, kept):
    path = write_packed(tmp_path / "model.packed", network)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.packed: is not a readable packed file .*cut short"):
        read_packed(path)


def test_a_changed_byte_is_noticed_in_the_layer_it_is_in(network, tmp_path):
    path = write_packed(tmp_path / "p", network)
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    for name, message in (
        ("3.weight", r"1 layers are missing or damaged \(3\)"),
        ("6.weight.scale", r"1 layers are missing or damaged \(6\)"),
        ("1.running_var", "other than packed weights are damaged"),
    ):
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].view(-1)[0] += 1
        save_file(changed, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"p: .*{message}"):
            read_packed(path)
    save_file({key: value for key, value in tensors.items() if not key.startswith("0.")}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"1 layers are missing or damaged \(0\)"):
        read_packed(path)


def test_files_of_another_kind_are_told_from_packed_ones(network, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_packed(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "p", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="p: holds no packed weights"):
        read_packed(tmp_path / "p")
    path = write_packed(tmp_path / "p", network)
    metadata = safe_open(path, "pt").metadata()
    layers = json.loads(metadata["layers"])
    layers["0"]["bits"] = 9
    save_file(load_file(path), path, metadata={**metadata, "layers": json.dumps(layers)})
    with pytest.raises(ValueError, match=r"p: its description of layers is damaged \(0: bits: 9 is outside 2..8\)"):
        read_packed(path)
