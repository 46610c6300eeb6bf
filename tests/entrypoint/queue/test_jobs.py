"""JOBS, SWEEP and several base models → jobs: their names, folders and variables, and what is refused at once."""

import json
import os

import pytest

from entrypoint import __main__ as entrypoint
from entrypoint.queue import run
from entrypoint.queue.jobs import expand
from entrypoint.queue.record import DONE, FAILED, RUNNING, STOPPED, Entry, QueueRecord
from entrypoint.system import hardware
from entrypoint.system.cards import hardware_of
from trainer.spec.errors import SettingsError

COMMON = {
    "BASE_MODEL": "sdxl",
    "DATASET_NAME": "org/images",
    "OUTPUT_PATH": "/workspace/output",
    "HF_TOKEN": "hf_" + "a" * 30,
}


def lines(*objects):
    return "\n".join(json.dumps(line) for line in objects) + "\n"


def refusal(**variables):
    with pytest.raises(SettingsError) as caught:
        expand(COMMON | variables)
    return str(caught.value)


def test_the_variables_of_one_job_are_no_queue():
    assert expand(COMMON) == ()
    assert expand(COMMON | {"JOBS": " ", "SWEEP": ""}) == ()


def test_a_sweep_is_the_product_with_a_readable_folder_for_each():
    jobs = expand(COMMON | {"SWEEP": "PARAMS_NETWORK_DIM=8,32 PARAMS_D_COEF=1,2"})
    assert [job.name for job in jobs] == [
        "network_dim-8_d_coef-1",
        "network_dim-8_d_coef-2",
        "network_dim-32_d_coef-1",
        "network_dim-32_d_coef-2",
    ]
    assert jobs[2].environ["PARAMS_NETWORK_DIM"] == "32" and jobs[2].environ["PARAMS_D_COEF"] == "1"
    assert jobs[2].environ["OUTPUT_PATH"] == "/workspace/output/network_dim-32_d_coef-1"
    assert {job.environ["HF_TOKEN"] for job in jobs} == {COMMON["HF_TOKEN"]}
    assert all("SWEEP" not in job.environ and job.environ["ON_FINISH"] == "exit" for job in jobs)
    assert len({job.digest for job in jobs}) == 4


def test_values_that_have_commas_are_separated_by_bars():
    jobs = expand(COMMON | {"SWEEP": "PARAMS_TEXT_ENCODER_LR=1e-5,2e-5|0"})
    assert [job.environ["PARAMS_TEXT_ENCODER_LR"] for job in jobs] == ["1e-5,2e-5", "0"]


@pytest.mark.parametrize("by", ["JOBS", "SWEEP"])
def test_a_key_in_an_address_is_in_no_name_of_a_job(by):
    """Names of jobs become folders, files and repositories, which others see."""
    first = "https://me:s3cret@example.org/cats.zip?token=s3cret"
    second = "https://example.org/dogs.zip?X-Amz-Signature=s3cret"
    if by == "SWEEP":
        given = {"SWEEP": f"DATASET_NAME={first}|{second}"}
    else:
        given = {"JOBS": lines({"DATASET_NAME": first}, {"DATASET_NAME": second})}
    jobs = expand(COMMON | given | {"PUSH_TO_HUB": "you/loras", "UPLOAD_TO": "s3://bucket/loras"})
    assert [job.name for job in jobs] == ["cats.zip", "dogs.zip"]
    for job, address in zip(jobs, (first, second), strict=True):
        assert job.environ["DATASET_NAME"] == address
        assert "s3cret" not in job.place
        own = [value for name, value in job.environ.items() if name not in ("DATASET_NAME", "HF_TOKEN")]
        assert not any("s3cret" in value for value in own), own


def test_quotes_that_a_shell_left_are_no_part_of_a_sweep():
    jobs = expand(COMMON | {"SWEEP": "'PARAMS_SEED=1,2'"})
    assert [job.environ["PARAMS_SEED"] for job in jobs] == ["1", "2"]


