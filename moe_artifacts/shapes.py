"""Names of the tensor shapes used in signatures, in the words of einops.

They are documentation for readers and plain ``Tensor`` to type checkers; ``make shapes`` runs the tests with every
annotated function checked at run time. A lone axis gets a leading space, so that linters see no undefined name.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

Latents = Float[Tensor, "batch channel height width"]  # as the scheduler holds them, not rescaled
StepLatents = Float[Tensor, "batch step channel height width"]  # the same over the scored steps
Preview = Float[Tensor, "batch 3 pixel_h pixel_w"]  # RGB in [0, 1]; another grid, so other axis names
PreviewBytes = UInt8[Tensor, "batch 3 pixel_h pixel_w"]  # the same as 0 to 255
TowerInput = Float[Tensor, "batch 3 tower_h tower_w"]  # a preview at the size of the image tower
Embedding = Float[Tensor, "batch embed"]  # CLIP vectors of length 1
Features = Float[Tensor, "batch feature"]  # what the experts see of one step
StepFeatures = Float[Tensor, "batch step feature"]  # the same for a whole trajectory
State = Float[Tensor, "batch hidden"]  # the experts' mixed hidden state
StepState = Float[Tensor, "batch step hidden"]
GateWeights = Float[Tensor, "batch expert"]  # >= 0, sum to 1 over experts
PerImage = Float[Tensor, " batch"]  # one number an image
RowMask = Bool[Tensor, " batch"]
Rows = Int64[Tensor, " row"]  # indices into a batch
StepIndex = Int64[Tensor, " batch"]
StepMass = Float[Tensor, "batch step"]  # >= 0; step 0 is the noisiest
StepProbs = Float[Tensor, "batch step"]  # in [0, 1]
StepValues = Float[Tensor, "batch step"]  # any real number
