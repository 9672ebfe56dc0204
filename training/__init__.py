"""Stages that train the bundled default, each run as ``python -m training.<stage>`` from a clone of the repository.

Order: generator (vae, then denoiser), judges, collect, clip, train, calibrate, evaluate. Each reads files and writes files under
the work folder (``MOE_ARTIFACTS_WORK``, by default ``~/.cache/moe-artifacts``) and resumes where it was stopped.
"""