def test_several_base_models_are_a_job_each():
    jobs = expand(COMMON | {"BASE_MODEL": "sdxl, flux,z-image"})
    assert [(job.name, job.environ["BASE_MODEL"]) for job in jobs] == [(n, n) for n in ("sdxl", "flux", "z-image")]
    both = expand(COMMON | {"BASE_MODEL": "sdxl,flux", "SWEEP": "PARAMS_NETWORK_DIM=8,32"})
    assert [job.name for job in both] == [f"{b}_network_dim-{d}" for b in ("sdxl", "flux") for d in (8, 32)]


def test_a_line_has_its_variables_over_the_common_ones_and_a_name_of_what_differs():
    text = lines({"DATASET_NAME": "you/dogs", "PARAMS_SEED": 1}, {"DATASET_NAME": "you/cats", "PARAMS_SEED": 1})
    jobs = expand(COMMON | {"JOBS": f"# two animals\n\n{text}", "PARAMS_NETWORK_DIM": "8", "PARAMS_SEED": "7"})
    assert [job.name for job in jobs] == ["dogs", "cats"]
    assert [job.place for job in jobs] == ["JOBS, line 3", "JOBS, line 4"]
    assert jobs[0].environ["PARAMS_SEED"] == "1" and jobs[0].environ["PARAMS_NETWORK_DIM"] == "8"


def test_lines_without_a_short_name_are_numbered_and_names_are_never_twice():
    same = [{"TRIGGER_WORD": "a"}, {"TRIGGER_WORD": "a"}]
    assert [job.name for job in expand(COMMON | {"JOBS": lines(*same)})] == ["job-1", "job-2"]
    named = [{"OUTPUT_NAME": "x"}, {"OUTPUT_NAME": "x", "PARAMS_SEED": 1}]
    assert [job.name for job in expand(COMMON | {"JOBS": lines(*named)})] == ["x", "x-2"]


def test_a_file_of_lines_is_read(tmp_path):
    (tmp_path / "jobs.jsonl").write_text(lines({"PARAMS_SEED": 1}, {"PARAMS_SEED": 2}))
    assert [job.name for job in expand(COMMON | {"JOBS": str(tmp_path / "jobs.jsonl")})] == ["seed-1", "seed-2"]
    assert "JOBS" in refusal(JOBS=str(tmp_path / "none.jsonl"))


def test_all_that_is_wrong_is_named_with_its_line_before_anything_starts():
    text = '{"PARAMS_NETWORK_DIMM": 8}\n{"PARAMS_SEED": 1}\nnot json\n{"ON_FINISH": "stop"}\n'
    said = refusal(JOBS=text)
    assert "JOBS, line 1: 'PARAMS_NETWORK_DIMM'" in said and "is not a variable" in said
    assert "JOBS, line 3 is not a JSON object" in said
    assert "JOBS, line 4: ON_FINISH belongs to the whole queue" in said and "line 2" not in said
    said = refusal(JOBS=lines({"PARAMS_SEED": 1}, {"PARAMS_SEED": "many"}, {"BASE_MODEL": "sd15"}))
    assert "JOBS, line 2: PARAMS_SEED='many'" in said and "JOBS, line 3" in said and "line 1" not in said


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("PARAMS_NETWORK_DIMM=8,32", "did you mean PARAMS_NETWORK_DIM?"),
        ("8,32", "no variable with values"),
        ("PARAMS_NETWORK_DIM=", "no value"),
        ("PARAMS_NETWORK_DIM=8,8", "one twice"),
        ("HF_TOKEN=hf_a,hf_b", "the same for all jobs"),
        ("OUTPUT_PATH=/a,/b", "the same for all jobs"),
        ("UPLOAD_TO=https://h/a?sig=1,https://h/b?sig=2", "the same for all jobs"),
        ("PARAMS_NETWORK_DIM=8,none-such", "PARAMS_NETWORK_DIM='none-such': PARAMS_NETWORK_DIM='none-such'"),
    ],
)
def test_a_sweep_that_cannot_be_used_is_refused(sweep, said):
    assert said in refusal(SWEEP=sweep)


def test_what_is_wrong_with_the_common_variables_is_said_once_and_before_an_address_is_asked():
    said = refusal(JOBS="https://host.invalid/jobs.jsonl", PARAMS_SEED="many")
    assert said.count("PARAMS_SEED='many'") == 1 and "line" not in said
    assert refusal(SWEEP="PARAMS_NETWORK_DIM=8,16,32", PARAMS_SEED="many").count("PARAMS_SEED='many'") == 1


