"""A folder as a job leaves it, with texts that would be markup, formulas or controls elsewhere."""

import dataclasses
import json
import time

import numpy as np
from PIL import Image, PngImagePlugin
from safetensors.numpy import save

from tests.support.plans import job_plan
from trainer.storage import own_files

ODD = 'a <script>alert("1")</script> & [x](http://x) `code` | \u202e\x1b[31m 正面 =1+1'


def write_sample(folder, step, number, text=ODD, *, strength=1.0):
    folder.mkdir(exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt_text", text)
    info.add_itxt("parameters", f"{text}\nSteps: 4, Seed: 7, Size: 64x48")
    pixels = np.full((48, 64, 3), step % 255, np.uint8)
    Image.fromarray(pixels).save(folder / own_files.sample_name(step, number, strength), pnginfo=info)


def finished_run(tmp_path):
    """`x`: 40 steps, two saves, the finished LoRA, samples of three steps, one image of three skipped."""
    plan = job_plan(tmp_path, "flux", TRIGGER_WORD="zot")
    output = dataclasses.replace(plan.output, path=str(tmp_path), name="x")
    plan = dataclasses.replace(plan, output=output, reasons=(f"DATASET_NAME: {tmp_path}/a ({ODD})",), warnings=(ODD,))
    (tmp_path / "plan.json").write_text(plan.to_json())
    began = time.time() - 100
    done = {"phase": "done", "started": began, "updated": began + 90, "run": "x", "run_folder": ".", "exit_code": 0}
    (tmp_path / "status.json").write_text(json.dumps(done))
    rows = []
    for step in range(1, 41):
        row = {"step": step, "epoch": 1, "lr": 1e-4, "loss": 1 / step, "grad_norm": 0.5, "time": began + step}
        rows.append(json.dumps(row))
        if step % 20 == 0:
            rows.append(json.dumps({"step": step, "validation_loss": 2 / step, "time": began + step}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 41, "lo')
    about = {"ss_output_name": "x", "ss_network_dim": "4", "ss_steps": "40", "ss_num_train_images": "16"}
    for name in ("x-step00000020", "x-step00000040", "x"):
        (tmp_path / f"{name}.safetensors").write_bytes(save({"a": np.zeros(9, np.float32)}, about))
    for step in (0, 20, 40):
        for number in range(2):
            write_sample(tmp_path / "sample", step, number)
    Image.new("RGB", (8, 8)).save(tmp_path / "sample" / "contact-sheet.png")
    view = [{"kiln_dataset": 1, "images": 2, "skipped": 1, "reader": "CLIP", "limit": 77}]
    view.append({"name": ODD, "file": "", "place": [0, 0], "size": [64, 48], "views": 1, "captions": ["cap"]})
    view[-1] |= {"bucket": [48, 48], "scaled": [64, 48], "offset": [8, 0], "tokens": [99]}
    view.append({**view[-1], "name": "b.png", "captions": ["one", "two"], "tokens": [3, 3], "held_out": True})
    view.append({"name": "bad.jpg", "reason": "damaged"})
    (tmp_path / "dataset-images.jsonl").write_text("\n".join(map(json.dumps, view)) + "\n")
    table = ['\ufeff"file","subset","status","reason","width","height","bucket","repeats","trained caption","cut_at"']
    table += [f'"{ODD.replace(chr(34), chr(34) * 2)}","0.0","used","","64","48","64x48","1","cap","the end"']
    table += ['"bad.jpg","0.0","skipped","damaged","","","","","",""', '"b.png","0.0","used","",9,9,"9x9",1,"cap",""']
    (tmp_path / "dataset-report.csv").write_text("\r\n".join(table) + "\r\n")
    text = f"Images: 3 found, 2 used, 1 skipped.\n  skipped bad.jpg: damaged\n{tmp_path}/a (0.0): 2 images\n\nImages:\n"
    (tmp_path / "dataset-report.txt").write_text(text)
