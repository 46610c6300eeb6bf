"""CLIP text encoders on captions of more than 77 tokens, against chunks that are written out one by one."""

import pytest
import torch

from tests.support.miniatures import encoded, folder, pipeline
from trainer.engine.encoders import clip_output
from trainer.spec.family import get_family
from trainer.training import text_encoders

TEXT = "a red circle and a blue square on the left of some green spots in front of a yellow wall "
COMPONENTS = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]


@pytest.fixture(scope="module")
def pipe():
    return pipeline("sdxl")


def caption_of(tokenizer, count):
    """A caption of exactly so many tokens, besides those of begin and end."""
    letters = " ".join("abcdefgh"[i % 8] for i in range(count))
    assert len(tokenizer(letters, add_special_tokens=False, verbose=False).input_ids) == count
    return letters


def written_out(model, tokenizer, caption, chunks):
    """The states of one caption, and its pooled output: sd-scripts' convention, in the plainest words."""
    words = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids[: 75 * chunks]
    states, pooled = [], None
    for number in range(chunks):
        own = words[75 * number : 75 * (number + 1)]
        ids = [tokenizer.bos_token_id, *own, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        out = model(torch.tensor([ids]), output_hidden_states=True)
        if pooled is None:
            pooled = out.pooler_output if "pooler_output" in out else out.text_embeds
        states.append(out.hidden_states[-2][0])
    inner = [state[1:-1] for state in states]
    return torch.cat([states[0][:1], *inner, states[-1][-1:]]), pooled[0]


@pytest.mark.parametrize("max_tokens", [150, 225])
@pytest.mark.parametrize(("component", "tokenizer"), COMPONENTS)
def test_long_captions_are_read_in_chunks(pipe, component, tokenizer, max_tokens):
    model, tokenizer = getattr(pipe, component), getattr(pipe, tokenizer)
    counts = (0, 1, 40, 73, 74, 75, 76, 100, 149, 150, 151, 224, 225, 226, 400)
    captions = [caption_of(tokenizer, count) if count else "" for count in counts]
    with torch.no_grad():
        found = clip_output(model, tokenizer, captions, max_tokens=max_tokens)
        assert found.tokens_BLD.shape[:2] == (len(captions), max_tokens + 2)
        for i, caption in enumerate(captions):
            tokens, pooled = written_out(model, tokenizer, caption, max_tokens // 75)
            torch.testing.assert_close(found.tokens_BLD[i], tokens, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.pooled_BD[i], pooled, rtol=1e-4, atol=1e-5)


def test_the_end_of_a_long_caption_counts_only_in_chunks():
    family = get_family("sdxl")
    encoders = family.load_encoders(folder("sdxl"), device="cpu", dtype=torch.float32)
    start = TEXT * 4
    captions = [f"{start}red", f"{start}blue"]
    same, different = (family.encode_text(encoders, captions, max_tokens=length) for length in (77, 225))
    assert torch.equal(same[0]["tokens"], same[1]["tokens"])
    assert not torch.equal(different[0]["tokens"], different[1]["tokens"])
    assert different[0]["tokens"].shape == (227, same[0]["tokens"].shape[1])
    # The pooled output is that of the first chunk.
    torch.testing.assert_close(different[0]["pooled"], same[0]["pooled"])


def test_77_tokens_are_encoded_as_diffusers_does(pipe):
    captions = ["a red circle", TEXT * 9, ""]
    wanted = encoded("sdxl", pipe, captions)
    with torch.no_grad():
        clip_l = clip_output(pipe.text_encoder, pipe.tokenizer, captions)
    assert torch.equal(clip_l.tokens_BLD, wanted["tokens"][..., : clip_l.tokens_BLD.shape[-1]])


def test_encoders_that_train_give_what_is_cached_and_gradients_from_every_chunk():
    family = get_family("sdxl")
    captions = [TEXT * 9, "a red circle"]
    encoders = family.load_encoders(folder("sdxl"), device="cpu", dtype=torch.float32)
    cached = family.encode_text(encoders, captions, max_tokens=150)
    text = {key: torch.stack([item[key] for item in cached]) for key in cached[0]}
    trained = text_encoders.load(
        folder("sdxl"),
        ["text_encoder", "text_encoder_2"],
        family=family,
        device="cpu",
        dtype=torch.float32,
        max_tokens=150,
    )
    for model in trained.models.values():
        model.requires_grad_(True)
    found = trained.encode_trained(text, captions)
    for key in text:
        torch.testing.assert_close(found[key], text[key], rtol=1e-4, atol=1e-5)
    found["tokens"][:, 100].sum().backward()
    for model in trained.models.values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
