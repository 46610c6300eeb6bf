"""What a request may say: values, names of the Hub, https addresses of public hosts, and nothing on the worker."""

import json
from pathlib import Path

import pytest

from entrypoint.runpod.allowed import KEY_RULES, PACKAGED_IMAGES, RULES, variables_of
from entrypoint.runpod.serverless import job_environment
from entrypoint.settings.clean import LOCATIONS
from entrypoint.settings.variables import CONFIG_JSON, NAMES, ROWS
from entrypoint.system import public_addresses
from trainer.spec.errors import SettingsError

ROOT = Path(__file__).resolve().parents[3]
BASE = {"BASE_MODEL": "mini-flux", "DATASET_NAME": "org/images"}
PATHS = (
    *("/etc/passwd", "/proc/self/environ", "./images", "../../etc", "~/.ssh/id_rsa", "images/", "models/x.safetensors"),
    *("file:///etc/passwd", "FILE:/etc/passwd", "@/etc/passwd", "@file", "C:\\data", "\\\\host\\share", "//host/x"),
    *("'/etc/passwd'", '"""/etc/passwd"""', "\u200b/etc/passwd", "images.zip", "org/images.zip", "/dev/stdin", "."),
    *("http://example.com/x.zip", "ftp://example.com/x.zip", "s3://bucket/x", "https://127.0.0.1/x.zip", "data:,x"),
    *("https://metadata.google.internal/x", "https://user:pw@example.com/x.zip", "https://2130706433/x.json"),
    *("hf://datasets/org/images@../../x", "org/images@../../../etc/passwd", "images/.."),
)
OPENED = sorted({*LOCATIONS, "OUTPUT_PATH", "CACHE_PATH", "HF_HOME", "HF_TOKEN_FILE"})  # what variables name is opened


def may_be_a_name(name: str, path: str) -> bool:
    """Of the Hub: an empty folder is where the job starts, so that such a name leads to nothing on the worker."""
    if name in ("DATASET_NAME", "dataset"):
        return path == "models/x.safetensors"
    return name in ("MODEL_PATH", "MODEL_CONFIG_PATH", "CAPTION_WITH") and path == "org/images.zip"


NAMES_WITHOUT_SLASH = ("DATASET_SPLIT", "DATASET_SUBSET", "DATASET_REVISION", "MODEL_REVISION")


@pytest.mark.parametrize("name", NAMES_WITHOUT_SLASH)
def test_a_name_in_a_repository_leads_out_of_no_folder(name):
    for path in ("/etc/passwd", "../../etc/passwd", "a/../../b", "..\\x", "a//../b", ".."):
        assert f"- {name}" in refusal(**{name: path}), path


def refusal(**request):
    with pytest.raises(SettingsError) as problem:
        variables_of({**BASE, **request})
    return str(problem.value)


@pytest.mark.parametrize("name", OPENED)
def test_no_variable_of_a_request_names_a_file(name):
    for path in PATHS:
        if may_be_a_name(name, path):
            continue
        assert f"- {name}" in refusal(**{name: path}), path
        alone = {"DATASET_NAME": None, CONFIG_JSON: {name: path}}
        assert f"- {name}" in refusal(**alone), path
        assert f"- {name}" in refusal(**{**alone, CONFIG_JSON: json.dumps(alone[CONFIG_JSON])}), path


def test_a_page_of_the_hub_names_no_revision_that_leads_out_of_a_folder():
    assert "DATASET_NAME" in refusal(DATASET_NAME="https://huggingface.co/datasets/a/b@..%2f..%2fetc%2fpasswd")


def test_a_variable_without_a_rule_is_refused():
    assert set(RULES) <= set(NAMES)
    texts = {name for name, row in ROWS.items() if row.kind in ("text", "path")}
    assert texts - set(OPENED) == {
        *("TRIGGER_WORD", "IMAGE_COLUMN", "CAPTION_COLUMN", "CAPTION_PROMPT"),
        *NAMES_WITHOUT_SLASH,
        "JOBS",
    }
    assert "several jobs" in refusal(JOBS="https://example.com/jobs.jsonl")
    assert "several jobs" in refusal(SWEEP="PARAMS_SEED=1,2")
    assert RULES.keys() & {"VAE_PATH", "CLIP_L_PATH", "CLIP_G_PATH"} == set()
    assert "VAE_PATH='org/vae' names a file on the worker" in refusal(VAE_PATH="org/vae")


