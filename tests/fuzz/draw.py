"""Draws what people, other programs and hostile ones may leave: variables, dataset.json, folders, weights, run folders.

A case is a dictionary that JSON can hold, so that one which failed stays in the corpus, whatever is drawn later.
"""

from __future__ import annotations

import json
import random
from typing import Any

Case = dict[str, Any]

WORDS = (
    "a cat",
    "ohwx woman, [trigger], smiling",
    "",
    " ",
    "\n\n",
    "\t",
    "nan",
    "-1",
    "0",
    "1e999",
    "true",
    "none",
    "auto",
    "null",
    "{}",
    "[]",
    "x" * 300,
    "word " * 400,
    "z" * 160_000,
    "猫の写真 \x8c\x88\xfe",
    "caf\xe9",
    "\x1b[31mred\x1b[0m\x07",
    "a\rb",
    "\u202ereversed\u2028line",
    "\ud800",
    "\x00\x01\x02",
    "\x7f\x85",
    "{{ RUNPOD_SECRET_X }}",
    '"quoted"',
    "'quoted'",
    "–dash “curly”",
    "$(touch /tmp/x) `id`",
    "9" * 5000,
    "C:\\data\\img",
    "../../up",
    "%s %d {0}",
    "a=b c=d",
    "1,2,3",
    "hf_abcdefghijklmnopqrstuvwxyz",
)
NAMES = (
    "a",
    "1",
    "image 2",
    "caf\u00e9",
    "cafe\u0301",
    "猫",
    "x" * 200,
    "x" * 250,
    "new\nline",
    "\x1b[2Jclear",
    "\udcff\udcfe",
    "\u202egnp",
    "a.b.c",
    "-rf",
    "*",
    "[1]",
    "$(id)",
    "%s",
    "CON",
    ".hidden",
    "a_mask",
    "a-masklabel",
    "a.preview",
    "_MACOSX",
    "'",
    '"q"',
    "tab\there",
    "trailing ",
    "{x}",
)
FOLDERS = (
    "",
    "",
    "",
    "img/10_ohwx woman",
    "img/1_x",
    "reg/1_woman",
    "10_",
    "0_none",
    "999999999999999999999_many",
    "-1_minus",
    "1_a/2_b/3_c",
    "masks",
    "mask",
    "sample",
    "__MACOSX",
    "@eaDir",
    ".git",
    "train",
    "test",
    "log",
    "d\x1b[1m",
    "f\n",
    "x" * 255,
    "/".join("y" * 100 for _ in range(12)),
)
SUFFIXES = (".png", ".jpg", ".JPG", ".webp", ".bmp", ".tiff", ".gif", ".avif", ".heic", ".psd", ".jpeg.png", ".svg")
BESIDE = (".txt", ".caption", ".json", ".npz", ".xmp", ".csv", ".npy", ".TXT", ".txt.txt", ".yaml", ".mask.png", "")
TABLES = ("metadata.csv", "metadata.jsonl", "captions.json", "metadata.tsv", "prompts.csv", "meta.json", "data.csv")
TABLES += ("metadata.parquet", "dataset.toml", "train/metadata.jsonl", "labels.csv", "METADATA.CSV")
KEYS = (
    "file_name",
    "text",
    "caption",
    "image",
    "prompt",
    "tags",
    "path",
    "",
    "\x1b[1m",
    "image caption",
    "file",
    "url",
)
ENCODINGS = (
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "cp932",
    "gbk",
    "latin-1",
    "cp1252",
    "utf-32",
    "koi8-r",
    "utf-7",
)
ENGINE = {"BASE_MODEL": "mini-flux", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": "{S}/home"}
PLACES = {"OUTPUT_PATH": "{S}/out", "CACHE_PATH": "{S}/cache", "HF_HOME": "{S}/hf", "DATASET_NAME": "{S}/data"}
BASES = ("mini-flux", "mini-sdxl", "mini-sd3")
PATHS = (
    "{S}/data",
    "{S}/nothing",
    "{S}/data/../data",
    "{S}/fifo",
    "{S}/loop",
    "{S}/loop/loop/loop",
    "{S}/file.txt",
    "{S}/a.zip",
    "{S}/deep",
    "/dev/zero",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "/proc/self/environ",
    "~nobody/x",
    "~",
    "owner/name",
    "http://localhost:1/x.zip",
    "https://[::1/x",
    "hf://datasets/x",
    "s3://bucket/x",
    "file:///etc/passwd",
    "{S}/" + "p" * 300,
    "{S}/" + "q/" * 2500,
    "\x1b[31m",
    "{S}/weights.safetensors",
    "{S}/model",
    "{S}/sparse",
    "{S}/data/\n",
    "{S}/dataset.json",
    "{S}/out",
    ".",
    "..",
)
DEPTHS = (*[30] * 19, 1200)  # of folders in folders; the deepest takes a hundred times as long as any other file
HOLES = (*[2**20] * 19, 2**27)  # bytes of a file that is small enough to be read; the largest takes long as well
OPTIMIZER_ARGS = (
    "betas=0.9,0.99",
    "betas=(0.9, 0.99)",
    "betas=0,0",
    "eps=none",
    "relative_step=True",
    "warmup_init=True",
    "scale_parameter=false",
    "d0=0",
    "slice_p=0",
    "amsgrad=true",
    "weight_decay=nan",
    "eps=1e-400",
    "use_bias_correction=maybe",
    "betas=[0.9",
    "d_coef=inf",
    "x=1",
    "=",
    "betas=" + "9" * 4000,
    "decouple=__import__('os')",
)


def text_of(rng: random.Random) -> str:
    """A caption, or something that is where one should be."""
    count = rng.choice((1, 1, 1, 2, 5))
    return rng.choice((" ", ", ", "\n", "\r\n", "")).join(rng.choice(WORDS) for _ in range(count))


def encoded(rng: random.Random, text: str) -> str:
    """The bytes of a text in some encoding, as latin-1."""
    encoding = rng.choice(ENCODINGS)
    try:
        data = text.encode(encoding)
    except UnicodeError:
        data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        at = rng.randint(0, len(data))
        data = (
            data[:at] + rng.choice((b"\x00", b"\xff", b"\x81", b"\xef\xbb\xbf", b"")) + data[at + rng.randint(0, 2) :]
        )
    return data.decode("latin-1")


def image_of(rng: random.Random) -> Any:
    sides = (1, 8, 16, 32, 33, 64, 70, 128)
    drawn: Any = {
        "kind": "image",
        "width": rng.choice(sides),
        "height": rng.choice(sides),
        "format": rng.choice(("PNG", "PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")),
        "colour": rng.randrange(200),
    }
    if rng.random() < 0.75:
        return drawn
    changes = [[rng.randrange(100_000), rng.randrange(256)] for _ in range(rng.randint(0, 6))]
    return {"kind": "damaged", "of": drawn, "bytes": changes, "percent": rng.choice((0, 10, 60, 99, 100, 100))}


def odd_file(rng: random.Random) -> Any:
    """Something where a plain file is expected."""
    return rng.choice(
        (
            {"kind": "fifo"},
            {"kind": "socket"},
            {"kind": "folder"},
            {"kind": "link", "to": "/dev/zero"},
            {"kind": "link", "to": "/dev/stdin"},
            {"kind": "link", "to": "."},
            {"kind": "link", "to": "{S}"},
            {"kind": "link", "to": "nothing"},
            {"kind": "link", "to": "/proc/self/maps"},
            {"kind": "sparse", "size": 2**40},
            {"kind": "sparse", "size": rng.choice(HOLES)},
            {"kind": "deep", "depth": rng.choice(DEPTHS)},
            {"kind": "nested", "open": "[", "close": "]", "times": 1200},
            {"kind": "nested", "open": '{"a":', "close": "}", "times": 1200},
            {"kind": "nested", "open": "[", "close": "", "times": 100_000},
            {"kind": "large", "begin": '{"file_name": "a.png", "text": "', "piece": "x", "times": 160_000, "end": '"}'},
            {"kind": "large", "begin": "file_name,text\n", "piece": "a.png,b\n", "times": 3000, "end": ""},
            "",
            "\x00" * 100,
            "\xff\xfe",
        )
    )


def value_of(rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON."""
    kind = rng.randrange(9)
    if kind == 0 and depth < 3:
        return [value_of(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 1 and depth < 3:
        return {rng.choice((*KEYS, "a", "step")): value_of(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.choice((0, 1, -1, 7, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, float("nan"), float("inf"), -0.0))
    return rng.choice(WORDS)


def table_of(rng: random.Random, name: str, images: list[str]) -> Any:
    """A metadata file in the form that its name says, mostly."""
    if rng.random() < 0.1:
        return odd_file(rng)
    columns = rng.sample(KEYS, rng.randint(1, 4))
    if rng.random() < 0.8:
        columns = ["file_name", rng.choice(("text", "caption", *KEYS)), *columns[:1]]
    rows = []
    for _ in range(rng.choice((0, 1, 2, 3, 40))):
        row: dict[str, Any] = {}
        for column in columns:
            of_image = column in ("file_name", "image", "path", "file") and images and rng.random() < 0.8
            row[column] = rng.choice(images) if of_image else value_of(rng) if rng.random() < 0.3 else text_of(rng)
        rows.append(row)
    form = rng.choice((name.rpartition(".")[2].lower(),) * 4 + ("csv", "jsonl", "json"))
    if form == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows)
    elif form in ("csv", "tsv"):
        delimiter = rng.choice((",", ",", ";", "\t", "|"))
        quote = rng.choice(('"', "", "'"))
        lines = [delimiter.join(columns)]
        for row in rows:
            lines.append(delimiter.join(f"{quote}{row[column]}{quote}" for column in columns))
        text = rng.choice(("\n", "\r\n", "\r")).join(lines)
    elif rng.random() < 0.5:
        text = json.dumps({str(row.get("file_name")): row for row in rows})
    else:
        text = json.dumps(rows)
    return encoded(rng, text)


def folder_of(rng: random.Random, root: str = "data") -> dict[str, Any]:
    """A folder of images with what lies beside them."""
    files: dict[str, Any] = {}
    images = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        folder = rng.choice(FOLDERS)
        stem = rng.choice(NAMES) if rng.random() < 0.5 else f"i{len(images)}"
        name = f"{folder}/{stem}".lstrip("/")
        image = name + rng.choice(SUFFIXES[:3] if rng.random() < 0.7 else SUFFIXES)
        files[f"{root}/{image}"] = image_of(rng) if rng.random() < 0.9 else odd_file(rng)
        images.append(image)
        if rng.random() < 0.6:
            text = encoded(rng, text_of(rng)) if rng.random() < 0.85 else odd_file(rng)
            files[f"{root}/{name}{rng.choice(BESIDE)}"] = text
    for name in rng.sample(TABLES, rng.choice((0, 0, 1, 1, 2))):
        files[f"{root}/{name}"] = table_of(rng, name, images)
    if rng.random() < 0.2:
        files[f"{root}/{rng.choice(FOLDERS)}/{rng.choice(NAMES)}"] = odd_file(rng)
    if rng.random() < 0.5:  # so that half of the folders have something to train on
        files[f"{root}/good.png"] = {"kind": "image", "width": 64, "height": 64, "format": "PNG", "colour": 7}
    return files


# ---- variables and documents


def dataset_json(rng: random.Random, keys: tuple[str, ...]) -> str:
    """dataset.json as text: mostly its true keys, with odd values."""
    subset: dict[str, Any] = {}
    dataset: dict[str, Any] = {}
    place = subset
    if rng.random() < 0.6:
        subset["image_dir"] = rng.choice(PATHS) if rng.random() < 0.3 else "{S}/data"
    for _ in range(rng.randint(0, 4)):
        place = rng.choice((subset, dataset))
        plain = rng.choice((True, False, 0, 1, 2, 0.5, 64, 128, ".txt", "a cat", "zot", ["a", "b"]))
        place[rng.choice(keys)] = plain if rng.random() < 0.8 else value_of(rng)
    if rng.random() < 0.2:
        place[rng.choice((*keys, *KEYS))] = rng.choice((*PATHS, *WORDS))
    tree: Any = {"datasets": [{**dataset, "subsets": [subset] * rng.choice((1, 1, 1, 2, 0))}]}
    if rng.random() < 0.3:
        tree["general"] = {rng.choice(keys): value_of(rng)}
    if rng.random() < 0.1:
        tree = value_of(rng)
    form = rng.randrange(6)
    if form == 0:  # JSON5
        return "// a comment\n" + json.dumps(tree).replace('"datasets"', "datasets").replace("]}", "],}")
    if form == 1:
        import yaml

        return str(yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5))
    if form == 2:
        lines = ["[[datasets]]", *(f"{key} = {json.dumps(value)}" for key, value in dataset.items())]
        return "\n".join([*lines, "[[datasets.subsets]]", *(f"{k} = {json.dumps(v)}" for k, v in subset.items())])
    if form == 3:
        return rng.choice(
            ("[" * 1200, '{"a":' * 1200, "a: &a [*a]", "- " * 2000 + "x", "x" * 160_000, "{", "\x00", "&a [" * 50)
        )
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return text.replace("\\\\", "\\") if rng.random() < 0.2 else text


def prompts(rng: random.Random) -> str:
    flags = ("--w", "--h", "--s", "--d", "--g", "--n", "--l", "–w", "--", "--x", "--w=", "—d")
    lines = []
    for _ in range(rng.choice((0, 1, 2, 5))):
        line = text_of(rng)
        for _ in range(rng.randint(0, 3)):
            line += f" {rng.choice(flags)} {rng.choice(WORDS)}"
        lines.append(line)
    if rng.random() < 0.3:
        return json.dumps([{rng.choice(("prompt", "width", "seed", "x")): value_of(rng)} for _ in lines])
    return "\n".join(lines)


def variables(rng: random.Random, known: tuple[str, ...]) -> dict[str, str]:
    """An environment: paths of the sandbox, and some variables with odd values."""
    values = {**ENGINE, **PLACES, "BASE_MODEL": rng.choice(BASES), "HF_ENDPOINT": "http://127.0.0.1:1"}
    places = tuple(name for name in known if name.endswith(("_PATH", "_FROM", "_NAME", "PROMPTS", "CONFIG", "_ARGS")))
    known_here = rng.choice((known, places, places))
    for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 8))):
        name = rng.choice(known_here)
        if name in ("ON_FINISH", "HF_HUB_OFFLINE"):
            continue
        if name.endswith(("_PATH", "_FROM", "HF_HOME", "NAME", "PROMPTS", "CONFIG")):
            values[name] = rng.choice(PATHS)
        elif name == "PARAMS_OPTIMIZER_ARGS":
            values[name] = rng.choice((" ", ", ")).join(rng.sample(OPTIMIZER_ARGS, 2))
        else:
            values[name] = rng.choice(WORDS)
        if rng.random() < 0.1:
            values[name] = text_of(rng)
    if rng.random() < 0.07:
        tree = {rng.choice(known): value_of(rng) for _ in range(3)}
        tree.pop("ON_FINISH", None)
        values["CONFIG_JSON"] = json.dumps(tree) if rng.random() < 0.8 else dataset_json(rng, ("a",))
    if rng.random() < 0.05:
        values[rng.choice(known)[:-1] + rng.choice(("", "S", "_", "\x1b", "É"))] = rng.choice(WORDS)
    return values


def weights(rng: random.Random) -> Any:
    """A file of weights: a LoRA of some tool, a model, or neither."""
    if rng.random() < 0.15:
        return odd_file(rng)
    stems = (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer.transformer_blocks.0.attn.to_q",
        "base_model.model.x_embedder",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "double_blocks.0.img_attn.qkv",
        "unet.down_blocks.0.attentions.0.to_k",
        "bundle_emb.x",
        "\x1b[31m\nx",
        "y" * 3000,
    )
    endings = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha", ".dora_scale")
    endings += (".weight", ".hada_w1_a", ".absmax", ".lokr_w1", "", ".lora_mid.weight", ".scale_weight")
    tensors: dict[str, Any] = {}
    for _ in range(rng.choice((0, 1, 2, 3, 6, 200))):
        name = rng.choice(stems) + rng.choice(endings)
        if rng.random() < 0.3:
            name = name.replace("0", str(rng.randrange(40)))
        shape = rng.choice(([], [0], [1], [2, 8], [8, 2], [2, 8, 1, 1], [-1], [2**40, 2**40], [3, 64], [4, 4]))
        tensors[name] = [
            rng.choice(("F32", "F16", "BF16", "I8", "U8", "F8_E4M3", "X", "F64")),
            shape,
            rng.choice((0, 60, 255)),
        ]
    metadata = {
        rng.choice(
            ("ss_network_dim", "modelspec.architecture", "ss_base_model_version", "x", "lora_adapter_metadata")
        ): rng.choice(WORDS)
    }
    return {"kind": "safetensors", "tensors": tensors, "metadata": metadata if rng.random() < 0.7 else value_of(rng)}


def surroundings(rng: random.Random) -> dict[str, Any]:
    """The places that PATHS names."""
    files: dict[str, Any] = {
        "fifo": {"kind": "fifo"},
        "loop": {"kind": "link", "to": "{S}/loop"},
        "file.txt": text_of(rng)[:1000].encode("utf-8", "replace").decode("latin-1"),
        "a.zip": {"kind": "zip", "files": {"a.png": image_of(rng), "a.txt": "a cat", "../up": "x"}},
        "sparse": {"kind": "sparse", "size": 2**36},
        "weights.safetensors": weights(rng),
        "home": {"kind": "folder"},
    }
    if rng.random() < 0.2:
        files["deep"] = {"kind": "deep", "depth": rng.choice(DEPTHS)}
    if rng.random() < 0.4:
        for part in (
            "model_index.json",
            "transformer/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
        ):
            files[f"model/{part}"] = json.dumps(value_of(rng)) if rng.random() < 0.7 else odd_file(rng)
        files["model/transformer/diffusion_pytorch_model.safetensors"] = weights(rng)
        files["model/vae/diffusion_pytorch_model.safetensors.index.json"] = json.dumps({"weight_map": value_of(rng)})
    return files


def check_case(rng: random.Random, known: tuple[str, ...], keys: tuple[str, ...]) -> Case:
    """A whole run of `--check`."""
    env = variables(rng, known)
    files = {**surroundings(rng), **folder_of(rng)}
    if rng.random() < 0.35:
        text = dataset_json(rng, keys)
        suffix = rng.choice((".json", ".json", ".yaml", ".toml", ".txt", ""))
        files[f"dataset{suffix}"] = encoded(rng, text)
        env["DATASET_CONFIG"] = f"{{S}}/dataset{suffix}" if rng.random() < 0.7 else text
    if rng.random() < 0.2:
        files["prompts.txt"] = encoded(rng, prompts(rng))
        env["SAMPLE_PROMPTS"] = "{S}/prompts.txt" if rng.random() < 0.7 else prompts(rng)
    arguments = ["--check"]
    if rng.random() < 0.1:
        arguments += ["--gpu", rng.choice(("RTX 4090", "12 GB", "2 x RTX 3090", *WORDS))]
    return {"env": env, "arguments": arguments, "files": files}


def scan_case(rng: random.Random, keys: tuple[str, ...]) -> Case:
    """A folder, and the keys of the subset that reads it."""
    subset: dict[str, Any] = {}
    if rng.random() < 0.2:
        subset["metadata_file"] = "{S}/data/" + rng.choice(TABLES)
    if rng.random() < 0.2:
        subset["conditioning_data_dir"] = "{S}/data" + rng.choice(("", "/masks", "/nothing"))
    if rng.random() < 0.3:
        subset["trigger_word"] = rng.choice(("zot", "猫", "[trigger]"))
    if rng.random() < 0.3:
        subset["caption_extension"] = rng.choice((".txt", ".json", "txt", ".TXT"))
    if rng.random() < 0.3:
        subset["enable_wildcard"] = subset["shuffle_caption"] = True
    return {"subset": subset, "files": folder_of(rng), "strict": rng.random() < 0.1}


def hub_case(rng: random.Random) -> Case:
    """A downloaded repository of a dataset."""
    files = {name: content for name, content in folder_of(rng, "repo").items() if _is_downloaded(content)}
    if rng.random() < 0.4:
        configs = [{"config_name": rng.choice(WORDS), "data_files": rng.choice((value_of(rng), "*.zip", "**", "../*"))}]
        head = "---\n" + json.dumps({"configs": configs if rng.random() < 0.7 else value_of(rng)}) + "\n---\nText"
        files["repo/README.md"] = encoded(rng, head)
    if rng.random() < 0.4:
        inner = {"1.jpg": image_of(rng), "1.txt": encoded(rng, text_of(rng)), "1.json": json.dumps(value_of(rng))}
        inner[rng.choice(("../x.png", "/x.png", "metadata.jsonl", "train/1.png"))] = encoded(rng, text_of(rng))
        files[f"repo/{rng.choice(('images', 'train-00000', '0'))}.zip"] = {"kind": "zip", "files": inner}
    if rng.random() < 0.2:
        files["repo/0.tar"] = text_of(rng).encode("utf-8", "replace").decode("latin-1")
    if rng.random() < 0.2:
        files["repo/data/train-0.parquet"] = "PAR1" + text_of(rng).encode("utf-8", "replace").decode("latin-1")
    subset = rng.choice((None, None, None, "default", "\x1b", "x" * 5000))
    return {"files": files, "subset": subset, "split": rng.choice(("train", "train", "test", "", "\n"))}


def _is_downloaded(content: Any) -> bool:
    """Whether a repository of the Hub can hold it: plain files."""
    return isinstance(content, str) or content["kind"] in ("image", "damaged", "nested", "large")


def output_case(rng: random.Random, finished: dict[str, Any]) -> Case:
    """An output folder that a run has left, `finished`, with something changed in it."""
    files = {f"out/{name}": content for name, content in finished.items()}
    names = ("status.json", "plan.json", "crashes.json", "run.json", "upload.json", "metrics.jsonl", "pod.json")
    names += (
        "run.log",
        "state",
        "sample",
        "logs",
        "runs",
        "runs/x/run.json",
        "runs/x/plan.json",
        "state/step-00000001",
    )
    names += (
        "state/step-00000001/state.json",
        "dataset-report.txt",
        "lock",
        "lease.json",
        "test.safetensors",
        "hang.txt",
    )
    for name in rng.sample(names, rng.randint(1, 4)):
        place = f"out/{name}"
        old = files.get(place)
        kind = rng.randrange(4)
        if kind == 0:
            files[place] = odd_file(rng)
        elif kind == 1 or not isinstance(old, str):
            files[place] = json.dumps(value_of(rng))
        elif kind == 2 and name.endswith(".json"):
            files[place] = json.dumps(changed(rng, json.loads(old)))
        else:
            at = rng.randint(0, len(old))
            files[place] = old[:at] + rng.choice(("", "\x00", "}", '"', "9" * 400)) + old[at + rng.randint(0, 3) :]
    env = {**ENGINE, **PLACES, "OUTPUT_NAME": "test"}
    if rng.random() < 0.3:
        env["RESUME_WITH_CHANGES"] = "true"
        env["PARAMS_SEED"] = "3"
    if rng.random() < 0.2:
        env["PARAMS_RESUME_FROM"] = rng.choice(
            ("{S}/out", "{S}/out/state", "{S}/out/test.safetensors", "{S}/out/plan.json")
        )
    data = {"data/good.png": {"kind": "image", "width": 64, "height": 64, "format": "PNG", "colour": 7}}
    return {"env": env, "arguments": ["--check"], "files": {**data, **files}}


def changed(rng: random.Random, value: Any) -> Any:
    """`value` with something in it replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], changed(rng, value[at]), *value[at + 1 :]]
    return value_of(rng)
