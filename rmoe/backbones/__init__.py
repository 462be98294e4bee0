"""Makes timm backbones into residual mixtures of experts, loads dense cores, and gives heads feature pyramids."""

from rmoe.backbones import cvt  # noqa: F401  registers CvT with timm
