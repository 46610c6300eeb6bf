"""The monitor page in a real browser: it opens, shows, follows, compares, downloads, and stays closed to strangers."""

import json
import warnings

import pytest

from bench import browser
from entrypoint.monitor.actions import Actions
from tests.support.finished_runs import finished_run, write_sample
from tests.support.monitor import TOKEN, serving
from trainer.process.vitals import SAVE, STOP, VARIABLE, Vitals
from trainer.spec.messages import trend
from trainer.spec.messages.noise_bands import KEYS

if browser.find() is None:
    warnings.warn("No Chromium is here: the monitor page is NOT tested in a browser.", stacklevel=1)
pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium is here: apt-get install chromium")
SIZES = [(1440, 900), (390, 844)]


@pytest.fixture
def page(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "run.log").write_text("2026-01-01 00:00:00,000 INFO <b>bold</b>\n")
    with serving(tmp_path) as running:
        running.folder = tmp_path
        running.address = f"http://127.0.0.1:{running.port}/"
        yield running


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} pixels")
def opened(page, request):
    """The page in a window of each size, opened by the address that the log shows."""
    width, height = request.param
    with browser.Browser(width=width, height=height) as window:
        window.open(f"{page.address}#{TOKEN}")
        window.wait_for("document.querySelectorAll('#charts figure').length === 3")
        window.said.clear()  # the door's 401
        yield window
        assert window.said == []  # no error, and nothing that the policy has refused


def texts(window, selector):
    return window.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def test_the_address_of_the_log_opens_it_and_is_forgotten(page, opened):
    assert opened.value("location.href") == page.address  # the token is neither in the bar nor in the history
    assert opened.value("document.cookie") == ""  # no script reads it
    opened.open(page.address)  # the cookie is enough
    opened.wait_for("document.getElementById('phase')?.textContent === 'done'")


def test_it_shows_what_is_trained_how_far_it_is_and_where_the_result_is(opened):
    opened.wait_for("document.getElementById('lines').textContent !== ''")
    assert texts(opened, "#name") == ["x"] and texts(opened, "#phase") == ["done"]
    assert "mini-flux" in texts(opened, "#what")[0] and "zot" in texts(opened, "#what")[0]
    assert texts(opened, "#steps") == ["step 40"] and "1 min 30 s" in texts(opened, "#facts dd")
    assert texts(opened, "#charts figcaption")[0].startswith("Loss")
    assert texts(opened, "#loras tbody a")[-1] == "x.safetensors" and "204 B" in texts(opened, "#loras td")
    assert texts(opened, "#lines") == ["2026-01-01 00:00:00,000 INFO <b>bold</b>\n"]
    assert opened.value("document.querySelectorAll('script:not([src]), #lines b, main script').length") == 0


def test_nothing_is_wider_than_the_window(opened):
    assert opened.value("document.documentElement.scrollWidth <= innerWidth")
    controls = "[...document.querySelectorAll('main button, main input, main select, .chart, .compare')]"
    cut = f"{controls}.filter((node) => !node.closest('.samples') && node.getBoundingClientRect().right > innerWidth)"
    assert opened.value(f"{cut}.map((node) => node.outerHTML)") == []


def test_samples_are_a_grid_of_prompts_and_steps(opened):
    assert texts(opened, "#grid thead th") == ["step 0", "step 20", "step 40"]
    assert opened.value("document.querySelectorAll('#grid tbody tr').length") == 2
    opened.value("document.querySelectorAll('#grid img').forEach((image) => { image.loading = 'eager'; })")
    opened.wait_for("[...document.querySelectorAll('#grid img')].every((image) => image.naturalWidth === 64)")
    opened.value("document.querySelectorAll('#grid button')[1].click()")
    opened.wait_for("document.querySelector('#viewer img')?.naturalWidth === 64")
    assert "Step 20" in texts(opened, "#viewer p")[1] and "Seed: 7" in texts(opened, "#viewer p")[1]
    opened.press("ArrowRight")
    opened.wait_for("document.querySelector('#viewer p + p').textContent.startsWith('Step 40')")
    opened.press("Escape")
    opened.wait_for("!document.getElementById('viewer').open")


def test_two_steps_are_compared_with_a_slider(opened):
    assert texts(opened, ".two .side") == ["step 0", "step 40"]
    opened.value("const left = document.getElementById('compare-before'); left.value = '20';"
                 "left.dispatchEvent(new Event('change'))")  # fmt: skip
    assert texts(opened, ".two .side") == ["step 20", "step 40"]
    opened.value("document.getElementById('compare-slider').focus()")
    opened.press("Home")
    assert opened.value("document.querySelectorAll('.two img')[1].style.clipPath") == "inset(0px 0px 0px 0%)"
    opened.press("End")
    assert opened.value("document.querySelectorAll('.two img')[1].style.clipPath") == "inset(0px 0px 0px 100%)"


