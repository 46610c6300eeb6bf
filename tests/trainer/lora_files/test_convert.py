"""Reading and writing LoRA files, in small: each rule with matrices of a few numbers, and what is expected by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from trainer.lora_files import convert, key_names
from trainer.lora_files.weights import LoraWeights
from trainer.storage.safetensors_header import OUTLINE

OUT = "lora_unet_double_blocks_0_img_attn_proj"
TO_OUT = "transformer.transformer_blocks.0.attn.to_out.0"
SINGLE = "transformer.single_transformer_blocks.0"
PARTS = [f"{SINGLE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]  # 1, 1, 1 and 4 of 7 rows
LINEAR1 = "lora_unet_single_blocks_0_linear1"
NORM_OUT = "transformer.norm_out.linear"


def numbers(*shape, start=1.0):
    return torch.arange(float(start), start + math.prod(shape)).view(shape)


def layer(stem=OUT, *, down=None, up=None, alpha=1.0, **others):
    """The tensors of a layer of width 2 and rank 2."""
    down = numbers(2, 2) if down is None else down
    up = numbers(2, 2) if up is None else up
    found = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return found | {f"{stem}.{name}": tensor for name, tensor in others.items()}


def written(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    return tmp_path / "x.safetensors"


def equal(got, expected):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-6, atol=1e-6)


# ---- files → modules


def test_embeddings_that_a_file_has_besides_are_left_out_where_that_is_asked_for(tmp_path):
    path = written(tmp_path, layer() | {"bundle_emb.zot.clip_l": torch.ones(1, 4)})
    with pytest.raises(ValueError, match="--without-embeddings"):
        convert.load(path, "flux")
    with pytest.raises(ValueError, match="--without-embeddings"):
        convert.load(path, "flux", with_untrained=True)
    found = convert.load(path, "flux", without_embeddings=True)
    assert list(found) == [TO_OUT]
    torch.testing.assert_close(found[TO_OUT].delta(), torch.tensor([[7.0, 10.0], [15.0, 22.0]]) / 2)


def test_a_file_of_which_only_the_header_came_is_refused(tmp_path):
    path = written(tmp_path, layer(), {OUTLINE: "not downloaded yet"})
    with pytest.raises(ValueError, match="it was never downloaded"):
        convert.load(path, "flux")


@pytest.mark.parametrize("problem", [OSError("gone"), convert.SafetensorError("torn")])
def test_a_file_that_cannot_be_read_to_its_end_is_refused(tmp_path, monkeypatch, problem):
    def fails(path):
        raise problem

    monkeypatch.setattr(convert, "load_file", fails)
    with pytest.raises(ValueError, match=f"it cannot be read: {problem}"):
        convert.load(written(tmp_path, layer()), "flux")


def test_numbers_of_any_type_become_floats(tmp_path):
    found = convert.load(written(tmp_path, layer(down=numbers(2, 2).half(), up=numbers(2, 2).bfloat16())), "flux")
    assert (found[TO_OUT].down.dtype, found[TO_OUT].up.dtype, found[TO_OUT].scale) == (
        torch.float32,
        torch.float32,
        0.5,
    )


def test_a_tensor_that_is_not_finite_is_named():
    tensors = layer() | layer(OUT.replace("img", "txt"), up=torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"1 of its 6 tensors are not finite .*txt_attn_proj\.lora_up\.weight first"):
        convert.from_tensors(tensors, {}, "flux")


def dora(trained):
    """The parts of linear1 of width 2, whose magnitudes are 1 to 14, as a job has them: some did not train."""
    modules = {}
    top = 1
    for number, name in enumerate(PARTS):
        rows = 8 if name.endswith("mlp") else 2
        rank = 2 if name in trained else 0
        magnitude = torch.arange(float(top), top + rows)
        modules[name] = LoraWeights(numbers(rank, 2, start=number), numbers(rows, rank), 0.5, magnitude)
        top += rows
    return modules


@pytest.mark.parametrize("trained", [PARTS[:1], PARTS[1:3], PARTS])
def test_parts_of_a_dora_layer_that_did_not_train_are_told_apart(tmp_path, trained):
    modules = dora(trained)
    untrained = [name for name in PARTS if name not in trained]
    file = convert.to_file(modules, "kohya", "flux")
    magnitudes = file.tensors[f"{LINEAR1}.dora_scale"]
    assert magnitudes.flatten().tolist() == [float(n) for n in range(1, 15)]
    path = written(tmp_path, file.tensors, {key_names.UNTRAINED: json.dumps([*untrained, "transformer.nothing"])})
    assert list(convert.load(path, "flux")) == trained == list(convert.load(path, "flux", without_embeddings=True))
    everything = convert.load(path, "flux", with_untrained=True)
    assert set(everything) == set(PARTS)
    for name, weights in everything.items():
        assert weights.rank == (2 if name in trained else 0) and weights.up.shape[1] == weights.rank
        torch.testing.assert_close(weights.magnitude, modules[name].magnitude)
        torch.testing.assert_close(weights.delta(), modules[name].delta())
    again = convert.to_file(everything, "kohya", "flux")
    equal(again.tensors, file.tensors)


def test_before_the_first_step_they_are_told_apart_too(tmp_path):
    """The up matrix is zero, so that every part has all terms."""
    modules = dora(PARTS[:1])
    modules[PARTS[0]].up.zero_()
    file = convert.to_file(modules, "kohya", "flux")
    path = written(tmp_path, file.tensors, {key_names.UNTRAINED: json.dumps(PARTS[1:])})
    ranks = {name: weights.rank for name, weights in convert.load(path, "flux", with_untrained=True).items()}
    assert ranks == dict(zip(PARTS, [2, 0, 0, 0], strict=True))
    assert list(convert.load(path, "flux")) == PARTS[:1]


def test_a_part_keeps_the_terms_in_which_it_is_not_zero():
    """linear1 of width 1: q and the MLP have a term each, v has both, and k none."""
    up = torch.zeros(7, 2)
    up[0, 0], up[2], up[3:, 1] = 5.0, torch.tensor([6.0, 7.0]), torch.arange(1.0, 5)
    down = torch.tensor([[2.0], [3.0]])
    found = convert.from_tensors(layer(LINEAR1, down=down, up=up, alpha=2.0), {}, "flux")
    assert {name: weights.rank for name, weights in found.items()} == {PARTS[0]: 1, PARTS[2]: 2, PARTS[3]: 1}
    deltas = {PARTS[0]: torch.tensor([10.0]), PARTS[2]: torch.tensor([33.0]), PARTS[3]: torch.arange(1.0, 5) * 3}
    equal({name: weights.delta().flatten() for name, weights in found.items()}, deltas)


def test_in_a_layer_of_zeros_every_term_belongs_to_every_part():
    found = convert.from_tensors(layer(LINEAR1, down=numbers(2, 1), up=torch.zeros(7, 2)), {}, "flux")
    assert {name: weights.rank for name, weights in found.items()} == dict.fromkeys(PARTS, 2)
    equal({name: weights.down for name, weights in found.items()}, dict.fromkeys(PARTS, numbers(2, 1)))
    assert [weights.up.shape[0] for weights in found.values()] == [1, 1, 1, 4]


def test_a_part_that_has_learnt_magnitudes_alone_keeps_one_term():
    up = torch.zeros(7, 2)
    up[0] = 1.0
    tensors = layer(LINEAR1, down=numbers(2, 1), up=up, dora_scale=numbers(7, 1))
    found = convert.from_tensors(tensors, {}, "flux")
    assert {name: weights.rank for name, weights in found.items()} == dict(zip(PARTS, [2, 1, 1, 1], strict=True))
    assert [weights.magnitude.tolist() for weights in found.values()] == [[1], [2], [3], [4, 5, 6, 7]]


def test_rows_of_the_last_norm_are_swapped_and_so_are_its_magnitudes():
    """Scale before shift in diffusers, shift before scale in the original: only in this layer, where it has halves."""
    weights = LoraWeights(numbers(1, 3), numbers(6, 1), 1.0, numbers(6))
    tensors = convert.to_file({NORM_OUT: weights}, "kohya", "flux").tensors
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    assert tensors[f"{stem}.lora_up.weight"].flatten().tolist() == [4, 5, 6, 1, 2, 3]
    assert tensors[f"{stem}.dora_scale"].flatten().tolist() == [4, 5, 6, 1, 2, 3]
    back = convert.from_tensors(tensors, {}, "flux")[NORM_OUT]
    assert (back.up.flatten().tolist(), back.magnitude.tolist()) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    not_halves = {NORM_OUT: LoraWeights(numbers(1, 2), numbers(6, 1), 1.0)}
    another_layer = {"transformer.transformer_blocks.0.ff.net.0.proj": weights}
    for modules in (not_halves, another_layer):
        tensors = convert.to_file(modules, "kohya", "flux").tensors
        (up,) = (tensor for key, tensor in tensors.items() if "lora_up" in key)
        assert up.flatten().tolist() == [1, 2, 3, 4, 5, 6]


# ---- layers that files keep as one


def test_parts_with_one_down_matrix_keep_the_rank():
    down = numbers(2, 3)
    parts = [LoraWeights(down, numbers(2, 2), 0.5), LoraWeights(down.clone(), numbers(1, 2, start=9), 0.5)]
    whole = convert.stack_layers(parts, [2, 1])
    assert (whole.down.tolist(), whole.up.tolist(), whole.scale) == (down.tolist(), [[1, 2], [3, 4], [9, 10]], 0.5)


def test_rows_that_parts_share_are_kept_once_and_equal_rows_of_one_part_apart():
    first = LoraWeights(torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]]), 1.0)
    second = LoraWeights(torch.tensor([[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]]), torch.tensor([[4.0, 5.0, 6.0]]), 1.0)
    whole = convert.stack_layers([first, second], [1, 1])
    assert whole.down[:, 0].tolist() == [1, 1, 2, 3]
    assert whole.up.tolist() == [[1, 2, 3, 0], [6, 0, 4, 5]]


def test_a_part_without_a_lora_has_rows_of_zeros():
    whole = convert.stack_layers([None, LoraWeights(numbers(1, 2), numbers(1, 1), 0.5), None], [2, 1, 1])
    assert (whole.up.tolist(), whole.scale, whole.magnitude) == ([[0], [0], [1], [0]], 0.5, None)


def test_parts_of_several_scales_have_them_in_their_rows():
    parts = [LoraWeights(numbers(1, 2), numbers(1, 1), 0.5), None, LoraWeights(numbers(1, 2), numbers(1, 1), 2.0)]
    whole = convert.stack_layers(parts, [1, 1, 1])
    assert (whole.up.tolist(), whole.scale) == ([[0.5], [0], [2]], 1.0)


def test_each_part_has_a_height():
    for heights in ([1], [1, 1, 1]):
        with pytest.raises(ValueError):
            convert.stack_layers([LoraWeights(numbers(1, 2), numbers(1, 1), 1.0), None], heights)


def test_magnitudes_lie_one_above_the_other_and_are_there_for_all_parts_or_none():
    part = LoraWeights(numbers(1, 2), numbers(1, 1), 0.5, torch.tensor([3.0]))
    other = LoraWeights(numbers(1, 2), numbers(2, 1), 0.5, torch.tensor([4.0, 5.0]))
    assert convert.stack_layers([part, other], [1, 2]).magnitude.tolist() == [3, 4, 5]
    for parts in ([part, None], [part, LoraWeights(numbers(1, 2), numbers(1, 1), 0.5)]):
        with pytest.raises(ValueError, match="DoRA magnitudes for some of its rows only"):
            convert.stack_layers(parts, [1, 1])


# ---- modules → files


def modules_of_ranks():
    """Two of rank 1 with alpha 2, one of rank 2 with alpha 1."""
    return {
        TO_OUT: LoraWeights(numbers(1, 2), numbers(2, 1), 2.0),
        TO_OUT.replace(".0.attn", ".1.attn"): LoraWeights(numbers(1, 2), numbers(2, 1), 2.0),
        TO_OUT.replace(".0.attn", ".2.attn"): LoraWeights(numbers(2, 2), numbers(2, 2), 0.5),
    }


def test_a_kohya_file_has_the_commonest_alpha_and_the_rest_of_the_scale_in_up():
    file = convert.to_file(modules_of_ranks(), "kohya", "flux")
    assert (file.alpha, file.rank) == (2.0, 1)
    up = {key[24]: tensor.flatten().tolist() for key, tensor in file.tensors.items() if "lora_up" in key}
    assert up == {"0": [1, 2], "1": [1, 2], "2": [0.5, 1, 1.5, 2]}  # half of it, at alpha 2 of rank 2
    assert {tensor.item() for key, tensor in file.tensors.items() if key.endswith("alpha")} == {2.0}
    assert list(file.tensors) == sorted(file.tensors)
    tie = dict(reversed(list(modules_of_ranks().items())[1:]))  # one of each: the first counts
    assert (convert.to_file(tie, "kohya", "flux").alpha, convert.to_file(tie, "kohya", "flux").rank) == (1.0, 2)


def test_scales_that_differ_in_the_last_digit_leave_up_as_it_is():
    modules = modules_of_ranks()
    name = TO_OUT.replace(".0.attn", ".1.attn")
    modules[name] = LoraWeights(numbers(1, 2), numbers(2, 1), 2.0 * (1 + 1e-12))
    file = convert.to_file(modules, "kohya", "flux")
    assert file.alpha == 2.0
    assert file.tensors[f"{OUT.replace('_0_', '_1_')}.lora_up.weight"].flatten().tolist() == [1, 2]
    modules[name] = LoraWeights(numbers(1, 2), numbers(2, 1), 2.0 * (1 + 1e-6))
    up = convert.to_file(modules, "kohya", "flux").tensors[f"{OUT.replace('_0_', '_1_')}.lora_up.weight"]
    assert up.flatten().tolist() == pytest.approx([1 + 1e-6, 2 + 2e-6], rel=1e-7) and up[0].item() != 1


def test_a_peft_file_has_the_scale_in_lora_b_and_no_module_of_rank_0():
    modules = modules_of_ranks() | {f"{SINGLE}.proj_out": LoraWeights(numbers(0, 2), numbers(2, 0), 1.0, numbers(2))}
    encoder = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    for name in (PARTS[0], encoder):
        modules[name] = LoraWeights(numbers(1, 2), numbers(2, 1), 3.0, numbers(2))
    file = convert.to_file(modules, "peft", "flux")
    assert (file.rank, file.alpha) == (1, 1.0)
    assert file.tensors[f"{TO_OUT}.lora_B.weight"].flatten().tolist() == [2, 4]
    magnitudes = [key for key in file.tensors if "magnitude" in key]
    assert magnitudes == [f"{encoder}.lora_magnitude_vector.weight", f"{PARTS[0]}.lora_magnitude_vector"]
    assert not any("proj_out" in key for key in file.tensors)


def test_tensors_of_a_file_are_copies_in_32_bits():
    modules = {TO_OUT: LoraWeights(numbers(2, 2).double().T, numbers(2, 2).half(), 0.5)}
    for to in convert.KEY_FORMATS:
        tensors = convert.to_file(modules, to, "flux").tensors
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert all(tensor.is_contiguous() for tensor in tensors.values())
    whole = LoraWeights(numbers(2, 2), numbers(2, 2), 0.5)
    for tensor in convert.to_file({TO_OUT: whole}, "kohya", "flux").tensors.values():
        tensor.zero_()
    assert whole.down.any() and whole.up.any()


def test_a_module_without_a_name_in_a_format_is_refused():
    with pytest.raises(ValueError, match=r"transformer.nothing has no name in this format"):
        convert.to_file({"transformer.nothing": LoraWeights(numbers(1, 2), numbers(2, 1), 1.0)}, "kohya", "flux")


def test_parts_of_one_layer_must_have_rows_in_the_layers_ratio():
    rows = [2, 2, 2, 4]  # the MLP of width 2 has 8
    modules = {name: LoraWeights(numbers(1, 2), numbers(n, 1), 1.0) for name, n in zip(PARTS, rows, strict=True)}
    with pytest.raises(ValueError, match=r"rows of the parts of single_blocks.0.linear1 do not match: \[1.0, 2.0\]"):
        convert.to_file(modules, "kohya", "flux")
    up = convert.to_file({PARTS[3]: LoraWeights(numbers(1, 2), numbers(8, 1), 1.0)}, "kohya", "flux").tensors
    assert up[f"{LINEAR1}.lora_up.weight"].flatten().tolist() == [0] * 6 + [1, 2, 3, 4, 5, 6, 7, 8]


# ---- merging


def test_one_lora_at_full_strength_stays_as_it_is_even_a_dora():
    modules = dora(PARTS)
    assert convert.merge([(modules, 1.0)]) == modules and convert.merge([(modules, 1.0)]) is not modules
    for loras in (
        [(modules, 0.5)],
        [(modules, 1.0), (modules_of_ranks(), 1.0)],
        [(modules_of_ranks(), 1), (modules, 1)],
    ):
        with pytest.raises(ValueError, match="DoRA files cannot be merged"):
            convert.merge(loras)


def test_ranks_add_up_and_strengths_and_scales_are_in_up():
    one = {
        TO_OUT: LoraWeights(numbers(1, 2), numbers(2, 1), 2.0),
        PARTS[0]: LoraWeights(numbers(1, 2), numbers(2, 1), 1.0),
    }
    two = {TO_OUT: LoraWeights(numbers(1, 2, start=5), numbers(2, 1), 0.5)}
    merged = convert.merge([(one, 0.5), (two, -2.0)])
    assert list(merged) == [TO_OUT, PARTS[0]]
    assert merged[TO_OUT].down.tolist() == [[1, 2], [5, 6]]
    assert (merged[TO_OUT].up.tolist(), merged[TO_OUT].scale) == ([[1, -1], [2, -2]], 1.0)
    assert merged[PARTS[0]].up.flatten().tolist() == [0.5, 1.0]
    assert list(convert.merge([(one, 0.0), (two, 1.0)])) == [TO_OUT]
    assert convert.merge([(one, 0.0), (two, 1.0)])[TO_OUT].rank == 1
    assert convert.merge([(one, 0.5)])[TO_OUT].up.flatten().tolist() == [1, 2]