# A file of the operator's image, for all jobs. A request names none.
OPERATORS_FILES = {"VAE_PATH", "T5_PATH", "CLIP_L_PATH", "CLIP_G_PATH", "TEXT_ENCODER_PATH"}
WORTH_A_TRY = (
    *('["a dog"]', "PARAMS_SEED=1,2", "hf_" + "a" * 30, "64", "wandb", "1", "true", "auto", "none", "exit"),
    *("org/name", "org/name/x.safetensors", "https://example.com/x.zip?sig=1"),
)


def may_say(name):
    for text in WORTH_A_TRY:
        try:
            if name in variables_of(
                {**BASE, name: text, **({"HF_TOKEN": "hf_" + "a" * 30} if name != "HF_TOKEN" else {})}
            ):
                return True
        except SettingsError:
            continue
    return False


@pytest.mark.parametrize("name", sorted({*NAMES} - {CONFIG_JSON}))
def test_what_a_request_may_not_say_the_worker_does_not_say_for_it(name):
    own = job_environment(BASE, {name: "cAnary"}, folder=Path("/work/x"), output="/out")
    is_default = own.get(name) == "cAnary"
    if is_default:
        assert may_say(name) or name in OPERATORS_FILES
        assert name not in ("PUSH_TO_HUB", "UPLOAD_TO")


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY", "LD_PRELOAD", "PYTHONPATH", "PUBLIC_KEY", "LOG_LEVEL"])
def test_a_request_has_our_variables_alone(name):
    assert f"{name} is not a variable of Kiln" in refusal(**{name: "x"})
    assert name in refusal(**{CONFIG_JSON: {name: "x"}})


def test_names_of_other_trainers_are_no_way_around():
    for alias in ("pretrained_model_name_or_path", "output_dir", "train_data_dir", "resume", "vae"):
        with pytest.raises(SettingsError, match=f"/etc/x|{alias}"):
            variables_of({"BASE_MODEL": "mini-flux", CONFIG_JSON: {alias: "/etc/x"}})


@pytest.mark.parametrize("key", sorted(KEY_RULES))
def test_no_key_of_a_document_names_a_file(key):
    for path in PATHS:
        if may_be_a_name(key, path):
            continue
        if key in ("split", "subset", "revision") and not path.startswith(("/", "..", "./")):
            continue
        for document in ({"datasets": [{"subsets": [{key: path}]}]}, {"general": {"a": [[{key: [path]}]]}}):
            for written in (document, json.dumps(document), f"# yaml\n{json.dumps(document)}"):
                said = refusal(DATASET_CONFIG=written)
                assert f".{key}" in said or "is a Windows path" in said, path  # by its backslashes


@pytest.mark.parametrize("text", ["/etc/passwd\n#", '"/etc/passwd"\n', "'''/etc/passwd'''\n\n# x", "- 1\n", "{", "["])
def test_a_document_that_is_no_object_becomes_no_path(text):
    for name in ("DATASET_CONFIG", "SAMPLE_PROMPTS"):
        try:
            value = variables_of({**BASE, name: text})[name]
        except SettingsError as problem:
            assert name in str(problem)
        else:
            assert isinstance(json.loads(value), dict | list)


@pytest.mark.parametrize(
    "request_input",
    [
        json.loads((ROOT / "runpod/test_input.json").read_text())["input"],
        {"BASE_MODEL": "flux", "DATASET_NAME": "org/images", "PARAMS_MAX_EPOCHS": 3},
        {
            **BASE,
            "DATASET_NAME": "https://example.com/a/x.zip?sig=a%2Fb",
            "TRIGGER_WORD": "a/b",
            "STRICT_DATASET": True,
        },
        {**BASE, "DATASET_NAME": "org/images@refs/pr/1", "DATASET_SPLIT": "train", "MODEL_PATH": "org/model"},
        {**BASE, "DATASET_NAME": "https://huggingface.co/datasets/org/images/tree/main", "T5_PATH": "none"},
        {**BASE, "DATASET_NAME": "hf://datasets/org/images", "PUSH_TO_HUB": "me/lora", "HF_TOKEN": "hf_abcdefgh"},
        {**BASE, "CAPTION_WITH": "joycaption", "CAPTION_PROMPT": "Name {trigger}.", "CAPTION_OVERWRITE": True},
        {**BASE, "CAPTION_WITH": "org/model@v1.2", "CAPTION_MAX_TOKENS": 99},
        {**BASE, "PARAMS_OPTIMIZER_ARGS": "betas=0.9,0.99", "PARAMS_TARGET_MODULES": "to_q,to_k", "MAX_RUNTIME": 1.5},
    ],
)
def test_what_requests_say_today_is_served(request_input):
    if request_input["DATASET_NAME"].startswith("/opt/kiln"):
        request_input = {**request_input, "DATASET_NAME": PACKAGED_IMAGES}
    assert variables_of(request_input).keys() == request_input.keys()