def test_two_strengths_are_compared_too(page, opened):
    for strength in (0.0, 0.5):
        write_sample(page.folder / "sample", 40, 0, strength=strength)
    opened.wait_for("document.querySelectorAll('#grid thead th').length === 5")
    heads = ["step 0", "step 20", "step 40", "strength 0: base", "strength 0.5"]
    assert texts(opened, "#grid thead th") == heads and texts(opened, "#compare-before option") == heads
    assert texts(opened, ".compare h3") == ["Compare two steps or strengths"]
    assert texts(opened, ".two .side") == ["step 0", "step 40"]  # unless others are chosen
    choose = "(id, place) => { const s = document.getElementById(id); s.selectedIndex = place; "
    choose += "s.dispatchEvent(new Event('change')); }"
    opened.value(f"({choose})('compare-before', 3)")
    opened.value(f"({choose})('compare-after', 4)")
    assert texts(opened, ".two .side") == heads[3:]
    sources = opened.value("[...document.querySelectorAll('.two img')].map((image) => image.src)")
    assert [source.rpartition("/")[2].partition("?")[0] for source in sources] == [
        "step-00000040-00-at-0.png", "step-00000040-00-at-0.5.png",
    ]  # fmt: skip
    opened.wait_for("[...document.querySelectorAll('.two img')].every((image) => image.naturalWidth === 64)")
    opened.value("document.querySelector('#grid tbody tr td:last-child button').click()")
    assert "Strength 0.5. " in texts(opened, "#viewer p")[1]
    opened.value("document.getElementById('viewer').close()")
    write_sample(page.folder / "sample", 60, 0)  # the run was made longer
    opened.wait_for("document.querySelectorAll('#grid thead th').length === 6")
    assert texts(opened, "#grid thead th")[4:] == ["step 40, strength 0: base", "step 40, strength 0.5"]


def test_curves_are_read_with_the_keyboard(opened):
    opened.value("document.querySelector('#chart-loss svg').focus()")
    opened.press("Home")
    assert texts(opened, "#chart-loss output") == ["step 1: as measured 1, smoothed 1, validation 0.1 (step 20)"]
    opened.press("ArrowRight")
    assert texts(opened, "#chart-loss output")[0].startswith("step 2: as measured 0.5")
    assert "step 1 to 40" in opened.value("document.querySelector('#chart-loss svg').getAttribute('aria-label')")


def test_the_loss_by_noise_level_is_a_curve_for_each_band(page, opened):
    assert opened.value("document.getElementById('chart-noise')") is None  # an older run has none
    rows = []
    for step in range(41, 49):
        band = KEYS[step % 2 * 3]  # the first and the last
        rows.append(json.dumps({"step": step, "epoch": 1, "lr": 1e-4, "loss": 0.5, band: step / 100, "time": 1.0}))
    with (page.folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(rows) + "\n")
    opened.wait_for("document.querySelectorAll('#chart-noise path').length === 2")
    assert texts(opened, "#chart-noise .key") == ["0–25 % noise", "75–100 % noise"]
    opened.value("document.querySelector('#chart-noise svg').focus()")
    opened.press("Home")
    # Of 41 and 43 the later is shown: (0.9 · 0.1 · 0.41 + 0.1 · 0.43) / (1 - 0.9²), smoothed with 0.9.
    assert texts(opened, "#chart-noise output") == ["step 42: 0–25 % noise 0.42, 75–100 % noise 0.4205"]


def test_what_the_job_writes_appears(page, opened):
    write_sample(page.folder / "sample", 41, 0, "new")
    row = {"step": 41, "epoch": 1, "lr": 1e-4, "loss": 0.125, "grad_norm": 0.5, "time": 1.0, "prodigy_d": 1e-5}
    with (page.folder / "metrics.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(row)}\n")
    opened.wait_for("document.querySelector('#chart-d')")
    opened.wait_for("document.querySelectorAll('#grid thead th').length === 4")
    assert texts(opened, "#steps") == ["step 41"] and texts(opened, ".two .side")[1] == "step 41"


def test_a_loss_that_has_risen_is_said_beside_it_in_the_words_of_the_log(page, opened):
    value = "[...document.querySelectorAll('#facts div')].find((fact) => fact.textContent.startsWith('Loss'))"
    assert "risen" not in opened.value(f"{value}.textContent")
    status = json.loads((page.folder / "status.json").read_text())
    risen = str(trend.Risen(0.5, 4.0, 30))
    (page.folder / "status.json").write_text(json.dumps({**status, "risen": risen}))
    opened.wait_for(f"{value}.textContent.includes('compare the samples')")
    assert f"; {risen}: compare the samples" in opened.value(f"{value}.textContent")


