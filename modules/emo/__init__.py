"""EMO: light-weight networks of inverted residual mobile blocks. Importing the package registers them in timm."""

from modules.emo.blocks import IRMB, StridedWindowAttention
from modules.emo.network import ARCHITECTURES, EMO, emo_1m, emo_2m, emo_5m, emo_6m

__all__ = ["ARCHITECTURES", "EMO", "IRMB", "StridedWindowAttention", "emo_1m", "emo_2m", "emo_5m", "emo_6m"]