@pytest.mark.parametrize("nodes", ["2", "auto"])
def test_a_queue_of_several_machines_is_refused(nodes):
    said = refusal(SWEEP="PARAMS_SEED=1,2", NODES=nodes)
    assert said.count(f"NODES={nodes}: a queue runs on one machine") == 1
    said = refusal(JOBS=lines({"PARAMS_SEED": 1}, {"PARAMS_SEED": 2, "NODES": nodes}))
    assert f"JOBS, line 2: NODES={nodes}" in said and "line 1" not in said
    assert expand(COMMON | {"SWEEP": "PARAMS_SEED=1,2", "NODES": "1"})


def test_two_jobs_in_one_folder_are_refused():
    assert "one folder for each" in refusal(
        JOBS=lines({"OUTPUT_PATH": "/w/a"}, {"OUTPUT_PATH": "/w/a", "PARAMS_SEED": 1})
    )


def test_a_queue_inside_config_json_is_refused():
    assert "set the variable SWEEP itself" in refusal(CONFIG_JSON='{"SWEEP": "PARAMS_SEED=1,2"}')


def test_no_token_of_a_line_is_shown():
    token = "hf_" + "Qq7" * 10
    assert token not in refusal(JOBS=lines({"HF_TOKEN": token, "PARAMS_NETWORK_DIMM": token}))


def test_each_job_uploads_to_a_repository_of_its_own_and_limits_are_the_queues():
    more = {"PUSH_TO_HUB": "you/loras", "MAX_COST": "5", "MAX_RUNTIME": "3", "PRICE_PER_HOUR": "1"}
    jobs = expand(COMMON | more | {"SWEEP": "PARAMS_SEED=1,2"})
    assert [job.environ["PUSH_TO_HUB"] for job in jobs] == ["you/loras-seed-1", "you/loras-seed-2"]
    assert all("MAX_COST" not in job.environ and "MAX_RUNTIME" not in job.environ for job in jobs)


@pytest.mark.parametrize("folder", ["s3://mine/loras", "'s3://mine/loras/'", "az://mine/loras", "gs://mine/loras"])
def test_each_job_uploads_to_a_folder_of_its_own(folder):
    jobs = expand(COMMON | {"UPLOAD_TO": folder, "SWEEP": "PARAMS_SEED=1,2"})
    start = folder.strip("'").rstrip("/")
    assert [job.environ["UPLOAD_TO"] for job in jobs] == [f"{start}/seed-1", f"{start}/seed-2"]
    own = [{"UPLOAD_TO": "s3://other/a"}, {"UPLOAD_TO": "https://host/b?sig=1"}, {"PARAMS_SEED": 1}]
    jobs = expand(COMMON | {"UPLOAD_TO": folder, "JOBS": lines(*own)})
    given = [job.environ["UPLOAD_TO"] for job in jobs]
    assert given == ["s3://other/a", "https://host/b?sig=1", f"{start}/{jobs[2].name}"]
    assert "sig" not in " ".join(job.name for job in jobs)


def test_one_signed_address_does_not_take_the_lora_of_every_job():
    said = refusal(UPLOAD_TO="https://host/lora?X-Amz-Signature=cAnary", SWEEP="PARAMS_SEED=1,2")
    assert "PARAMS_SEED='2': UPLOAD_TO=https://host/lora" in said and "PARAMS_SEED='1' too" in said
    assert "Fix: UPLOAD_TO=s3://BUCKET/FOLDER" in said and "cAnary" not in said
    twice = [{"UPLOAD_TO": "https://host/a?sig=1"}, {"UPLOAD_TO": "https://host/a?sig=2"}]
    assert "JOBS, line 2: UPLOAD_TO" in refusal(JOBS=lines(*twice))
    assert "UPLOAD_TO" in refusal(JOBS=lines({"UPLOAD_TO": "s3://mine/a"}), SWEEP="PARAMS_SEED=1,2")


# ---- what became of them


