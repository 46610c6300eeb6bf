"""No secret comes out: canaries in every variable, on every way in which a job is refused, fails or is checked."""

import base64
import datetime
import json
import logging
import os
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx  # noqa: F401 (once, and not in each fork)
import pytest

import entrypoint.__main__ as entrypoint_main
import entrypoint.job as entrypoint_job
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning import summary
from entrypoint.planning.plan import make_plan
from entrypoint.runpod import request
from entrypoint.settings import read_settings
from entrypoint.settings.clean import LOCATIONS
from entrypoint.settings.variables import CONFIG_JSON, NAMES, ROWS
from entrypoint.system import cards, environment, secrets
from tests.support.drawings import draw
from trainer.spec.messages.secrets import without_secrets

# Each is found in whatever form it is printed.
PASSWORD, KEY, SIGNATURE, TOKEN = "cAnary-pass+1/x", "cAnary-key-2", "cAnarySig3%2Fx", "hf_cAnaryTOKEN44444"
STRANGERS = {
    "DB_PASS": "cAnary-db-55", "GITHUB_TOKEN": "ghp_cAnary666666666666666", "AWS_SECRET_ACCESS_KEY": "cAnary/aws+77777",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=me;AccountKey=cAnaryAzureKey+12/3==;EndpointSuffix=core.net",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2024&sig=cAnarySasToken123", "AWS_ACCESS_KEY_ID": "AKIAcAnary1234567890",
    "GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "cAnaryGoogleKey1234"}',
    "RUNPOD_API_KEY": "rpa_cAnary8888888", "DATABASE_URL": "postgres://me:cAnary-url-99@db/x",
    "SERVICE_AUTH": "cAnary auth 10", "TLS_PRIVATE_KEY": "-----BEGIN KEY-----\ncAnaryKEY11aaaa\n-----END KEY-----",
}  # fmt: skip


