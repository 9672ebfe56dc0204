"""Best-of-N as a race: the candidates of one prompt are denoised in waves, and only the most promising go on.

plan.py      what a race costs, which steps it scores and how many candidates it keeps
search.py    fitting a plan to recorded runs of other prompts
course.py    how many candidates go on, decided anew after every check from the posterior of the final score
race.py      one race, live
recorded.py  many races over recorded runs at once
"""

from moe_artifacts.racing.plan import RaceCost, RacePlan
from moe_artifacts.racing.race import Race, Wave
from moe_artifacts.racing.recorded import RecordedRaces, draw_orders
from moe_artifacts.racing.search import plan_race

__all__ = ["Race", "RaceCost", "RacePlan", "RecordedRaces", "Wave", "draw_orders", "plan_race"]