def test_another_start_goes_on_with_what_is_not_done(tmp_path):
    jobs = expand(COMMON | {"OUTPUT_PATH": str(tmp_path), "SWEEP": "PARAMS_SEED=1,2,3"})
    record = QueueRecord.opened(tmp_path, jobs)
    for job, state in zip(jobs, (DONE, FAILED, DONE), strict=True):
        record.entries[job.name].state = state
    jobs[0].out.mkdir()
    (jobs[0].out / "status.json").write_text('{"phase": "done"}')
    record.write()
    again = QueueRecord.opened(tmp_path, jobs)
    assert [again.is_done(job) for job in jobs] == [True, False, False], "the folder of the third is gone"
    other = expand(COMMON | {"OUTPUT_PATH": str(tmp_path), "SWEEP": "PARAMS_SEED=1,2,3", "PARAMS_NETWORK_DIM": "8"})
    assert not any(QueueRecord.opened(tmp_path, other).is_done(job) for job in other), "other settings: another job"


@pytest.mark.parametrize(
    "of", [lambda dim: {"NETWORK_DIM": dim}, lambda dim: {"CONFIG_JSON": f'{{"lora_rank": {dim}}}'}]
)
def test_a_job_is_another_one_by_what_its_variables_mean(of):
    def digest(**more):
        return expand(COMMON | {"SWEEP": "PARAMS_SEED=1"} | more)[0].digest

    assert digest(**of("8")) == digest(PARAMS_NETWORK_DIM="8") != digest(**of("32"))
    assert digest(MAX_COST="5", PRICE_PER_HOUR="1", CONFIG_JSON='{"MONITOR_PORT": 0}') == digest()


def test_a_job_that_is_done_is_started_once_more_where_its_results_are_wanted_elsewhere(tmp_path):
    def opened(**more):
        (job,) = expand(COMMON | {"OUTPUT_PATH": str(tmp_path), "SWEEP": "PARAMS_SEED=1"} | more)
        return job, QueueRecord.opened(tmp_path, [job])

    job, record = opened(PUSH_TO_HUB="you/loras")
    job.out.mkdir()
    (job.out / "status.json").write_text('{"phase": "done"}')
    record.entries[job.name] = Entry(job.digest, state=DONE, uploads=job.uploads)
    record.write()

    def is_done(**more):
        job, record = opened(**more)
        return record.is_done(job)

    assert is_done(PUSH_TO_HUB="you/loras") and is_done()
    assert not is_done(PUSH_TO_HUB="you/others")
    assert not is_done(PUSH_TO_HUB="you/loras", UPLOAD_TO="s3://bucket/loras")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"jobs": 3}', '{"jobs": {"seed-1": {"state": []}}}'])
def test_a_damaged_record_begins_anew(tmp_path, damage):
    jobs = expand(COMMON | {"OUTPUT_PATH": str(tmp_path), "SWEEP": "PARAMS_SEED=1,2"})
    (tmp_path / "queue.json").write_text(damage)
    assert not any(QueueRecord.opened(tmp_path, jobs).is_done(job) for job in jobs)


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ((0, 0), 0, 0),
        ((0, 65, 78), 0, 65),
        ((65, 75), 0, 75),
        ((0, 70), 0, 75),
        ((0, 143), 15, 143),
        ((0, 130), 2, 130),
    ],
)
def test_the_exit_code_says_whether_another_start_may_do_more(codes, stopped, expected):
    names = {0: DONE, 143: STOPPED, 130: STOPPED}
    entries = [Entry("", state=names.get(code, FAILED), exit_code=code) for code in codes]
    assert run.exit_code([*entries, *([Entry("")] if stopped else [])], stopped) == expected
    assert Entry("", state=RUNNING).exit_code is None


