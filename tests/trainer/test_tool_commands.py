"""`python -m trainer.sample` and `trainer.export`: exit codes and messages, before anything heavy is loaded."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.export import export_command
from trainer.job.reporting import contact_sheet
from trainer.sample import read_prompts, sample_command
from trainer.spec.family import get_family

ROOT = Path(__file__).parents[2]
LORA = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"{LORA}.lora_down.weight": torch.randn(2, 128), f"{LORA}.lora_up.weight": torch.randn(128, 2)}, path)
    return path


@pytest.fixture
def said(caplog, capfd):
    """`said()`: what the commands have logged and printed since the last call."""
    caplog.set_level(logging.INFO)

    def said():
        text = caplog.text + capfd.readouterr().err
        caplog.clear()
        return text

    return said


def ended(command, *arguments):
    """The exit code, also that of a wrong command line."""
    try:
        return command([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("program", ["trainer.sample", "trainer.export"])
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 64), (["--nope"], 64)])
def test_help_and_wrong_arguments_answer_without_torch(program, arguments, code):
    script = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = [{program!r}, *{arguments!r}]
runpy.run_module({program!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code and "usage:" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prompt", "a"], 64, "--base"),
        (["--base", "mini-flux"], 64, "give --prompt TEXT, or --prompts FILE"),
        (["--base", "mini-flux", "--prompt", "a", "--seed", "-1"], 64, "--seed -1 is out of range"),
        (["--base", "mini-flx", "--prompt", "a"], 78, "did you mean mini-flux?"),
        (["--base", "/no/where", "--prompt", "a"], 78, "neither a folder, a file, nor a value of BASE_MODEL"),
        (["--base", "{tmp}", "--prompt", "a"], 78, "a folder without a denoiser"),
        (["--base", "{lora}", "--prompt", "a"], 78, "has no denoiser"),
        (["--base", "mini-flux", "--prompt", "a --s 0"], 78, "--prompt: --s: 0 is not a whole number, 1 to 1000"),
        (["--base", "mini-flux", "--prompt", "a --w 9000"], 78, "--w: 9000 is not"),
        (["--base", "mini-flux", "--prompt", "a", "--prompt", "b --x 1"], 78, "--prompt 2: --x is not a flag"),
        (["--base", "mini-flux", "--prompts", "{tmp}/none.txt"], 78, "No such file"),
        (["--base", "mini-flux", "--prompts", "{tmp}"], 78, "a folder, not a file"),
        (["--base", "mini-flux", "--prompts", "{tmp}/empty.txt"], 78, "has no prompt"),
        (
            ["--base", "mini-flux", "--prompts", "{tmp}/p.json"],
            78,
            "'stepz' is not a key of a prompt",
        ),
        (["--base", "mini-flux", "--prompts", "{tmp}/p.toml"], 78, "p.toml: it is not TOML"),
        (["--base", "mini-flux", "--prompts", "{tmp}/p.yaml"], 78, "p.yaml, prompts[0]: --s: 0 is not a whole number"),
        (["--base", "mini-flux", "--prompts", "{tmp}/p2.json"], 78, "p2.json: it is empty"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{tmp}/no.safetensors"], 78, "no.safetensors is not there"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{tmp}"], 78, "is a folder; it has x.safetensors"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{lora}:abc"], 78, "the strength 'abc' is not a number"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{lora}:nan"], 78, "the strength 'nan' is not a number"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{lora}:1000"], 78, "-100 to 100"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{lora}:0,8"], 78, "the strength '0,8' is not a number"),
        (["--base", "mini-sdxl", "--prompt", "a", "--lora", "{lora}"], 78, "looks like a LoRA for flux"),
        (["--base", "mini-flux", "--prompt", "a", "--lora", "{tmp}/empty.txt"], 78, "not a safetensors file"),
    ],
)
def test_sample_names_what_is_wrong(tmp_path, lora, said, arguments, code, words):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "p.json").write_text('[{"prompt": "a", "stepz": 2}]')
    (tmp_path / "p2.json").write_text("")
    (tmp_path / "p.toml").write_text("prompts = [a")
    (tmp_path / "p.yaml").write_text("- a --s 0\n")
    filled = [argument.replace("{tmp}", str(tmp_path)).replace("{lora}", str(lora)) for argument in arguments]
    assert ended(sample_command, *filled, "--out", tmp_path / "out") == code
    output = said()
    assert words in output and "Traceback" not in output
    assert not list(tmp_path.glob("out/*.png"))


def test_an_output_that_cannot_be_written_is_found_first(tmp_path, lora, said):
    common = ["--base", "mini-flux", "--prompt", "a"]
    assert ended(sample_command, *common, "--out", lora) == 78
    assert "is a file. Fix: name a folder." in said()
    assert ended(sample_command, *common, "--out", "/proc/here") == 74
    assert "--out /proc/here cannot be written" in said()
    assert ended(sample_command, *common, "--out", lora / "below") == 74
    (tmp_path / "status.json").write_text("{}")
    assert ended(sample_command, *common, "--out", tmp_path / "sample") == 78
    assert "holds the samples of a job" in said()


def test_offline_a_base_that_is_not_here_ends_as_a_job_does(tmp_path):
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    arguments = ["--base", "sdxl", "--prompt", "a", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.sample", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    assert "--base sdxl is not downloaded yet" in done.stderr and "[exit 75]" in done.stderr
    assert "Traceback" not in done.stderr


def test_prompts_on_the_command_line_are_drawn_and_named(tmp_path, lora, said):
    """Strength 0 is the base; the lines of a file come after single prompts."""
    (tmp_path / "prompts.txt").write_text("a dog --w 64 --h 64 --s 2\n")
    base = get_family("flux").FACTS.models["mini-flux"].source
    common = ["--prompt", "a spot --w 64 --h 96 --s 2 --d 7", "--prompts", tmp_path / "prompts.txt"]
    drawn = {}
    for name, arguments in {
        "plain": ["--base", "mini-flux"],
        "zero": ["--base", base, "--lora", f"{lora}:0"],
        "full": ["--base", base, "--lora", lora],
    }.items():
        out = tmp_path / name
        assert ended(sample_command, *arguments, *common, "--out", out) == 0
        images = [Image.open(path) for path in sorted(out.glob("step-*.png"))]
        assert [image.size for image in images] == [(64, 96), (64, 64)]
        drawn[name] = [image.tobytes() for image in images]
        lines = said()
        assert f"{out}/step-00000000-00.png: a spot (64 x 96, seed 7, 2 steps)" in lines
        assert f"{out}/step-00000000-01.png: a dog (64 x 64, seed 43, 2 steps)" in lines
        assert "Failed to load" not in lines and "it/s" not in lines
    assert drawn["plain"] == drawn["zero"] != drawn["full"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 64, "give one file to convert, or several after --merge"),
        (["{lora}", "--merge", "{lora}"], 64, "give one file to convert"),
        (["{lora}", "--to", "webui"], 64, "invalid choice"),
        (["{lora}:0.5"], 78, "takes no strength"),
        (["--merge", "{lora}:abc"], 78, "the strength 'abc' is not a number"),
        (["--merge", "{lora}", "{tmp}/no.safetensors"], 78, "no.safetensors is not there"),
        (["--merge", "{lora}:0"], 78, "There is nothing to write"),
        (["--merge", "{lora}", "{tmp}/sd3.safetensors"], 78, "Only LoRAs of one family can be merged"),
        (["{tmp}/loha.safetensors"], 78, "it is a LoHa of LyCORIS"),
        (["{tmp}/wan.safetensors"], 78, "it is one for Wan"),
        (["{lora}", "--family", "sdxl"], 78, "looks like a LoRA for flux"),
        (["{lora}", "--without-text-encoders"], 0, "1 module for flux"),
    ],
)
def test_export_names_what_is_wrong(tmp_path, lora, said, arguments, code, words):
    def write(name, stem):
        tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8, 2)}
        save_file(tensors, tmp_path / f"{name}.safetensors")

    write("sd3", "lora_unet_joint_blocks_0_x_block_attn_proj")
    write("wan", "lora_unet_blocks_0_self_attn_q")
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    filled = [argument.replace("{tmp}", str(tmp_path)).replace("{lora}", str(lora)) for argument in arguments]
    out = tmp_path / "out.safetensors"
    assert ended(export_command, *filled, "--out", out) == code
    output = said()
    assert words in output and "Traceback" not in output and out.exists() == (code == 0)


def test_export_never_replaces_a_file_unless_it_is_asked_to(tmp_path, lora, said):
    out = tmp_path / "other.safetensors"
    out.write_bytes(b"mine")
    assert ended(export_command, lora, "--out", out) == 78
    assert "exists. Fix: name another file, or add --overwrite" in said()
    assert out.read_bytes() == b"mine"
    assert ended(export_command, lora, "--out", out, "--overwrite") == 0
    assert out.read_bytes() != b"mine"
    assert ended(export_command, lora, "--out", tmp_path) == 78
    assert ended(export_command, lora, "--out", tmp_path / "y.pt") == 78
    assert ended(export_command, lora, "--out", "/proc/y.safetensors") == 74


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("fifo", "is a FIFO, and only files are replaced"),
        ("socket", "is a socket, and only"),
        ("link to a device", "is a link, and only"),
        ("link to a FIFO", "is a link, and only"),
        ("link to nothing", "is a link, and only"),
        ("link to itself", "is a link, and only"),
        ("link to a file", "is a link, and only"),
        ("link to a folder", "is a folder"),
        ("folder", "is a folder"),
        ("the input", "is the file that is read"),
        ("another name of the input", "is the file that is read"),
        ("a file as a folder", "is a file. Fix: name a folder."),
        ("a device as a folder", "is a device. Fix: name a folder."),
    ],
)
def test_export_replaces_nothing_but_a_file(tmp_path, lora, said, kind, words, options):
    out, fifo = tmp_path / "out.safetensors", tmp_path / "fifo"
    os.mkfifo(fifo)
    before = lora.read_bytes()
    place = out
    if kind.startswith("link"):
        targets = {"a device": "/dev/full", "a FIFO": fifo, "nothing": "nowhere", "itself": out, "a file": lora}
        out.symlink_to(targets.get(kind.removeprefix("link to "), tmp_path))
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(out))
    elif kind == "folder":
        out.mkdir()
    elif kind == "the input":
        place = tmp_path / "." / "x.safetensors"
    elif kind == "another name of the input":
        os.link(lora, out)
    elif kind == "a file as a folder":
        place = lora / "out.safetensors"
    else:
        place = Path("/dev/full/out.safetensors")
    listed = sorted(path.name for path in tmp_path.iterdir())
    assert ended(export_command, lora, "--out", place, *options) == 78
    output = said()
    assert words in output and "Traceback" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == listed and lora.read_bytes() == before
    assert out.is_symlink() == kind.startswith("link")


def test_no_input_of_a_merge_is_replaced(tmp_path, lora, said):
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora.read_bytes())
    assert ended(export_command, "--merge", lora, other, "--out", other, "--overwrite") == 78
    assert "is the file that is read" in said() and other.read_bytes() == lora.read_bytes()


DOCUMENTED = {0, 64, 65, 70, 74, 75, 77, 78, 130}  # in docs/outputs.md; 70 is a bug, and none of these is one
LONG = "a" * 300
ODD_PATHS = [
    *(
        "",
        ".",
        "..",
        "/",
        "-",
        "--",
        "~",
        "~nobody/x",
        LONG,
        "/".join(["d" * 200] * 30),
        "a\nb",
        "\0",
        "\udcff",
        "\x1b[31m",
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/stdin",
        "/dev/tty",
        "/proc/self/mem",
        "/proc/self/fd",
        "/sys",
        "/proc/x",
    ),
    *(
        "{tmp}",
        "{tmp}/fifo.safetensors",
        "{tmp}/socket.safetensors",
        "{tmp}/loop.safetensors",
        "{tmp}/none.safetensors",
    ),
    *("{tmp}/empty.safetensors", "{tmp}/cut.safetensors", "{tmp}/deep.safetensors", "{tmp}/huge.safetensors"),
    *(
        "{tmp}/text.safetensors",
        "{tmp}/x.safetensors/below",
        "{tmp}/" + "b" * 245 + ".safetensors",
        "https://x/y.safetensors",
    ),
]
ODD_TEXTS = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e999",
    "9" * 5000,
    "\0",
    "\udcff",
    "\x1b[31m",
    LONG,
    "٣",
    "0x10",
    "a=b",
    "--",
]
EXPORTS = {
    "in": lambda odd: [odd, "--out", "{tmp}/o.safetensors"],
    "out": lambda odd: ["{tmp}/x.safetensors", "--out", odd],
    "out overwrite": lambda odd: ["{tmp}/x.safetensors", "--out", odd, "--overwrite"],
    "merge": lambda odd: ["--merge", "{tmp}/x.safetensors", odd, "--out", "{tmp}/o.safetensors"],
    "strength": lambda odd: ["--merge", f"{{tmp}}/x.safetensors:{odd}", "--out", "{tmp}/o.safetensors"],
    "to": lambda odd: ["{tmp}/x.safetensors", "--to", odd, "--out", "{tmp}/o.safetensors"],
    "family": lambda odd: ["{tmp}/x.safetensors", "--family", odd, "--out", "{tmp}/o.safetensors"],
}
SAMPLE = ["--base", "mini-flux", "--out", "{tmp}/out"]
SAMPLES = {  # the last --prompt keeps each from drawing: that is slow, and not what is tested
    "base": lambda odd: ["--base", odd, "--out", "{tmp}/out", "--prompt", "a --s 0"],
    "out": lambda odd: ["--base", "mini-flux", "--out", odd, "--prompt", "a", "--lora", "{tmp}/cut.safetensors"],
    "lora": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--lora", odd],
    "prompts": lambda odd: [*SAMPLE, "--prompts", odd, "--prompt", "a --s 0"],
    "prompt": lambda odd: [*SAMPLE, "--prompt", odd, "--prompt", "a --s 0"],
    "seed": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--seed", odd],
    "tokens": lambda odd: [*SAMPLE, "--prompt", "a", "--max-token-length", odd, "--lora", "{tmp}/cut.safetensors"],
    "config": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--config", odd],
    "vae": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--vae", odd],
    "t5": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--t5", odd],
    "cache": lambda odd: [*SAMPLE, "--prompt", "a --s 0", "--cache", odd],
}


def fill_with_odd_files(folder, lora):
    os.mkfifo(folder / "fifo.safetensors")
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket.safetensors"))
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    data = lora.read_bytes()
    deep = b'{"a":' * 20_000
    contents = {"empty": b"", "cut": data[:-9], "deep": len(deep).to_bytes(8, "little") + deep, "text": b"hello"}
    contents["huge"] = (2**62).to_bytes(8, "little") + b"{}"
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)


@pytest.mark.timeout(120)  # what waits for a FIFO waits for ever
@pytest.mark.parametrize(
    ("command", "build"),
    [
        *(pytest.param(export_command, build, id=f"export {name}") for name, build in EXPORTS.items()),
        *(pytest.param(sample_command, build, id=f"sample {name}") for name, build in SAMPLES.items()),
    ],
)
def test_odd_arguments_end_with_a_documented_exit_code(tmp_path, lora, said, monkeypatch, command, build):
    monkeypatch.chdir(tmp_path)
    fill_with_odd_files(tmp_path, lora)
    before = lora.read_bytes()
    for odd in [*ODD_PATHS, *ODD_TEXTS]:
        code = ended(command, *(argument.replace("{tmp}", str(tmp_path)) for argument in build(odd)))
        output = said()
        assert code in DOCUMENTED - {70} and "Traceback" not in output, (odd, code, output[-2000:])
        assert "\x1b" not in output and len(output.encode("utf-8", "replace")) < 30_000, odd
        assert lora.read_bytes() == before
        (tmp_path / "o.safetensors").unlink(missing_ok=True)


def test_a_prompt_that_is_no_text_is_named(tmp_path, said):
    """Bytes of a command line that are no UTF-8 become halves of letters, which no file can hold."""
    given = ["--base", "mini-flux", "--prompt", "half \udcff a letter", "--out", tmp_path / "out"]
    assert ended(sample_command, *given) == 78
    assert "the text has bytes that are no UTF-8" in said()


def test_ranks_may_differ_in_a_merge_and_embeddings_can_be_dropped(tmp_path, lora, said):
    other = tmp_path / "other.safetensors"
    tensors = {f"{LORA}.lora_down.weight": torch.randn(3, 128), f"{LORA}.lora_up.weight": torch.randn(128, 3)}
    save_file(tensors | {"bundle_emb.zot.clip_l": torch.ones(1, 768)}, other)
    out = tmp_path / "merged.safetensors"
    arguments = ["--merge", f"{lora}:0.5", f"{other}:-0.5", "--out", out]
    assert ended(export_command, *arguments) == 78
    assert "--without-embeddings" in said()
    assert ended(export_command, *arguments, "--without-embeddings") == 0
    merged, first = load_file(out), load_file(lora)
    expected = 0.5 * first[f"{LORA}.lora_up.weight"] @ first[f"{LORA}.lora_down.weight"]
    expected -= 0.5 * tensors[f"{LORA}.lora_up.weight"] @ tensors[f"{LORA}.lora_down.weight"]
    scale = merged[f"{LORA}.alpha"].item() / 5
    got = scale * merged[f"{LORA}.lora_up.weight"] @ merged[f"{LORA}.lora_down.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


JSON = '// drawn every day\n[{"prompt": "a dog", "width": 64, "seed": 7}, "a cat –w 64 --steps 2",]'
YAML = "prompts:\n  - {prompt: a dog, width: 64, seed: 7}\n  - a cat –w 64 --steps 2\n"


LINES = "a dog --w 64 --d 7\na cat –w 64 --steps 2"


@pytest.mark.parametrize(("name", "text"), [("p.json", JSON), ("p.yml", YAML), ("p.txt", LINES)])
def test_prompts_are_read_in_every_form_that_a_job_reads(tmp_path, said, name, text):
    """With notes about what is read otherwise than it is written, and with the seed of each prompt's place."""
    facts = get_family("flux").FACTS
    (tmp_path / name).write_text(text)
    dog, cat = read_prompts(tmp_path / name, facts, facts.models["mini-flux"])
    assert (dog.text, dog.width, dog.seed) == ("a dog", 64, 7)
    assert (cat.text, cat.width, cat.steps, cat.seed) == ("a cat", 64, 2, 43)
    notes = said()
    assert "–w 64 is read as --w 64" in notes and "--steps 2 is read as --s 2" in notes
    assert ("read as JSON5" in notes) == (name == "p.json")


