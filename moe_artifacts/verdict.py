"""What became of one image that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# cleared: kept, and not scored to the end; rejected: bad, but found at the last step, so that nothing was saved;
# audited: would have been aborted, and was finished to learn whether that would have been right;
# error: the latents were not finite.
Status = Literal["kept", "cleared", "aborted", "rejected", "audited", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one image that was asked for."""

    index: int  # its place among the images asked for
    status: Status
    step: int | None  # 0-based denoising step of the decision; None: never decided, hence kept
    artifact_prob: float  # when it was decided, or at the last scored step; NaN: not scored
    cumulative_artifact_prob: float
    prompt: str
    seed: int | None  # None: drawn by a generator shared by the batch
    prompt_truncated: bool = False  # the end of the prompt reached none of the text encoders
    audited: bool = False  # reached the threshold and ran on; its status is "error" if it then broke, else "audited"
