"""Which samples a round lacks, who draws them, and what is drawn."""

import pytest
from PIL import Image

from trainer.job import sampling
from trainer.spec.plan import Prompt
from trainer.storage.own_files import sample_name
from trainer.training.distributed import Workers

PROMPTS = [
    Prompt(text=f"a spot {number}", negative="", width=8, height=8, seed=number, steps=1, guidance=1.0, cfg=1.0)
    for number in range(3)
]


def draw(prompt):
    return Image.new("RGB", (prompt.width, prompt.height), (prompt.seed, 0, 0))


def drawn(folder, numbers, *, step=5, strength=1.0, stopped=lambda: False):
    return sampling.draw_all(folder, PROMPTS, numbers, step=step, draw=draw, stopped=stopped, strength=strength)


def test_samples_that_are_there_are_not_missing_at_any_strength(tmp_path):
    assert sampling.missing(tmp_path, PROMPTS, step=5) == [(1.0, 0), (1.0, 1), (1.0, 2)]
    assert drawn(tmp_path, [1]) == 1 and drawn(tmp_path, [0, 2], strength=0.5) == 2
    assert sampling.missing(tmp_path, PROMPTS, step=5, strengths=(1.0, 0.5)) == [(1.0, 0), (1.0, 2), (0.5, 1)]
    assert len(sampling.missing(tmp_path, PROMPTS, step=6)) == 3


@pytest.mark.parametrize("content", [b"no image", b""])
def test_another_file_with_the_name_of_a_sample_is_set_aside_and_kept(tmp_path, content):
    path = tmp_path / sample_name(5, 1)
    path.write_bytes(content)
    assert (1.0, 1) in sampling.missing(tmp_path, PROMPTS, step=5)
    assert not path.exists() and [other.read_bytes() for other in tmp_path.iterdir()] == [content]


def test_only_the_prompts_of_a_share_are_drawn_and_each_once(tmp_path):
    assert drawn(tmp_path, [2, 0]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [sample_name(5, 0), sample_name(5, 2)]
    assert Image.open(tmp_path / sample_name(5, 2)).getpixel((0, 0)) == (2, 0, 0)
    assert drawn(tmp_path, [2, 0]) == 0


def test_a_stop_is_looked_for_before_each_image(tmp_path):
    answers = iter([False, True])
    assert drawn(tmp_path, [0, 1, 2], stopped=lambda: next(answers)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [sample_name(5, 0)]


def test_after_a_stop_no_round_begins(tmp_path):
    alone = Workers()
    assert sampling.share_out(5, tmp_path, prompts=PROMPTS, strengths=(1.0,), workers=alone) == (
        tmp_path,
        [(1.0, 0), (1.0, 1), (1.0, 2)],
    )
    alone._stop.signal = 15
    assert sampling.share_out(5, tmp_path, prompts=PROMPTS, strengths=(1.0,), workers=alone) == (tmp_path, [])


class Exchange(Workers):
    """The first process of two machines; the other one gives what `given` has."""

    given = (b"", b"an image")

    def from_process(self, process_rank, content):
        assert process_rank == 1 and content == b""  # what this machine draws goes nowhere
        return self.given[1]


def test_images_of_another_machine_are_brought_here_and_those_that_it_lacked_memory_for_are_not(tmp_path):
    first = Exchange(0, 2, tmp_path, per_node=1)
    drawn(tmp_path, [0])
    wanted = [(1.0, 0), (1.0, 1), (1.0, 2)]
    assert sampling.collect(5, tmp_path, wanted, workers=first) == 2  # this one had no room for the third
    assert (tmp_path / sample_name(5, 1)).read_bytes() == b"an image"
    first.given = (b"", b"")
    assert sampling.collect(6, tmp_path, wanted, workers=first) == 0