def test_documents_are_handed_on_as_they_were_checked():
    config = {"datasets": [{"resolution": 64, "subsets": [{"dataset": "org/images", "caption_extension": ".txt"}]}]}
    for written in (config, json.dumps(config), "datasets:\n- resolution: 64\n  subsets: [{dataset: org/images}]\n"):
        found = json.loads(variables_of({**BASE, "DATASET_CONFIG": written})["DATASET_CONFIG"])
        assert found["datasets"][0]["subsets"][0]["dataset"] == "org/images"
    prompts = variables_of({**BASE, "SAMPLE_PROMPTS": "# two\na fox --w 64\n\nan owl\n"})["SAMPLE_PROMPTS"]
    assert json.loads(prompts) == ["a fox --w 64", "an owl"]
    assert json.loads(variables_of({**BASE, "SAMPLE_PROMPTS": ["@/etc/passwd"]})["SAMPLE_PROMPTS"]) == ["@/etc/passwd"]


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "x" * 200_000])
def test_what_no_environment_holds_is_refused(text):
    assert "TRIGGER_WORD" in refusal(TRIGGER_WORD=text)


def test_a_request_writes_no_captions_beside_images_of_the_worker():
    assert "CAPTION_WRITE" in refusal(CAPTION_WITH="joycaption", CAPTION_WRITE=True)


@pytest.mark.parametrize("text", ["org/model@../../x", "org/model@a b", "joycaption@/etc", "/opt/model", "~/model"])
def test_a_request_captions_with_a_model_of_the_hub_alone(text):
    assert "CAPTION_WITH" in refusal(CAPTION_WITH=text)


def test_all_problems_are_named_at_once_and_no_token_is_shown():
    said = refusal(OUTPUT_PATH="/x", VAE_PATH="/y", HF_TOKEN="$HF_TOKEN canary", PARAMS_RESUME_FROM="/z")
    assert all(name in said for name in ("OUTPUT_PATH", "VAE_PATH", "HF_TOKEN", "PARAMS_RESUME_FROM"))
    assert "canary" not in said


# ---- the environment of the job

WORKER = {
    "PATH": "/bin", "HOME": "/root", "HF_TOKEN": "hf_workers00", "HF_WRITE_TOKEN": "hf_workers01", "HF_HOME": "/hf",
    "HF_HUB_CACHE": "/hf/hub", "RUNPOD_API_KEY": "rpa_1", "DB_PASS": "canary", "AWS_SECRET_ACCESS_KEY": "canary",
    "HTTPS_PROXY": "http://10.0.0.1", "PUSH_TO_HUB": "me/all", "OUTPUT_PATH": "/out", "MAX_RUNTIME": "2",
    "HF_ENDPOINT": "https://mirror", "CUDA_VISIBLE_DEVICES": "0", "CONFIG_JSON": '{"VAE_PATH": "/x"}',
}  # fmt: skip
LENDS = {"KILN_REQUESTS_USE_HF_TOKEN": "true"}


def made(request, **worker):
    return job_environment({**BASE, **request}, {**WORKER, **worker}, folder=Path("/fresh"), output="/results/1")


def test_a_job_gets_places_of_its_own_and_nothing_else_of_the_worker():
    own = made({}, HF_TOKEN_FILE="/run/token")
    assert own["OUTPUT_PATH"] == "/results/1" and own["ON_FINISH"] == "exit"
    for name in ("CACHE_PATH", "HF_HOME", "HOME", "TMPDIR"):
        assert own[name].startswith("/fresh/")
    assert own["MAX_RUNTIME"] == "2" and own["HF_ENDPOINT"] == "https://mirror" and own["CUDA_VISIBLE_DEVICES"] == "0"
    assert own[public_addresses.VARIABLE] == "1" and own["HF_HUB_DISABLE_XET"] == "1"
    left = set(WORKER) - {
        "PATH",
        "HOME",
        "HF_HOME",
        "OUTPUT_PATH",
        "MAX_RUNTIME",
        "HF_ENDPOINT",
        "CUDA_VISIBLE_DEVICES",
    }
    assert own.keys() & (left | {"HF_TOKEN_FILE"}) == set()
    assert not [name for name, value in own.items() if "canary" in value or "workers" in value]


