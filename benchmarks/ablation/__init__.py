"""What each of the ancestor's wishes is worth: one change at a time, on one test set of the bundled pipeline.

    wishes.py      the rows of the table, and which row each is compared with
    designs.py     what a row is made of: backbone, samples, head, rule; and how much of everything
    inputs.py      judged runs of the bundled pipeline, as ``training.collect`` wrote them
    noisy_runs.py  what is missing there: x_t at the checks, recorded again from the seeds
    pictures.py    latents to previews: linear, tiny autoencoder, full VAE
    towers.py      the CLIP backbones: plain, noise-tuned, classification-tuned, WiSE-FT
    samples.py     labelled previews, of forward noise or of runs, through a frozen backbone
    scores.py      heads on them, and what each says of the test runs
    price.py       what a check costs
    figures.py     AUROC and costs, also on test images drawn again
    table.py       means over the seeds, intervals, and what helps
    page.py        the same for docs/ablation.md
    identity.py    what the kept files were made of; they are refused where that has changed

``python -m benchmarks.ablation`` makes all that is missing under ``ablation/`` in the work folder, and the table once all of it is
there. Everything is kept as soon as it is made, so a killed run goes on where it was.
"""
