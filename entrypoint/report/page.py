"""report.html: one file without a script, which a browser shows from anywhere and a printer prints."""

from __future__ import annotations

import base64
import hashlib

from entrypoint.report import sections
from entrypoint.report.elements import text
from entrypoint.report.gather import Gathered

MARK = "<!-- Written by Kiln -->"  # by which a job knows its own report
STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1f;--quiet:#5d5d66;--paper:#fdfdfc;--card:#f3f2ef;--line:#d9d7d2;
--blue:#2457c5;--warm:#b3540a;--good:#1e7a3c;--bad:#b3261e;--plum:#8a2f8f}
@media (prefers-color-scheme:dark){:root{--ink:#ececf0;--quiet:#a3a3ad;--paper:#151518;--card:#202025;--line:#3a3a42;
--blue:#8ab0ff;--warm:#ffb066;--good:#6fd493;--bad:#ff8a80;--plum:#e3a0e8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:1.25rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1rem 0 .25rem}
a{color:var(--blue)}
nav ul{display:flex;flex-wrap:wrap;gap:.35rem 1rem;padding:0;margin:1rem 0;list-style:none}
.quiet{color:var(--quiet);font-size:.875rem;margin:.25rem 0 .5rem}
.badge{display:inline-block;padding:.1rem .6rem;border-radius:1rem;border:1px solid;font-weight:600;font-size:.9rem}
.good{color:var(--good)}.bad{color:var(--bad)}span.odd{color:var(--warm)}
.message{border-left:4px solid var(--bad);padding:.25rem .75rem;background:var(--card);white-space:pre-line}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:.6rem;margin:1rem 0}
.facts div{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
dt{color:var(--quiet);font-size:.8rem}dd{margin:0;font-weight:600}
pre{background:var(--card);padding:.8rem;border-radius:.5rem;overflow-x:auto;font-size:.85rem}
code{font-family:ui-monospace,monospace;font-size:.9em}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;width:100%}
.pairs{width:auto}
td,th{padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td{min-width:4.2rem;overflow-wrap:break-word}td.long{min-width:15rem}
th{color:var(--quiet);font-weight:500;white-space:nowrap}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
tr.odd td{color:var(--warm)}tr.best td{color:var(--good);font-weight:600}
.strip{display:flex;gap:.5rem;overflow-x:auto;padding-bottom:.5rem}
figure{margin:0}
.strip figure{flex:0 0 auto;width:min(200px,44vw)}
.strip img{width:100%;height:auto;display:block;border-radius:.35rem;background:var(--card)}
.missing{display:block;padding:1rem .5rem;background:var(--card);color:var(--quiet);font-size:.8rem}
figcaption{color:var(--quiet);font-size:.8rem}
.small{width:64px;height:auto;border-radius:.25rem;display:block}
.chart{margin:0 0 1.25rem;overflow-x:auto}.chart svg{min-width:520px}
svg{width:100%;height:auto;display:block}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
polyline.raw{stroke:var(--quiet);stroke-width:.8;opacity:.5}
polyline.smooth,polyline.plain{stroke:var(--blue)}
polyline.held{stroke:var(--warm);stroke-dasharray:4 3}circle.held{fill:var(--warm)}
polyline.band0{stroke:var(--good)}polyline.band1{stroke:var(--blue);stroke-dasharray:9 3}
polyline.band2{stroke:var(--plum);stroke-dasharray:5 3}polyline.band3{stroke:var(--warm);stroke-dasharray:2 3}
.grid{stroke:var(--line);stroke-width:1}.mark{stroke:var(--quiet);stroke-width:1;stroke-dasharray:2 4;opacity:.6}
.tick{fill:var(--quiet);font-size:11px}
.key::before{content:"";display:inline-block;width:1.2rem;border-top:3px solid;margin:0 .3rem .2rem .8rem}
.key.raw::before{color:var(--quiet)}.key.smooth::before,.key.plain::before{color:var(--blue)}
.key.held::before,.key.band3::before{color:var(--warm)}.key.band0::before{color:var(--good)}
.key.band1::before{color:var(--blue);border-top-style:dashed}.key.band2::before{color:var(--plum);border-top-style:dashed}
.key.band3::before{border-top-style:dotted}
@media (max-width:520px){.facts{grid-template-columns:1fr 1fr}h1{font-size:1.5rem}}
@media print{:root{--ink:#000;--quiet:#444;--paper:#fff;--card:#f4f4f4;--line:#ccc;--blue:#1b49a8;--warm:#8f4308;
--good:#14602d;--bad:#8f1e17;--plum:#6d2272}nav{display:none}.strip,.wide,pre{overflow:visible;flex-wrap:wrap}pre{white-space:pre-wrap}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}.strip figure{width:120px}main{max-width:none;padding:0}}
"""


def page(run: Gathered, *, price: float | None) -> str:
    """The whole file. `price`: of the machine, an hour; None: unknown."""
    parts = {
        "use": ("Use it", sections.how_to_use(run)),
        "samples": ("Samples by step", sections.sample_grid(run)),
        "curves": ("Curves", sections.curves(run)),
        "checkpoints": ("Checkpoints", sections.checkpoints(run)),
        "dataset": ("Dataset", sections.dataset(run)),
        "plan": ("Plan", sections.plan(run)),
        "versions": ("Versions, time and money", sections.versions(run, price=price)),
    }
    present = {key: part for key, part in parts.items() if part[1]}
    links = "".join(f'<li><a href="#{key}">{title}</a>' for key, (title, _) in present.items())
    bodies = [f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, (title, body) in present.items()]
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    # Nothing is loaded from anywhere, nothing runs, and nothing is sent: whatever a caption or a prompt holds.
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{text(run.name)}: LoRA report</title><style>{STYLE}</style></head><body><main>"
        f"<header>{sections.headline(run, price=price)}</header>"
        f'<nav aria-label="Parts of the report"><ul>{links}</ul></nav>{"".join(bodies)}'
        "</main></body></html>\n"
    )
