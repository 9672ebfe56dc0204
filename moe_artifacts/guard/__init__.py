"""The scorer around a whole diffusers pipeline call; the only package that knows diffusers pipelines.

pipelines.py      what is known of each pipeline class
request.py        what is asked of the pipeline, read and checked before the first step
space.py          the latent space of a pipeline, compared with the scorer's; tokens to latents
tap.py            wraps ``scheduler.step`` for the length of a run and shows each step
rows.py           which rows of the running batch are alive, and which run
conditioning.py   cuts the denoiser's other inputs to the running rows
watch.py          one run: scores, decides, keeps the verdicts
audit_draw.py     which aborts are not carried out, to be checked
truncation.py     prompts that the text encoders cut
reproducible.py   warns where an image cannot be made again alone
guard.py          ArtifactGuard: puts these around one call
output.py         what it hands back, and its report

generate.py       generate_clean: one call after the other until every prompt has its images
call_settings.py attempts.py run_folder.py clean_run.py    its calls, its attempts, its files and what it hands back
"""
