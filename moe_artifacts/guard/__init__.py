"""The scorer around a whole diffusers pipeline call; the only package that knows diffusers pipelines.

request.py   what is asked of the pipeline, read and checked before the first step
tap.py       wraps ``scheduler.step`` for the length of a run and shows each step
rows.py      takes rows out of the running batch
guard.py     ArtifactGuard: scores, decides, drops
output.py    what it hands back, and its report
"""
