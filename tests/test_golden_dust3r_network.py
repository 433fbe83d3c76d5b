"""The network of DUSt3R against the reference: tiny weights with every intermediate, and the weights of the full model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fvgen.models.dust3r import Dust3rNetwork, convert_dust3r, load_dust3r
from fvgen.models.dust3r.checkpoint import network_arguments
from fvgen.models.dust3r.key_map import dust3r_key_map, reference_shapes, standard_state, unused_reason
from fvgen.models.dust3r.stored import key_report
from fvgen.utils.errors import UserError
from tests import golden_dust3r as reference

pytestmark = pytest.mark.golden
CONFIG = "tiny_config"


def _run(network: Dust3rNetwork, values: dict[str, Tensor], training: bool) -> Any:
    flags = [values[f"true_shape{i}"][:, 0] > values[f"true_shape{i}"][:, 1] if training else None for i in (1, 2)]
    with torch.no_grad():
        return network(values["img1"], values["img2"], *flags)


def _check(maps: Any, values: dict[str, Tensor]) -> None:
    for result, points, confidence in zip(maps, ("pts3d", "pts3d_in_other_view"), ("conf1", "conf2"), strict=True):
        assert result.points.dtype == result.confidence.dtype == torch.float32
        reference.assert_points_close(result.points, values[points])
        torch.testing.assert_close(result.confidence, values[confidence], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize("case", [c for c in reference.cases("manifest_tiny") if c != CONFIG])
def test_point_maps(case: str) -> None:
    training = "landscape_only on" in reference.manifest("manifest_tiny")[case]["description"]
    values = reference.tensors(case)
    if training:
        portrait = values["true_shape1"][:, 0] > values["true_shape1"][:, 1]
        assert portrait.any()
        assert not portrait.all()
    _check(_run(reference.tiny_network(), values, training), values)


@pytest.mark.usefixtures("golden_device")
def test_every_intermediate() -> None:
    network, values = reference.tiny_network(), reference.tensors("tiny_landscape")
    seen: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {f"enc_block{i}": block for i, block in enumerate(network.encoder)}
    watched["enc_features"] = network.encoder_norm
    for number in (1, 2):
        watched |= {f"dec{number}_block{i}": b for i, b in enumerate(getattr(network, f"decoder_{number}"))}
        head = getattr(network, f"head_{number}")
        watched |= {f"refinenet{i + 1}_head{number}": fusion for i, fusion in enumerate(head.fusions)}
        watched[f"head_raw_{number}"] = head

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            tokens = network.patch_embedding(torch.cat([values["img1"], values["img2"]])).flatten(2).transpose(1, 2)
            features = network.encode(torch.cat([values["img1"], values["img2"]]))
            first, second = features[:2], features[2:]
            depths = network._decoders(first, second)
            network.decode(first, second)
    finally:
        for hook in hooks:
            hook.remove()
    seen["patch_tokens"], seen["patch_positions_yx"] = tokens, features.positions()
    seen["dec1_final_normed"], seen["dec2_final_normed"] = depths[0][-1], depths[1][-1]
    outputs = {"pts3d", "pts3d_in_other_view", "conf1", "conf2"}
    inputs = {"img1", "img2", "true_shape1", "true_shape2"}
    assert set(seen) == set(values) - outputs - inputs
    for name, actual in seen.items():
        scale = float(values[name].abs().max())
        torch.testing.assert_close(actual / scale, values[name] / scale, rtol=0.0, atol=2e-5, check_dtype=False, msg=name)


def test_heads_read_the_depths_of_the_manifest() -> None:
    assert list(reference.tiny_network().head_depths) == reference.manifest("manifest_tiny")[CONFIG]["hooks"]
    with torch.device("meta"):
        assert list(Dust3rNetwork().head_depths) == reference.manifest("keys_512_dpt")["dpt_head"]["hooks"]


def test_full_model_has_the_reference_weights() -> None:
    entry = reference.manifest("keys_512_dpt")
    keys: dict[str, list[int]] = entry["keys"]
    with torch.device("meta"):
        network = Dust3rNetwork()
        state = {k: torch.empty(shape) for k, shape in keys.items()}
    assert reference_shapes(network) == {name: tuple(shape) for name, shape in keys.items()}
    used = standard_state(state)
    names = dust3r_key_map(network)
    assert set(used) == set(names.values())
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    assert shapes == {name: keys[theirs] for name, theirs in names.items()}
    unused = {k for k in keys if unused_reason(k)}
    assert unused == set(entry["keys_present_but_never_used_in_forward"])
    assert set(keys) - set(used) - unused == set(entry["aliased_keys"])
    told = key_report(state, network)
    counts = (told["in_the_checkpoint"], told["converted"], told["second_names_of_the_same_tensor"])
    assert counts == (len(keys), len(names), len(entry["aliased_keys"]))
    assert {key for found in told["unused"].values() for key in found} == unused
    left_out = sum(state[k].numel() for k in unused)
    assert sum(p.numel() for p in network.parameters()) + left_out == entry["n_parameters_unique"]


@pytest.mark.parametrize("kept", ["layer_rn", "layer1_rn"])
def test_an_alias_may_be_missing(kept: str) -> None:
    state = reference.tensors("tiny_weights")
    one = {k: v for k, v in state.items() if "_rn." not in k or (".layer_rn." in k) == (kept == "layer_rn")}
    assert len(one) == len(state) - 8
    network = convert_dust3r(one, **reference.tiny_arguments())
    for name, value in reference.tiny_network().state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_one_decoder_stands_for_both() -> None:
    state = {k: v for k, v in reference.tensors("tiny_weights").items() if not k.startswith("dec_blocks2.")}
    network = convert_dust3r(state, **reference.tiny_arguments())
    first, second = network.decoder_1.state_dict(), network.decoder_2.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["0.norm_self.weight"].data_ptr() != second["0.norm_self.weight"].data_ptr()
    expected = reference.tiny_network().decoder_1.state_dict()
    assert all(torch.equal(first[k], expected[k]) for k in first)


def test_conversion_is_strict() -> None:
    state, arguments = reference.tensors("tiny_weights"), reference.tiny_arguments()
    with pytest.raises(UserError, match=r"1 not known \(extra\.weight\)"):
        convert_dust3r(state | {"extra.weight": torch.zeros(1)}, **arguments)
    with pytest.raises(UserError, match=r"1 missing \(dec_norm\.bias\)"):
        convert_dust3r({k: v for k, v in state.items() if k != "dec_norm.bias"}, **arguments)
    with pytest.raises(UserError, match=r"1 of another shape \(dec_norm\.bias has 3 instead of"):
        convert_dust3r(state | {"dec_norm.bias": torch.zeros(3)}, **arguments)


def test_constructor_arguments_of_the_full_model() -> None:
    given = reference.manifest("keys_512_dpt")["constructor_args"]
    names = ("pos_embed", "head_type", "output_mode", "enc_embed_dim", "enc_depth", "enc_num_heads")
    names += ("dec_embed_dim", "dec_depth", "dec_num_heads", "mlp_ratio", "qkv_bias", "norm_im2_in_dec")
    text = ", ".join(f"{k}={given[k]!r}" for k in names)
    text += ", img_size=(512, 512), depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), patch_embed_cls='ManyAR_PatchEmbed'"
    with torch.device("meta"):
        default = Dust3rNetwork().config
    for name, value in network_arguments(f"AsymmetricCroCo3DStereo({text})").items():
        assert default[name] == value, name


def test_saved_and_loaded(tmp_path) -> None:
    """Through diffusers' own format and through a checkpoint file, the same outputs to the bit."""
    values = reference.tensors("tiny_portrait")
    expected = _run(reference.tiny_network(), values, training=False)
    reference.tiny_network().save_pretrained(tmp_path / "own")
    torch.save({"model": reference.tensors("tiny_weights")}, tmp_path / "tiny.pth")
    for network in (
        Dust3rNetwork.from_pretrained(tmp_path / "own"),
        load_dust3r(tmp_path / "tiny.pth", **reference.tiny_arguments()),
    ):
        for actual, wanted in zip(_run(network, values, training=False), expected, strict=True):
            assert torch.equal(actual.points, wanted.points)
            assert torch.equal(actual.confidence, wanted.confidence)


def test_heads_stay_in_float32_under_autocast() -> None:
    values = reference.tensors("tiny_landscape")
    dtypes = []
    hook = reference.tiny_network().head_1.conv_3.register_forward_hook(lambda _m, _i, output: dtypes.append(output.dtype))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            maps = _run(reference.tiny_network(), values, training=False)
    finally:
        hook.remove()
    assert dtypes == [torch.float32]
    assert maps[0].points.dtype == torch.float32
