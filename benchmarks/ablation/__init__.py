"""What each of the ancestor's wishes is worth: one change at a time, on one test set of the bundled pipeline.

    designs.py     the wishes: what each row of the table is trained on, and which row it is compared with
    inputs.py      judged runs of the bundled pipeline, as ``training.collect`` wrote them
    noisy_runs.py  what is missing there: x_t at the checks, recorded again from the seeds
    pictures.py    latents to previews: linear, tiny autoencoder, full VAE
    towers.py      the CLIP backbones: plain, noise-tuned, classification-tuned, WiSE-FT
    samples.py     labelled previews, of forward noise or of runs, through a frozen backbone
    scores.py      heads on them, and what each says of the test runs
    figures.py     AUROC and costs, their intervals, and the table

``python -m benchmarks.ablation`` makes all that is missing under ``ablation/`` in the work folder, and the table. Everything is kept
as soon as it is there, so a killed run goes on where it was.
"""