def test_the_overview_says_where_the_result_is(page, opened):
    status = json.loads((page.folder / "status.json").read_text())
    (page.folder / "status.json").write_text(json.dumps({**status, "phase": "training"}))
    opened.wait_for("document.getElementById('what').textContent.includes('It will be x.safetensors')")
    (page.folder / "status.json").write_text(json.dumps({**status, "output": "x.safetensors"}))
    opened.wait_for("document.querySelector('#what a') !== null")
    assert "It is x.safetensors." in texts(opened, "#what")[0]
    assert opened.value("document.querySelector('#what a').hash") == "#checkpoints"


def test_captions_by_a_model_have_their_progress(page, opened):
    status = json.loads((page.folder / "status.json").read_text())
    progress = {"captioned": 16, "to_caption": 1200, "captions_left_s": 3000}
    (page.folder / "status.json").write_text(json.dumps({**status, "phase": "captioning", **progress}))
    opened.wait_for("document.getElementById('facts').textContent.includes('Captions')")
    said = texts(opened, "#facts div")
    assert "Captions16 of 1,200" in said and "Captions left50 min 0 s" in said
    (page.folder / "status.json").write_text(json.dumps({**status, "phase": "training", **progress}))
    opened.wait_for("!document.getElementById('facts').textContent.includes('Captions')")


def test_files_can_be_downloaded(page, opened):
    link = "document.querySelector('#loras tbody tr:last-child a')"
    assert opened.value(f"{link}.hasAttribute('download')")
    got = opened.value(f"fetch({link}.href).then((answer) => answer.arrayBuffer()).then((data) => data.byteLength)")
    assert got == (page.folder / "x.safetensors").stat().st_size


def test_the_job_is_asked_only_after_one_more_question(page, tmp_path):
    vitals, path = Vitals.make()
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "phase": "training"}))
    with serving(tmp_path, actions=Actions({VARIABLE: path})) as running, browser.Browser() as window:
        window.open(f"http://127.0.0.1:{running.port}/#{TOKEN}")
        window.wait_for("document.getElementById('actions')?.hidden === false")
        save = "document.querySelector('[data-action=save]')"
        window.value(f"{save}.click()")
        assert window.value("document.getElementById('question').open")
        window.press("Escape")
        assert vitals.read(SAVE) is None
        question = "document.getElementById('question')"
        yes = "document.querySelector('#question [value=yes]').click()"
        window.value(f"{save}.click(); {question}.close(); {save}.click(); {yes}")  # at once: events come afterwards
        window.wait_for("document.getElementById('acted').textContent.includes('saves after this step')")
        window.value("new Promise((done) => { requestAnimationFrame(() => requestAnimationFrame(done)); })")
        asked = "performance.getEntriesByType('resource').filter((entry) => entry.name.endsWith('action/save')).length"
        assert window.value(asked) == 1
        assert vitals.read(SAVE) is not None and vitals.read(STOP) is None
        disabled = "document.querySelector('[data-action=sample]').disabled"
        assert window.value(disabled) == (not job_has_prompts(tmp_path))
    vitals.close()


def job_has_prompts(folder):
    return bool(json.loads((folder / "plan.json").read_text())["prompts"])


def test_the_dataset_is_shown_as_it_is_trained(page, opened):
    opened.value("document.getElementById('dataset').scrollIntoView()")
    opened.wait_for("document.querySelectorAll('#pictures li').length === 2")
    first, second = texts(opened, "#pictures li")
    assert "<script>" in first and "64×48, trained at 48×48" in first and "99 tokens, cut at 77" in first
    assert "held out for validation" in second and "1 more variant" in second and "3 tokens" in second
    assert texts(opened, "#images details li")[0] == "bad.jpg: damaged"
    assert opened.value("document.querySelectorAll('#pictures img').length") == 0 and "not on this machine" in first


def test_every_control_and_every_image_has_a_name(opened):
    nameless = """
        const named = (node) => node.getAttribute('aria-label') || node.getAttribute('alt') || node.labels?.length ||
            node.textContent.trim() || node.querySelector('img[alt]');
        const found = document.querySelectorAll('button, input, select, a, main img, main svg, progress');
        [...found].filter((node) => !node.closest('[hidden]') && !named(node)).map((node) => node.outerHTML)"""
    assert opened.value(nameless) == []


def test_a_stranger_sees_the_door_and_a_wrong_token_does_not_open_it(page):
    with browser.Browser() as window:
        window.open(f"{page.address}#a-wrong-token-12345")
        window.wait_for("document.getElementById('refused')?.textContent.includes('not the token')")
        assert "zot" not in window.value("document.documentElement.outerHTML")
        window.value(f"document.getElementById('token').value = '{TOKEN}'")
        window.value("document.querySelector('#door button').click()")
        window.wait_for("document.getElementById('phase')?.textContent === 'done'")