def test_each_gpu_gets_a_job_with_its_share_of_the_host(monkeypatch):
    jobs = expand(COMMON | {"SWEEP": "PARAMS_SEED=1,2"})
    two = hardware_of("2 x RTX 4090")
    slots = run.slots_of(jobs, two, {"PRICE_PER_HOUR": "3", "CUDA_VISIBLE_DEVICES": "2,5"})
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["2", "5"]
    assert [slot["MONITOR_PORT"] for slot in slots] == ["8675", "8676"]
    assert [slot["PRICE_PER_HOUR"] for slot in slots] == ["1.5", "1.5"] and len(
        {s["MONITOR_TOKEN"] for s in slots}
    ) == 1
    whole = hardware.detect(run=missing)
    monkeypatch.setenv(hardware.HOST_SHARE, "2")
    assert hardware.detect(run=missing).host_memory_gib == pytest.approx(whole.host_memory_gib / 2)
    several = expand(COMMON | {"SWEEP": "PARAMS_SEED=1,2", "NUM_GPUS": "2"})
    assert len(run.slots_of(several, two, {})) == 1, "each takes both"
    assert len(run.slots_of(jobs, hardware_of("RTX 4090"), {})) == 1


def test_a_price_and_a_token_in_config_json_are_those_of_the_queue():
    jobs = expand(COMMON | {"SWEEP": "PARAMS_SEED=1,2"})
    config = {"CONFIG_JSON": json.dumps({"PRICE_PER_HOUR": 3, "MONITOR_TOKEN": "opens-the-page-of-all"})}
    slots = run.slots_of(jobs, hardware_of("2 x RTX 4090"), config)
    assert [slot["PRICE_PER_HOUR"] for slot in slots] == ["1.5", "1.5"]
    assert all("MONITOR_TOKEN" not in slot for slot in slots), "each job has the one of CONFIG_JSON"


def missing(*_, **__):
    raise FileNotFoundError


# ---- the commands


def test_a_check_looks_at_all_jobs(tmp_path, capsys, caplog):
    places = {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path), "HF_HOME": str(tmp_path)}
    queued = {"BASE_MODEL": "mini-flux,mini-sdxl", "DATASET_NAME": str(tmp_path / "none"), "MONITOR_PORT": "0"}
    code = entrypoint.main(["--check", "--json"], {"PATH": os.environ["PATH"], **places, **queued})
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["queue"]] == ["mini-flux", "mini-sdxl"]
    assert code == found["queue"][0]["exit_code"] == found["queue"][1]["exit_code"] != 0
    assert "2 of 2 jobs cannot run" in caplog.text and not (tmp_path / "out").exists()


def test_a_check_shows_no_figures_of_another_job(tmp_path, capsys):
    places = {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path), "HF_HOME": str(tmp_path)}
    images = os.path.abspath("trainer/families/miniatures/concept")
    lines_of_jobs = lines({"PARAMS_SEED": 1}, {"PARAMS_RESUME_FROM": str(tmp_path / "none.safetensors")})
    queued = {"BASE_MODEL": "mini-flux", "DATASET_NAME": images, "JOBS": lines_of_jobs, "MONITOR_PORT": "0"}
    assert entrypoint.main(["--check", "--json"], {"PATH": os.environ["PATH"], **places, **queued}) != 0
    found = json.loads(capsys.readouterr().out)
    good, bad = found["queue"]
    assert good["exit_code"] == 0 and good["job"] is not None
    assert bad["exit_code"] != 0 and bad["job"] is None and found["plan"] is None


def test_a_quote_is_the_sum_of_all_jobs(tmp_path, capsys):
    (tmp_path / "prices.json").write_text('{"RTX 4090": 0.5, "RTX 3070": 0.2, "H200": 4}')
    places = {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path), "HF_HOME": str(tmp_path)}
    environ = {"BASE_MODEL": "flux", "DATASET_NAME": "https://example.com/a.zip", **places}

    def quoted(**more):
        assert entrypoint.main(["quote", "--json", "--prices", str(tmp_path / "prices.json")], environ | more) == 0
        return {row["gpu"]: row for row in json.loads(capsys.readouterr().out)["gpus"]}

    one, both = quoted(PARAMS_MAX_STEPS="100"), quoted(SWEEP="PARAMS_MAX_STEPS=100,300")
    assert both["RTX 4090"]["steps"] == 400 and one["RTX 4090"]["steps"] == 100
    assert both["RTX 4090"]["seconds"] > 2 * one["RTX 4090"]["seconds"]
    assert not quoted(SWEEP="PARAMS_BATCH_SIZE=1,64")["RTX 3070"]["fits"]
