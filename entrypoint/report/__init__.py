"""What a job leaves for people: report.html, and README.md, the model card. Made from the files of its run alone.

Read `gather` (everything that the files say), `metric_rows` (the numbers of each step), `samples` (the images, scaled),
`charts` (curves as SVG), `usage` (how to use the LoRA), `elements`, `sections` and `page` (report.html), `card`
(README.md), `receipt` (time and money in one line of the log), and `start` (the process that writes both when a job
ends). `python -m entrypoint.report OUTPUT_PATH` writes them again, also on another machine.
"""
