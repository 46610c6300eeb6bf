"""Model families, one module each; nothing imports them by name, `trainer.spec.family.get_family` looks them up.

Imports `trainer.spec`, `trainer.base_model` and `trainer.engine`. Read `flux` first, then `flux2`, `sd3`, `sdxl`,
`z_image`, `qwen_image` and `krea2`. `common` has the parts that several families share, `qwen_vae` a VAE that some do,
`published/` the configs of their published models, `fused_blocks/` the FP8 forward passes of their blocks,
`miniatures/` small trained models.

How to add a family NAME:

1. `families/NAME.py`: `FACTS`, `LORA_KEYS` and the functions of `trainer.spec.family.Family`. Import torch and
   diffusers inside the functions; take from `common` what fits. A helper module that is no family itself must be listed
   in `SHARED` in `trainer/spec/family.py`.
   - `FACTS.models`: the values of BASE_MODEL, among them `mini-NAME` (with - for _), without a footprint. They must
     differ from those of other families.
   - `FACTS.objective`: `flow` or `denoising`; another one is added to `make_objective` in
     `trainer/training/objective.py`.
   - `LORA_KEYS.layers`: a row for each layer that can have an adapter, under the name that kohya's and ComfyUI's keys
     use. `trainer/lora_files/__init__.py` shows the formats. Check the table against the original checkpoint.
   - A base model that reads captions in another way, by a pipeline of its own, is no other family:
     `BaseModel.own_facts` (FLUX.2 dev's, for example).
   - `fused_forwards` returns {} at first: the family then trains in FP8 with the forward passes of diffusers.
2. `families/miniatures/NAME/`: a model of 5 to 10 MB in diffusers' layout, of the real classes. To train it, add
   its shapes to `miniatures/models.py`, a recipe to `miniatures/recipes.py`, its tokenizers, guidance and steps to
   `miniatures/make.py`, and run `python -m trainer.families.miniatures.make NAME --out DIR`.
3. The footprint: on a GPU, run `python -m bench step --family NAME …` for some strategies and batch sizes. It prints
   the numbers of weights; fit the GiB to the peaks, and add these to `tests/trainer/spec/test_memory_model.py`.
4. Optional, for speed: `families/fused_blocks/NAME.py` with the fused forward passes, returned by `fused_forwards`.

The tests that notice: `test_families` compares latents, texts, predictions, samples and LoRA files with diffusers' own
pipeline, and fails until NAME has a row in its CASES and small models in `tests/support/models.py`. `test_readme` holds
the table of variables, which lists every BASE_MODEL. Add NAME to the parametrised tests of `test_formats` (LoRA files
of every tool), `test_layouts` (single files) and `test_job_loop` (losses of a whole job).
"""