def test_what_a_prompt_sets_in_vain_is_said(tmp_path, said):
    facts = get_family("sdxl").FACTS
    (tmp_path / "p.txt").write_text("a dog --w 65 --g 4")
    (dog,) = read_prompts(tmp_path / "p.txt", facts, facts.models["mini-sdxl"])
    assert (dog.width, dog.height) == (64, 128)
    notes = said()
    assert "line 1: width 65 becomes 64, a multiple of" in notes and "line 1: --g 4 has no effect" in notes


def test_the_defaults_around_a_subset_of_toml_count(tmp_path):
    facts = get_family("flux").FACTS
    (tmp_path / "p.toml").write_text('[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a dog"\nseed = 7\n')
    (dog,) = read_prompts(tmp_path / "p.toml", facts, facts.models["mini-flux"])
    assert (dog.text, dog.width, dog.seed) == ("a dog", 64, 7)


def test_the_sheet_says_which_loras_at_which_strength(tmp_path, lora, monkeypatch):
    shown = []
    monkeypatch.setattr(contact_sheet, "_shortened", lambda text, *_: shown.append(text) or text)
    asked = ["--base", "mini-flux", "--prompt", "a --w 64 --h 64 --s 1", "--out", tmp_path / "out"]
    assert ended(sample_command, *asked, "--lora", f"{lora}:0.8", lora) == 0
    assert shown[0] == "x at 0.8 + x at 1"
    assert ended(sample_command, *asked) == 0
    assert "without a LoRA" in shown and "before training" not in shown
