"""What dense tasks learn from beside an image: masks (KEY.seg.png) and annotated objects (KEY.json).

Both are checked by the same functions when shards are prepared, when they are verified and when they are read.
"""

from data_pipeline.targets.check import TargetCheck, target_check
from data_pipeline.targets.fault import TargetError

__all__ = ["TargetCheck", "TargetError", "target_check"]