@pytest.mark.parametrize(
    ("request_input", "worker", "reads", "writes"),
    [
        ({}, {}, None, None),
        ({}, LENDS, "hf_workers00", None),
        ({}, {"KILN_REQUESTS_USE_HF_TOKEN": "false"}, None, None),
        ({"HF_TOKEN": "hf_own00"}, LENDS, "hf_own00", None),
        ({"HF_TOKEN": "hf_own00", "PUSH_TO_HUB": "me/x"}, LENDS, "hf_own00", None),
        ({"HF_WRITE_TOKEN": "hf_own01", "PUSH_TO_HUB": "me/x"}, LENDS, None, "hf_own01"),
    ],
)
def test_the_workers_token_is_lent_to_download_where_the_operator_says_so(request_input, worker, reads, writes):
    own = made(request_input, **worker)
    assert (own.get("HF_TOKEN"), own.get("HF_WRITE_TOKEN")) == (reads, writes)


@pytest.mark.parametrize(
    "token", ["none", "", "undefined", '"none"', '""""none""""', "Bearer none", "$HF_TOKEN", "n/a"]
)
def test_no_token_is_not_one_so_that_nothing_is_uploaded_with_the_workers(token):
    assert "TOKEN" in refusal(PUSH_TO_HUB="me/x", HF_WRITE_TOKEN=token)
    assert "TOKEN" in refusal(PUSH_TO_HUB="me/x", HF_TOKEN=token)


def test_whether_the_token_is_lent_is_not_the_requests_to_say():
    assert "KILN_REQUESTS_USE_HF_TOKEN is not a variable" in refusal(**LENDS)


PUBLIC = "https://discord.com/api/webhooks/1/token-of-mine-123"
INSIDE = (
    "http://example.com/x",
    "https://127.0.0.1/x",
    "https://10.0.0.1/x",
    "https://[::1]/x",
    "https://ntfy.internal/x",
)


@pytest.mark.parametrize("address", [*INSIDE, "file:///etc/passwd", "/etc/passwd", "https://me:pw@example.com/x"])
def test_a_webhook_of_a_request_leads_to_public_hosts_alone_and_is_not_shown(address):
    for text in (address, f"{PUBLIC} {address}", f"{PUBLIC},{address}"):
        said = refusal(WEBHOOK_URL=text)
        assert "- WEBHOOK_URL " in said and address not in said and "token-of-mine" not in said
    asked = {**BASE, "WEBHOOK_URL": PUBLIC, "WEBHOOK_SECRET": "whsec_abc"}
    assert variables_of(asked) == asked


def test_the_operators_addresses_and_accounts_are_no_defaults_for_requests(tmp_path):
    worker = {"WEBHOOK_URL": PUBLIC, "WEBHOOK_SECRET": "whsec_abc", "LOG_WITH": "wandb", "WANDB_API_KEY": "key-123456"}
    own = job_environment(BASE, {**worker, "PATH": "/bin"}, folder=tmp_path, output=str(tmp_path))
    assert own.keys() & worker.keys() == set()
    assert "LOG_WITH='wandb' sends to an account" in refusal(LOG_WITH="wandb")


def test_a_request_opens_no_port_of_the_worker(tmp_path):
    for port in ("0", "8675", "22", 9000):
        assert "MONITOR_PORT" in refusal(MONITOR_PORT=port) and "opens a port" in refusal(MONITOR_PORT=port)
    assert "MONITOR_TOKEN is for a page" in refusal(MONITOR_TOKEN="a-token-of-16-characters")
    worker = {"MONITOR_PORT": "8675", "MONITOR_TOKEN": "the-operators-own-1"}
    own = job_environment(variables_of(BASE), worker, folder=tmp_path, output="/out")
    assert own["MONITOR_PORT"] == "0" and "MONITOR_TOKEN" not in own