def forms(canary):
    inner = base64.b64encode(canary.encode())[: len(canary) // 3 * 4 - 4].decode()
    return {canary, urllib.parse.quote(canary, safe=""), urllib.parse.unquote(canary), inner}


CANARIES = set().union(*map(forms, (PASSWORD, KEY, SIGNATURE, TOKEN, "cAnary", "CANARY")))


def leaks(text):
    return sorted(form for form in CANARIES if form in text)


def address(host, path="x.zip"):
    login = f"me:{urllib.parse.quote(PASSWORD, safe='')}"
    return f"https://{login}@{host}/{path}?token={KEY}&X-Amz-Signature={SIGNATURE}&sig={SIGNATURE}#k={KEY}"


def run(arguments, environ, folder, *, change=lambda: None):
    """Run the entrypoint in a fork, as a program of its own; exit code, all that it printed and all that it wrote."""
    printed = folder / "printed.txt"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            logging.getLogger().handlers.clear()
            entrypoint_job.CHECK_RETRIES_S = 0.0
            summary.cpu_workers = lambda: 0
            os.environ.clear()
            os.environ.update(environ)
            change()
            code = entrypoint_main.main(arguments, environment.take(os.environ))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    written = [p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"]
    return os.waitstatus_to_exitcode(status), printed.read_text(), "".join(written)


class _Refusing(BaseHTTPRequestHandler):
    """Answers /404/... with 404; the body and the reason repeat what was asked, as servers do."""

    def do_GET(self):
        status = int(self.path.split("/")[1])
        body = f"refused: {self.path} {self.headers.get('Authorization')}".encode()
        self.send_response(status, f"no {self.path}")
        if status in (301, 302):
            self.send_header("Location", self.path.replace(f"/{status}/", "/403/"))
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.fixture
def base(tmp_path):
    """A job that `--check` finds good, with secrets of its own and of strangers around it."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        draw(64, 64, seed=i).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a thing")
    places = {name: str(tmp_path / name.lower()) for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")}
    own = {"BASE_MODEL": "mini-flux", "DATASET_NAME": str(images), "HF_TOKEN": TOKEN, **places}
    return {**own, **STRANGERS, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}


def test_a_check_that_goes_well(base, tmp_path):
    code, printed, written = run(["--check"], base, tmp_path)
    assert code == 0 and "Checked" in printed and leaks(printed + written) == []


@pytest.mark.parametrize("where", ["environment", "CONFIG_JSON", "broken CONFIG_JSON"])
def test_a_value_that_is_no_value_in_every_variable_at_once(base, tmp_path, where):
    junk = {name: address("example.com") for name in NAMES if name != CONFIG_JSON}
    if where == "environment":
        environ = {**base, **junk}
    else:
        kept = {name: value for name, value in base.items() if name not in NAMES}
        broken = "" if where == "CONFIG_JSON" else ", oops"
        environ = {**kept, CONFIG_JSON: json.dumps({**junk, "db_password": "cAnary-db-55"})[:-1] + broken + "}"}
    code, printed, written = run(["--check"], environ, tmp_path)
    assert code == 78 and leaks(printed + written) == []
    assert where.startswith("broken") or printed.count("https://***@example.com") > 5


@pytest.mark.parametrize(
    "name", [*LOCATIONS, "PUSH_TO_HUB", "OUTPUT_NAME", "TRIGGER_WORD", "DATASET_SPLIT", "MODEL_REVISION"]
)
def test_an_address_alone_in_a_variable(base, tmp_path, name):
    texts = [address("example.com"), f"s3://me:{PASSWORD}@b/x?token={KEY}"]
    if name in ("DATASET_NAME", "DATASET_CONFIG", "SAMPLE_PROMPTS"):
        texts += [address("[::1"), address("h:port")]
    for text in texts:
        code, printed, written = run(["--check"], {**base, name: text}, tmp_path)
        assert code in (0, 65, 74, 75, 77, 78) and "Traceback" not in printed, printed
        assert leaks(printed + written) == []


@pytest.mark.parametrize("status", [301, 401, 403, 404, 200, 500])
@pytest.mark.parametrize(
    "name", ["DATASET_NAME", "DATASET_CONFIG", "SAMPLE_PROMPTS", "image_dir", "PARAMS_RESUME_FROM"]
)
def test_a_server_that_refuses(base, tmp_path, server, name, status):
    """A login is refused by itself, so that the key in the query is what is sent."""
    url = (
        f"{server}/{status}/x.{'zip' if name in ('DATASET_NAME', 'image_dir') else 'json'}?token={KEY}&sig={SIGNATURE}"
    )
    host = server.removeprefix("http://")
    changes = {name: url, "DOWNLOAD_TOKENS": f"{host}={KEY}", "CIVITAI_TOKEN": KEY}
    if name == "image_dir":
        document = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": url}]}]}
        changes = {"DATASET_CONFIG": json.dumps(document), "DATASET_NAME": ""}
    code, printed, written = run(["--check"], {**base, **changes}, tmp_path)
    assert code in (75, 77, 78) and "127.0.0.1" in printed, printed
    assert leaks(printed + written) == []


@pytest.mark.parametrize("status", [401, 404])
@pytest.mark.parametrize("name", ["DATASET_NAME", "MODEL_PATH"])
def test_a_hub_that_refuses(base, tmp_path, server, name, status):
    endpoint = f"{server}/{status}".replace("http://", f"http://me:{urllib.parse.quote(PASSWORD, safe='')}@")
    code, printed, written = run(["--check"], {**base, name: "org/x", "HF_ENDPOINT": endpoint}, tmp_path)
    assert code in (75, 77, 78) and leaks(printed + written) == [], printed


def test_a_host_that_is_not_there(base, tmp_path):
    for name in ("DATASET_NAME", "DATASET_CONFIG"):
        url = f"http://127.0.0.1:9/x.zip?token={KEY}&sig={SIGNATURE}"
        code, printed, written = run(["--check"], {**base, name: url}, tmp_path)
        assert code == 75 and leaks(printed + written) == [], printed


def test_a_bug_whose_traceback_quotes_everything(base, tmp_path):
    def change():
        def crash(*_arguments, **_options):
            encoded = base64.b64encode(f"u:{TOKEN}".encode()).decode()
            raise RuntimeError(f"{everything} {everything!r} {json.dumps(everything)} {encoded}")

        entrypoint_job.make_plan = crash

    everything = {
        **base,
        "DATASET_NAME": address("example.com"),
        CONFIG_JSON: json.dumps({"hf_write_token": f"hf_{KEY}{KEY}"}),
    }
    code, printed, written = run(
        ["--check"], {**everything, "DATASET_NAME": base["DATASET_NAME"]}, tmp_path, change=change
    )
    assert code == 70 and "RuntimeError" in printed and leaks(printed + written) == [], printed


def test_reasons_that_the_plan_keeps():
    variables = {"BASE_MODEL": "mini-flux", "DATASET_NAME": f'"https://example.com/x.zip?token={KEY}&sig={SIGNATURE}"'}
    now = datetime.datetime.now(datetime.UTC)
    plan = make_plan(read_settings(variables), read_manifest(None, None), cards.hardware_of("24 GB"), now=now)
    assert "written as" in str(plan.reasons) and leaks(str(plan.reasons) + str(plan.warnings)) == []


def test_what_is_printed_past_the_log(capsys):
    with secrets.hidden({"HF_TOKEN": TOKEN, **STRANGERS}):
        print(TOKEN, STRANGERS, json.dumps(STRANGERS))
        print(urllib.parse.quote(STRANGERS["AWS_SECRET_ACCESS_KEY"], safe=""), file=sys.stderr)
    out = capsys.readouterr()
    assert leaks(out.out + out.err) == [] and "DB_PASS" in out.out


def test_the_request_of_a_dry_run_is_shown_without_secrets():
    inner = {"HF_TOKEN": TOKEN, "DATASET_NAME": address("example.com"), "other_secret": KEY, "PARAMS_SEED": 1}
    document = {"datasets": [{"subsets": [{"image_dir": address("example.com")}]}]}
    variables = {name: address("example.com") for name in NAMES if ROWS.get(name) and ROWS[name].kind == "text"}
    variables |= {CONFIG_JSON: json.dumps(inner), "DATASET_CONFIG": json.dumps(document), "HF_WRITE_TOKEN": KEY}
    variables["HF_TOKEN"] = "{{ RUNPOD_SECRET_hf }}"
    shown = request.shown_variables(variables)
    assert shown.keys() == variables.keys() and leaks(json.dumps(shown)) == []
    assert shown["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}" and '"PARAMS_SEED": "1"' in shown[CONFIG_JSON]
    for odd in ("no json", "[1]", f'{{"HF_TOKEN": "{KEY}"'):
        assert request.shown_variables({CONFIG_JSON: odd}) == {CONFIG_JSON: "***"}
    assert leaks(str(request.shown_variables({"HF_TOKEN": f"{{{{ RUNPOD_SECRET_{TOKEN} }}}}"}))) == []
    both = {"HF_TOKEN": f"{KEY} RUNPOD_SECRET_x", CONFIG_JSON: json.dumps({"HF_TOKEN": f"{KEY} RUNPOD_SECRET_"})}
    assert leaks(json.dumps(request.shown_variables(both))) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://discord.com/api/webhooks/123456789012345678/cAnary-Token_99",
        "https://hooks.slack.com/services/T00000000/B00000000/cAnary99Token",
        "https://ntfy.sh/cAnary-topic",
        "https://example.com/hooks/cAnary-9-key?token=cAnary-2",
    ],
)
def test_the_address_of_a_webhook_is_hidden_whole_and_in_parts(address):
    known = secrets.known({"WEBHOOK_URL": f"https://example.com/plain {address}"})
    path = address.partition("//")[2].partition("/")[2]
    for text in (address, f"POST /{path} HTTP/1.1", json.dumps({"url": address}), repr(address), f"({address})"):
        assert leaks(known.hide(text)) == [], text
    assert known.hide("training goes on; hooks are services") == "training goes on; hooks are services"
    if "example.com" not in address:  # in another variable, nothing but its look tells that it is one
        assert leaks(without_secrets(f"cannot open {address}, it is none")) == []


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *(
            (name, True)
            for name in (*STRANGERS, "HF_TOKEN", "WANDB_API_KEY", "MYSQL_PWD", "npm_config__auth", "SENTRY_DSN")
        ),
        *((name, True) for name in ("PGPASSWORD", "SLACK_WEBHOOK", "JWT", "GOOGLE_APPLICATION_CREDENTIALS")),
        *(
            (name, False)
            for name in ("PARAMS_MAX_TOKEN_LENGTH", "TOKENIZERS_PARALLELISM", "PWD", "SSH_AUTH_SOCK", "PATH")
        ),
        *((name, False) for name in ("HF_TOKEN_FILE_PATH", "MONKEY", "KEYBOARD_LAYOUT", "COMPASS", "DATABASE_URL")),
    ],
)
def test_names_tell_secrets(name, is_one):
    assert secrets.is_secret(name) is (is_one and name != "DATABASE_URL")


# ---- what children get


def test_children_get_what_they_need_and_nothing_else():
    address_with_login = f"http://me:{PASSWORD}@proxy"
    given = {
        **STRANGERS, **{name: address("example.com") for name in NAMES}, "HF_HOME": "/hf", "LC_ALL": "C", "PATH": "/",
        "CUDA_VISIBLE_DEVICES": "1", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "HTTPS_PROXY": address_with_login,
        "HF_ENDPOINT": address_with_login, "PIP_INDEX_URL": address_with_login, "SSL_CERT_FILE": "/c.pem",
        "EDITOR": "vi", "HUB_LOGIN": "cAnary", "NVIDIA_API_KEY": "cAnary", "TORCH_HUB_URL": address_with_login,
    }  # fmt: skip
    child = environment.child_environment(given)
    kept = {"HF_HOME", "PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "SSL_CERT_FILE"}
    assert child.keys() & given.keys() == kept and leaks(json.dumps(child)) == []
    with_network = environment.child_environment(given, network=True)
    assert with_network.keys() & given.keys() == kept | {"HTTPS_PROXY", "HF_ENDPOINT"}
    assert "HF_HUB_OFFLINE" in child and "HF_HUB_OFFLINE" not in with_network
    assert environment.package_index(given).keys() == {"PIP_INDEX_URL"}


@pytest.mark.parametrize(("tool", "expected"), [("sample", True), ("export", False), ("shell", True)])
def test_the_tools_are_started_with_an_environment_of_their_own(monkeypatch, tool, expected):
    started = []
    monkeypatch.setattr(os, "execvpe", lambda _file, _arguments, own: started.append(own) or sys.exit(0))
    given = {**STRANGERS, "HF_TOKEN": TOKEN, "PATH": "/bin"}
    with pytest.raises(SystemExit):
        entrypoint_main.main([tool], given)
    (own,) = started
    assert ("HF_TOKEN" in own) is expected
    assert (own.keys() & STRANGERS.keys() == set()) is (tool != "shell")


def test_libraries_of_the_entrypoint_inherit_no_secret():
    given = {
        **STRANGERS,
        "HF_TOKEN": TOKEN,
        "PATH": "/bin",
        "HTTPS_PROXY": "http://proxy",
        "PIP_INDEX_URL": "https://i",
    }
    left = dict(given)
    assert environment.take(left) == given
    assert left == {"PATH": "/bin", "HTTPS_PROXY": "http://proxy", "PIP_INDEX_URL": "https://i"}
    with environment.offline(left):
        assert left == {"PATH": "/bin"}
    assert "HTTPS_PROXY" in left


def test_processes_that_read_images_inherit_no_secret(base, tmp_path):
    """`--check` starts them from the entrypoint itself."""
    seen = tmp_path / "seen.txt"
    site = tmp_path / "site"
    site.mkdir()
    look = f"import os\nwith open({str(seen)!r}, 'a') as file: file.write(open('/proc/self/environ').read())\n"
    (site / "sitecustomize.py").write_text(look)

    def change():
        summary.cpu_workers = lambda: 2

    environ = {**base, "PYTHONPATH": str(site), "HTTPS_PROXY": f"http://me:{PASSWORD}@127.0.0.1:9"}
    code, printed, _ = run(["--check"], environ, tmp_path, change=change)
    assert code == 0, printed
    assert "PATH=" in seen.read_text() and leaks(seen.read_text()) == []


@pytest.mark.parametrize("name", ["MODEL_PATH", "VAE_PATH", "PARAMS_RESUME_FROM", "DATASET_NAME", "UPLOAD_TO"])
def test_a_bucket_whose_keys_are_not_accepted(base, tmp_path, server, name):
    """Whatever the library says of a request, no key is in it."""
    clouds = {"AWS_ENDPOINT_URL": f"{server}/403", "AWS_REGION": "x"}
    value = "s3://my-bucket/a/x.zip" if name == "DATASET_NAME" else "s3://my-bucket/a/x.safetensors"
    code, printed, written = run(["--check"], {**base, **clouds, name: value}, tmp_path)
    assert code == 77 and f"{name}=s3://my-bucket/a/x." in printed and "AWS_ACCESS_KEY_ID" in printed, printed
    assert leaks(printed + written) == []


def test_the_keys_of_pairs_are_hidden_one_by_one():
    known = secrets.known({**STRANGERS, "DOWNLOAD_TOKENS": "a.example.com=cAnaryHostKey1,b.example.com=cAnaryHostKey2"})
    for text in ("key cAnaryAzureKey+12/3== is", "Bearer cAnaryHostKey2", "cAnaryHostKey1"):
        assert leaks(known.hide(text)) == [], text
    assert known.hide("the account of me") == "the account of me"
