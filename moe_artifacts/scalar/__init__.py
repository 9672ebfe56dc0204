"""Any score per step as evidence: a calibrated posterior from the scores so far, and a scorer that the guard takes live.

normal.py      scores on any scale -> normal scores
variance.py    their covariance between prompts and within
model.py       one Gaussian over the scores of all steps and the final score: what is known after each step
posterior.py   P(the finished image is bad | scores so far)
exit.py        the exit distribution from those posteriors
scorer.py      a user's function with all that, live; config.py and checkpoint.py: its files
"""
