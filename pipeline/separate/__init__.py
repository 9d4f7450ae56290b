"""Use a trained separator: on arrays (`Separator`), on streams (`Stream`) and on files (`python -m pipeline.separate`).

separator = Separator.from_pretrained("data/separators/bandsplit")
stems = separator.separate(waveform, 44100, ["Dog", "Rain"])
stems["Dog"], stems.residual        # (channels, time), at 44.1 kHz; all stems and the residual add up to the input
"""

from pipeline.separate.model import Detection, Separator, Stems
from pipeline.separate.stream import Stream
from pipeline.separate.targets import Unusable

__all__ = ["Detection", "Separator", "Stems", "Stream", "Unusable"]
